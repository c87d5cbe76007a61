"""From a network's maps to CELLS at slide scale: every nucleus once, at any resolution.

The maps are made from the truth, so that everything but the network is tested: tiling,
resampling, post-processing, ownership, seams, coordinates.
"""

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from scipy.spatial import cKDTree

from scellst_ray.slides.synthetic.slide import SyntheticConfig, write_synthetic_slide
from scellst_ray.stages.plan_slide import plan_slide
from tests.support.true_tiles import (
    TYPES,
    Truth,
    counted,
    discs,
    run_slide,
    square_of_tiles,
    truth_spec,
)

MPPS = (0.25, 0.31, 0.4537, 0.5, 0.70)


@pytest.fixture(scope="module")
def slide_spec():
    return truth_spec()


@pytest.fixture(scope="module", params=MPPS, ids=str)
def slide_at(request, tmp_path_factory):
    """Return a small synthetic slide at each resolution, and its truth."""
    config = SyntheticConfig(
        seed=5, width_um=230.0, height_um=200.0, mpp=request.param, num_genes=4
    )
    slide = write_synthetic_slide(tmp_path_factory.mktemp("slide"), config)
    table = pq.read_table(slide.truth)
    names = sorted(set(table["nucleus_type"].to_pylist()))
    types = np.array([1 + names.index(name) for name in table["nucleus_type"].to_pylist()])
    return slide, shapely.from_wkb(table["polygon"].to_pylist()), types


def test_every_nucleus_once_within_a_pixel_at_any_resolution(
    tmp_path, slide_at, slide_spec, helpers
):
    slide, polygons, types = slide_at
    rows = plan_slide(helpers.slide_row(slide.slide), slide_spec)
    assert len(rows) >= 6
    mpp, read_mpp = rows[0]["mpp"], rows[0]["read_mpp"]
    assert read_mpp == (mpp if mpp <= 0.3 else 0.25)
    record, cells = run_slide(tmp_path, rows, Truth(polygons, types), slide_spec)
    # A nucleus cut by the border of the scan has another centroid than the whole nucleus.
    image = shapely.box(0, 0, record["width0"], record["height0"])
    visible = shapely.intersection(polygons, image)
    seen = shapely.area(visible) * mpp**2 > 2
    visible, types = visible[seen], types[seen]
    assert len(cells) == len(visible) > 40
    assert counted(cells, visible, limit0=1.0) == (0, 0)
    centroids = shapely.get_coordinates(shapely.centroid(visible))
    found = np.stack([cells["x0"], cells["y0"]], axis=1)
    _, nearest = cKDTree(centroids).query(found)
    assert np.abs(found - centroids[nearest]).max() <= 1.0
    assert np.abs((found - centroids[nearest]).mean(axis=0)).max() < 0.1 * read_mpp / mpp
    assert [TYPES[k] for k in types[nearest]] == cells["nucleus_type"].to_pylist()
    areas = shapely.area(visible)[nearest] * mpp**2
    np.testing.assert_allclose(cells["area_um2"], areas, rtol=0.15, atol=1.0)


@pytest.mark.parametrize(
    ("radii0", "num"), [((8, 18), 150), ((30, 60), 18)], ids=["usual", "wider than the halo"]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_nucleus_is_lost_or_doubled_along_seams(tmp_path, slide_spec, radii0, num, seed):
    polygons = discs(seed, num, radii0)
    truth = Truth(polygons, 1 + np.arange(num) % 5)
    record, cells = run_slide(tmp_path, square_of_tiles(slide_spec), truth, slide_spec)
    # No tile may hold all of a nucleus wider than the halo: it is still one nucleus.
    whole = radii0[1] < slide_spec.halo_px
    limit0 = 1.0 if whole else radii0[1]
    assert counted(cells, polygons, limit0) == (0, 0)
    assert len(cells) == num
    if whole:
        assert record["seams"] == {"doubled": 0, "adopted": 0}


def test_a_network_that_jitters_loses_and_doubles_next_to_nothing(tmp_path, slide_spec):
    lost = extra = total = owned_twice = 0
    for seed in range(4):
        polygons = discs(seed, 150, (8, 18))
        truth = Truth(polygons, 1 + np.arange(150) % 5, jitter=1.0)
        record, cells = run_slide(
            tmp_path / str(seed), square_of_tiles(slide_spec), truth, slide_spec
        )
        missed, more = counted(cells, polygons, limit0=8.0)
        lost, extra, total = lost + missed, extra + more, total + len(polygons)
        owned_twice += record["seams"]["doubled"] + record["seams"]["adopted"]
    print(f"{total} nuclei, {lost} lost, {extra} doubled; {owned_twice} settled at seams")
    assert lost + extra <= 0.005 * total
