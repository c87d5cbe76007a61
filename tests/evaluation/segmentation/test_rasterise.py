"""Rasterised outlines equal a point-in-polygon test of every pixel centre."""

import numpy as np
import pytest
import shapely
from scipy import ndimage

from scellst_ray.core.geometry import Frame
from scellst_ray.evaluation.segmentation.rasterise import rasterise
from scellst_ray.nuclei.instances import nuclei_from_labels

ONE = Frame(0, 0, 1, 1)


def slow_twin(polygons, height, width):
    """Return the label map from shapely's test of every pixel centre."""
    labels = np.zeros((height, width), np.int32)
    y, x = np.mgrid[:height, :width] + 0.5
    for number, polygon in enumerate(polygons, start=1):
        labels[shapely.contains_xy(polygon, x, y)] = number
    return labels


def random_polygon(rng, centre, size):
    """Return a star-shaped polygon with corners at random places, sometimes with a hole."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 12)))
    corners = np.stack([np.cos(angle), np.sin(angle)], axis=1) * rng.uniform(
        0.4, 1, (len(angle), 1)
    )
    polygon = shapely.Polygon(centre + size * corners).buffer(0)
    if rng.random() < 0.4:
        polygon = polygon.difference(shapely.Point(*centre).buffer(size / 4))
    return polygon


@pytest.mark.parametrize("seed", range(10))
def test_equals_the_twin_for_any_polygons(seed):
    rng = np.random.default_rng(seed)
    # Outlines reach beyond all edges of the map and overlap; some have several parts.
    polygons = [
        random_polygon(rng, rng.uniform(-5, 65, 2), rng.uniform(0.3, 15)) for _ in range(40)
    ]
    polygons[3] = polygons[3].union(random_polygon(rng, np.array([10.0, 50.0]), 6))
    found = rasterise(np.array(polygons, object), 60, 50)
    np.testing.assert_array_equal(found, slow_twin(polygons, 60, 50))
    assert found.dtype == np.int32


@pytest.mark.parametrize("seed", range(5))
def test_outlines_of_a_label_map_give_it_back(seed):
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(80, 90)), 2)
    labels, num = ndimage.label(noise > 0.03, np.ones((3, 3)))
    labels = ndimage.grey_dilation(labels, 3) * (noise > 0)  # nuclei that touch
    # An outline holds one part, with holes filled.
    for label in range(1, num + 1):
        parts, count = ndimage.label(labels == label, np.ones((3, 3)))
        if count > 1:
            sizes = np.bincount(parts.ravel())[1:]
            labels[(parts > 0) & (parts != sizes.argmax() + 1)] = 0
        holes = ndimage.binary_fill_holes(labels == label) & (labels != label)
        labels[holes] = label
    nuclei = nuclei_from_labels(labels)
    polygons = shapely.from_wkb(nuclei.polygon_wkb(ONE))
    found = rasterise(polygons, 80, 90)
    np.testing.assert_array_equal(found > 0, labels > 0)
    # The nuclei are the same, with other numbers.
    pairs = np.unique(np.stack([labels.ravel(), found.ravel()]), axis=1)
    assert pairs.shape[1] == len(nuclei) + 1 == len(np.unique(labels))
    y, x = np.nonzero(found == 1)
    np.testing.assert_allclose([x.mean() + 0.5, y.mean() + 0.5], nuclei.centroid_px[0])


def test_scaling_there_and_back_changes_nothing():
    labels = np.zeros((40, 40), np.int32)
    labels[5:14, 7:19], labels[20:31, 3:9], labels[14, 10] = 1, 2, 1
    nuclei = nuclei_from_labels(labels)
    frame = Frame(1000.0, -70.0, 2.2, 2.2)  # as an annotation at 0.55 of a slide at 0.25
    moved = shapely.transform(shapely.from_wkb(nuclei.polygon_wkb(frame)), frame.from_level0)
    np.testing.assert_array_equal(rasterise(moved, 40, 40) > 0, labels > 0)


def test_neighbours_share_no_pixel_and_leave_none():
    # An edge through pixel centres: intervals are half-open, so one of two neighbours has them.
    left, right = shapely.box(0, 0, 4.5, 10), shapely.box(4.5, 0, 10, 10)
    upper, lower = shapely.box(0, 0, 10, 3.5), shapely.box(0, 3.5, 10, 10)
    assert (np.bincount(rasterise(np.array([left, right]), 10, 10).ravel()) == [0, 40, 60]).all()
    assert (np.bincount(rasterise(np.array([upper, lower]), 10, 10).ravel()) == [0, 30, 70]).all()


def test_later_outlines_are_on_top_and_tiny_ones_have_no_pixel():
    polygons = np.array(
        [shapely.box(0, 0, 6, 6), shapely.box(2, 2, 4, 4), shapely.box(5, 5, 5.4, 9)]
    )
    found = rasterise(polygons, 6, 6)
    assert np.bincount(found.ravel()).tolist() == [0, 32, 4]
    assert (found[2:4, 2:4] == 2).all()


@pytest.mark.parametrize(
    "polygons",
    [[], [shapely.Polygon()], [shapely.box(-9, -9, -1, -1), shapely.box(20, 0, 30, 9)]],
)
def test_nothing_to_draw(polygons):
    assert not rasterise(np.array(polygons, object), 8, 9).any()
