"""Areas of rings, and classes of nuclei told from nuclei in pieces."""

import numpy as np
import pytest
import shapely

from scellst_ray.nuclei.imported.rings import Rings, ring_areas, split_classes
from scellst_ray.nuclei.imported.table import REASON


def rings_of(objects):
    """Return the rings of objects, each a list of outer rings."""
    rings = [ring for parts in objects for ring in parts]
    return Rings(
        np.concatenate([np.asarray(ring, float) for ring in rings]),
        np.array([len(ring) for ring in rings]),
        np.repeat(np.arange(len(objects)), [len(parts) for parts in objects]),
        np.full(len(objects), "no_outline", REASON),
        np.zeros(len(rings), np.bool_),
    )


def disc(x, y, radius=14.0, num_points=16):
    turns = np.linspace(0, 2 * np.pi, num_points + 1)
    return np.column_stack([x + radius * np.cos(turns), y + radius * np.sin(turns)])


def grid(num, pitch, **kwargs):
    side = int(np.ceil(np.sqrt(num)))
    return [disc(pitch * (i % side), pitch * (i // side), **kwargs) for i in range(num)]


def quarters(gap, radius=14.0):
    """Return a disc cut in four, the pieces `gap` px apart."""
    whole = shapely.Polygon(disc(0, 0, radius, 64))
    big = 2 * radius
    boxes = [shapely.box(x, y, x + big, y + big) for x in (gap / 2, -big - gap / 2)
             for y in (gap / 2, -big - gap / 2)]  # fmt: skip
    return [np.array(whole.intersection(box).exterior.coords) for box in boxes]


@pytest.mark.parametrize("shift", [0, 1e6])
def test_areas_are_shapelys(shift):
    rings = [disc(0, 0), disc(90, 3)[:-1], disc(5, 5)[::-1], [(0, 0), (3, 4)], [(0, 0)], disc(0, 0)]
    rings[-1][3] = np.nan
    areas = ring_areas(rings_of([[np.asarray(r, float) + shift for r in rings]]))
    expected = [shapely.Polygon(ring).area for ring in rings[:3]]
    np.testing.assert_allclose(areas, [*expected, 0, 0, 0], rtol=1e-9)


@pytest.mark.parametrize(
    "parts",
    [
        grid(2, 40),
        grid(2, 32),
        grid(2, 400),
        grid(5, 34),
        grid(9, 30),
        grid(30, 28.5),
        grid(64, 40),
        grid(65, 40),
        grid(2, 12, radius=4.0),
        [*grid(4, 40), disc(500, 0, 3.0)],
        [disc(0, 0), disc(60, 0), [(0, 0), (1, 1)]],
    ],
    ids=str,
)
def test_nuclei_that_lie_apart_are_a_class(parts):
    alone = [disc(900, 900)]
    split, source = split_classes(rings_of([alone, parts, alone]))
    assert source.tolist() == [0, *[1] * len(parts), 2]
    assert split.owner.tolist() == list(range(len(parts) + 2))
    assert len(split.missing) == len(parts) + 2


@pytest.mark.parametrize(
    "parts",
    [
        quarters(0.0),
        quarters(2.0),
        quarters(0.0)[:2],
        quarters(2.0, 40.0)[1:3],
        [disc(0, 0), disc(40, 0, 2.0)],
        [disc(0, 0), *(disc(40 + i, 0, 0.4) for i in range(80))],
        [disc(0, 0), disc(1, 1)],
        [disc(0, 0), disc(np.nan, 0)],
        [disc(0, 0, num_points=4), [(0, 0)]],
    ],
    ids=str,
)
def test_pieces_that_touch_are_a_nucleus(parts):
    split, source = split_classes(rings_of([[disc(900, 900)], parts]))
    assert source.tolist() == [0, 1]
    assert split.owner.tolist() == [0, *[1] * len(parts)]


def test_nothing_is_split_without_objects():
    none = (np.zeros(0, kind) for kind in (np.int64, np.int64, REASON, np.bool_))
    split, source = split_classes(Rings(np.zeros((0, 2)), *none))
    assert len(source) == len(split.owner) == 0
