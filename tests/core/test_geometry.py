from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scellst_ray.core.geometry import Box, Frame

places = st.floats(-1e6, 1e6)
ratios = st.floats(0.05, 64)
frames = st.builds(Frame, places, places, ratios, ratios)
points = st.lists(st.tuples(places, places), min_size=1, max_size=5).map(np.array)


@given(frames, points)
def test_a_frame_leads_there_and_back(frame, xy):
    np.testing.assert_allclose(frame.from_level0(frame.to_level0(xy)), xy, atol=1e-3, rtol=1e-9)
    np.testing.assert_allclose(frame.to_level0(frame.from_level0(xy)), xy, atol=1e-3, rtol=1e-9)


def test_a_frame_keeps_x_and_y_apart():
    frame = Frame(100, 200, 2, 3)
    np.testing.assert_array_equal(frame.to_level0(np.array([[1.0, 10.0]])), [[102, 230]])
    np.testing.assert_array_equal(frame.from_level0(np.array([[102.0, 230.0]])), [[1, 10]])
    assert frame.area_ratio == 6
    assert frame.to_level0(np.zeros((0, 2))).shape == (0, 2)
    # float32 coordinates of a large slide must not lose their fraction on the way.
    assert frame.to_level0(np.array([[0.1, 0.1]], np.float32)).dtype == np.float64


@given(
    st.lists(st.integers(-50, 50), min_size=2, max_size=6, unique=True).map(sorted),
    st.lists(st.integers(-50, 50), min_size=2, max_size=6, unique=True).map(sorted),
    st.data(),
)
def test_boxes_between_edges_own_every_point_once(xs, ys, data):
    boxes = [
        Box(x, y, x_end - x, y_end - y) for x, x_end in pairwise(xs) for y, y_end in pairwise(ys)
    ]
    coordinate = st.integers(-110, 110).map(lambda v: v / 2)  # edges and what lies between
    point = np.array([[data.draw(coordinate), data.draw(coordinate)]])
    owners = sum(bool(box.contains(point)[0]) for box in boxes)
    inside = xs[0] <= point[0, 0] < xs[-1] and ys[0] <= point[0, 1] < ys[-1]
    assert owners == int(inside)


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 9), st.integers(1, 9))
def test_growing_adds_the_margin_on_every_side(x, y, w, h):
    box = Box(x, y, w, h)
    assert box.grow(3) == Box(x - 3, y - 3, w + 6, h + 6)
    assert box.grow(3).grow(-3) == box
