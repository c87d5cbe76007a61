"""Regions, specks and doubled outlines among nuclei."""

import numpy as np
import pyarrow as pa
import pytest
import shapely
from shapely import affinity

from scellst_ray.nuclei.imported.sift import find_doubled, find_impossible
from scellst_ray.nuclei.imported.table import SEGMENTATION

DISCS = [shapely.Point(100 + 40 * (i % 30), 100 + 40 * (i // 30)).buffer(14) for i in range(300)]


def table_of(polygons):
    centroids = shapely.get_coordinates(shapely.centroid(polygons))
    columns = {
        "polygon": pa.array(shapely.to_wkb(polygons), pa.binary()),
        "x0": centroids[:, 0],
        "y0": centroids[:, 1],
        "area0": shapely.area(polygons),
        "nucleus_type": pa.repeat("nucleus", len(polygons)),
        "type_prob": pa.nulls(len(polygons), pa.float32()),
    }
    return pa.table(columns, schema=SEGMENTATION)


def turned(disc):
    """Return the disc with another first vertex and the other direction."""
    points = np.array(disc.exterior.coords)[:-1]
    return shapely.Polygon(np.roll(points, 5, axis=0)[::-1])


@pytest.mark.parametrize(
    "change",
    [
        lambda disc: disc,
        turned,
        lambda disc: affinity.translate(disc, 0.7, -0.7),
        lambda disc: affinity.translate(disc, 2.5, 0),
        lambda disc: disc.buffer(1.0),
        lambda disc: disc.simplify(0.5),
        lambda disc: affinity.scale(disc, 1.15, 0.95),
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_outlines_that_are_there_again_are_doubled(change, times):
    again = [change(disc) for disc in DISCS]
    in_turn = [disc for pair in zip(DISCS, again, strict=True) for disc in pair]
    for polygons in (DISCS + again * times, in_turn):
        doubled = find_doubled(table_of(polygons), "s")
        assert doubled.sum() == len(polygons) - 300
        assert not doubled[0]  # the first in the file stays


def test_small_nuclei_that_lie_a_pixel_off_are_doubled():
    discs = [shapely.Point(20 * i, 50).buffer(4) for i in range(50)]
    again = [affinity.translate(disc, 0.9, 0) for disc in discs]
    assert find_doubled(table_of(discs + again), "s").tolist() == [False] * 50 + [True] * 50


@pytest.mark.parametrize(
    "other",
    [
        shapely.Point(128, 100).buffer(14),  # touches
        shapely.Point(116, 100).buffer(14),  # overlaps by a third of the union
        shapely.Point(107, 100).buffer(14),  # by half of it
        shapely.Point(100, 100).buffer(10),  # lies within
        shapely.Point(100, 100).buffer(30),  # lies around
    ],
)
def test_neighbours_and_nuclei_within_each_other_stay(other):
    assert not find_doubled(table_of([*DISCS[:1], other]), "s").any()


def test_a_chain_keeps_every_outline_that_differs_from_those_kept():
    chain = [affinity.translate(DISCS[0], 4.0 * i, 0) for i in range(6)]
    assert find_doubled(table_of(chain), "s").tolist() == [False, True] * 3


def test_outlines_of_all_sizes_are_compared():
    sizes = [1.1 * 1.25**i for i in range(30)]
    discs = [shapely.Point(0, 0).buffer(size) for size in sizes]
    discs = [affinity.translate(d, 4000.0 * i, 0) for i, d in enumerate(discs)]
    again = [affinity.scale(disc, 1.1, 1.1) for disc in discs]
    assert find_doubled(table_of(discs + again), "s").tolist() == [False] * 30 + [True] * 30


def test_heaps_are_refused():
    shifts = np.random.default_rng(0).uniform(-1, 1, (500, 2))
    heap = [affinity.translate(DISCS[0], *shift) for shift in shifts]
    with pytest.raises(ValueError, match=r"^s: its outlines lie on each other"):
        find_doubled(table_of(heap), "s")
    assert find_doubled(table_of(DISCS[:1] * 5000), "s").sum() == 4999


@pytest.mark.parametrize(
    ("shape", "mpp", "reason"),
    [
        (shapely.box(50, 50, 1550, 1150), 0.5, "too_large"),
        (shapely.box(50, 50, 1550, 1150), None, "too_large"),
        (shapely.box(3000, 3000, 3100, 3100), 0.5, "too_large"),  # 2,500 um2, around nothing
        (shapely.box(85, 85, 195, 155), 0.25, "too_large"),  # 481 um2, around 6 nuclei
        (shapely.box(3000, 3000, 3040, 3040), 0.5, None),  # 400 um2: a tumour cell
        (shapely.box(3000, 3000, 3064, 3064), 0.5, None),  # 1,024 um2: a megakaryocyte
        (shapely.box(85, 85, 155, 115), 0.25, None),  # lies on two others
        (shapely.box(3000, 3000, 3001.5, 3001.5), 0.5, "too_small"),
        (shapely.box(3000, 3000, 3000.5, 3000.5), None, "too_small"),
        (shapely.box(3000, 3000, 3002, 3002), 1.0, None),
    ],
)
def test_single_objects_that_cannot_be_nuclei_are_named(shape, mpp, reason):
    for place in (0, 300):
        polygons = [*DISCS[:place], shape, *DISCS[place:]]
        found = find_impossible(table_of(polygons), mpp)
        expected = {name: [place] if name == reason else [] for name in ("too_large", "too_small")}
        assert {name: np.flatnonzero(rows).tolist() for name, rows in found.items()} == expected


def test_nothing_is_sifted_from_nothing():
    empty = SEGMENTATION.empty_table()
    assert find_doubled(empty, "s").tolist() == []
    assert [rows.tolist() for rows in find_impossible(empty, 0.5).values()] == [[], []]
