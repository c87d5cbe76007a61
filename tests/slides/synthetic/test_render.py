import dataclasses

import numpy as np
import pytest
import shapely

from scellst_ray.core.geometry import Box
from scellst_ray.slides.synthetic import slide as synthetic
from scellst_ray.slides.synthetic.layout import SyntheticNuclei
from scellst_ray.slides.synthetic.render import SlidePainter
from tests.support.small_tissue import SMALL


def _outside(tissue, points_um):
    """Return which points lie in no nucleus."""
    polygons = shapely.STRtree(shapely.polygons(tissue.layout.nuclei.outline_um))
    hit = polygons.query(shapely.points(points_um), predicate="intersects")[0]
    return ~np.isin(np.arange(len(points_um)), hit)


def test_a_region_has_the_pixels_of_the_whole(tissue, image):
    for box in (Box(0, 0, 40, 30), Box(500, 505, 70, 20), Box(1279, 839, 1, 1)):
        region = synthetic.render_region(tissue, box)
        expected = image[box.y0 : box.y0 + box.h0, box.x0 : box.x0 + box.w0]
        np.testing.assert_array_equal(region, expected)
    with pytest.raises(ValueError, match="beyond the slide"):
        synthetic.render_region(tissue, Box(1270, 0, 20, 20))


def test_nuclei_are_dark_where_the_polygons_are(tissue, image):
    y, x = np.random.default_rng(0).integers(0, image.shape[:2], (40_000, 2)).T
    points_um = (np.stack([x, y], axis=1) + 0.5) * SMALL.mpp
    density = -np.log(np.maximum(image[y, x], 1) / 243.0).sum(axis=1)
    outside = _outside(tissue, points_um)
    edge_um = tissue.layout.edge_um.at(points_um)
    ground = density[outside & (edge_um > 10)].mean()
    assert density[~outside].mean() > 1.6 * ground
    background = image[y, x][edge_um < -10]
    assert len(background) > 0.2 * len(x)
    assert (background.mean(axis=0) > 235).all()
    assert 0.3 < background.std() < 5


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("mpp", [0.25, 0.687])
def test_a_lone_nucleus_lies_where_its_polygon_is(kind, mpp):
    config = dataclasses.replace(SMALL, mpp=mpp)
    layout = synthetic.make_tissue(config).layout
    index = int(np.flatnonzero(layout.nuclei.type_index == kind)[0])
    x0, y0 = layout.nuclei.centroid_um[index] / mpp

    def painted(chosen):
        columns = dataclasses.asdict(layout.nuclei)
        nuclei = SyntheticNuclei(**{name: values[chosen] for name, values in columns.items()})
        box = Box(int(x0) - 60, int(y0) - 60, 120, 120)
        region = SlidePainter(dataclasses.replace(layout, nuclei=nuclei)).region(box)
        return -np.log(region.sum(axis=2) / 730.0), box

    bare, box = painted([])
    alone, _ = painted([index])
    darker = alone - bare
    half_the_px = int(layout.nuclei.area_um2[index] / mpp**2 / 2)
    mask = darker > 0.5 * np.median(np.sort(darker.ravel())[-half_the_px:])
    row, column = np.nonzero(mask)
    assert column.mean() + 0.5 + box.x0 == pytest.approx(x0, abs=0.5)
    assert row.mean() + 0.5 + box.y0 == pytest.approx(y0, abs=0.5)
    assert mask.sum() * mpp**2 == pytest.approx(layout.nuclei.area_um2[index], rel=0.15)
