import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scellst_ray.spots.links import Links, alignment_report, link_cells
from scellst_ray.spots.table import Spots


def spots_at(xy0, radius0) -> Spots:
    xy0 = np.asarray(xy0, np.float64).reshape(-1, 2)
    num_spots = len(xy0)
    return Spots(
        np.array([f"s{i}" for i in range(num_spots)], dtype=np.str_),
        xy0,
        radius0,
        sparse.csr_matrix(np.ones((num_spots, 1), np.float32)),
        ["G"],
    )


def bags(links: Links) -> list[list[int]]:
    pairs = zip(links.offsets[:-1], links.offsets[1:], strict=True)
    return [links.cell_index[start:stop].tolist() for start, stop in pairs]


def slow_bags(cells, spots) -> list[list[int]]:
    return [
        [i for i, (x, y) in enumerate(cells) if (x - sx) ** 2 + (y - sy) ** 2 <= spots.radius0**2]
        for sx, sy in spots.xy0.tolist()
    ]


def test_radius_is_inclusive_and_a_cell_under_two_spots_belongs_to_both():
    spots = spots_at([[0, 0], [8, 0], [100, 100]], 5.0)
    cells = np.array([[4, 0], [3, 4], [0, 5.0001], [-5, 0], [8, 0]], np.float64)
    links = link_cells(cells, spots)
    assert bags(links) == [[0, 1, 3], [0, 4], []]
    assert bags(links) == slow_bags(cells.tolist(), spots)
    assert links.offsets.dtype == links.cell_index.dtype == np.int64
    assert links.num_cells.tolist() == [len(bag) for bag in bags(links)]


coordinate = st.integers(-40, 40).map(lambda i: i / 4)  # a grid, so that ties at the radius occur
points = st.lists(st.tuples(coordinate, coordinate), max_size=40)


@settings(max_examples=80, deadline=None)
@given(points, points, st.sampled_from([0.25, 1.25, 2.5, 5.0]))
def test_equals_a_slow_loop(cells, centres, radius0):
    spots = spots_at(centres, radius0)
    assert bags(link_cells(np.array(cells).reshape(-1, 2), spots)) == slow_bags(cells, spots)


def test_non_square_axes_are_not_swapped():
    links = link_cells(np.array([[900.0, 30.0], [30.0, 900.0]]), spots_at([[905, 32]], 10.0))
    assert bags(links) == [[0]]


def test_float32_cells_and_no_cells():
    spots = spots_at([[0, 0], [3, 3]], 2.0)
    assert bags(link_cells(np.zeros((1, 2), np.float32), spots)) == [[0], []]
    assert bags(link_cells(np.zeros((0, 2)), spots)) == [[], []]


def test_select_by_mask_and_by_index():
    rng = np.random.default_rng(0)
    spots = spots_at(rng.uniform(0, 50, (12, 2)), 6.0)
    links = link_cells(rng.uniform(0, 50, (200, 2)), spots)
    order = np.array([5, 1, 1, 9])
    assert bags(links.select(order)) == [bags(links)[i] for i in order]
    mask = links.num_cells > 2
    assert bags(links.select(mask)) == [bag for bag in bags(links) if len(bag) > 2]
    assert len(links.select(np.zeros(12, bool))) == 0


def test_order_of_spots_does_not_change_bags():
    rng = np.random.default_rng(1)
    xy0, cells = rng.uniform(0, 50, (15, 2)), rng.uniform(0, 50, (300, 2))
    order = rng.permutation(15)
    plain = bags(link_cells(cells, spots_at(xy0, 6.0)))
    assert bags(link_cells(cells, spots_at(xy0[order], 6.0))) == [plain[i] for i in order]


def test_alignment_report():
    links = Links(np.array([0, 2, 2, 5]), np.array([0, 3, 0, 1, 4]))
    report = alignment_report(links, num_cells=8)
    assert report == {
        "share_spots_with_cells": pytest.approx(2 / 3),
        "mean_cells_per_spot": pytest.approx(5 / 3),
        "share_cells_in_spots": 4 / 8,
        "share_cells_in_many_spots": 1 / 8,
    }
    assert alignment_report(Links(np.zeros(1, np.int64), np.zeros(0, np.int64)), 0) == {
        "share_spots_with_cells": 0.0,
        "mean_cells_per_spot": 0.0,
        "share_cells_in_spots": 0.0,
        "share_cells_in_many_spots": 0.0,
    }
