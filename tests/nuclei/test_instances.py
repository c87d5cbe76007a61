import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from scellst_ray.core.geometry import Frame
from scellst_ray.nuclei.instances import empty_nuclei, nuclei_from_labels

IDENTITY = Frame(0, 0, 1, 1)
EIGHT = np.ones((3, 3))


def _disc_grid(num, radius, pitch):
    """Return a square map of discs on a grid, labels 1..num^2 by row."""
    size = num * pitch
    y, x = np.mgrid[:size, :size]
    inside = (y % pitch - pitch // 2) ** 2 + (x % pitch - pitch // 2) ** 2 <= radius**2
    return np.where(inside, (y // pitch) * num + x // pitch + 1, 0)


def _blobs(seed, sigma):
    noise = np.random.default_rng(seed).random((30, 40))
    smooth = ndimage.gaussian_filter(noise, sigma) if sigma else noise
    return ndimage.label(smooth > np.quantile(smooth, 0.7), structure=EIGHT)[0]


def _polygons(nuclei, frame=IDENTITY):
    """Return the result of polygon_wkb, slowly: one shapely polygon at a time."""
    polygons = []
    for i in range(len(nuclei)):
        start, stop = nuclei.contour_offsets[i : i + 2]
        points = [
            (frame.origin_x0 + x * frame.ratio_x, frame.origin_y0 + y * frame.ratio_y)
            for x, y in nuclei.contour_points_px[start:stop]
        ]
        polygons.append(shapely.Polygon(points))
    return polygons


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([0, 0.7, 1.5]))
def test_every_column_equals_a_scan_of_the_whole_map_per_nucleus(seed, sigma):
    labels_HW = _blobs(seed, sigma)
    nuclei = nuclei_from_labels(labels_HW)
    rows = []
    for label in range(1, labels_HW.max() + 1):
        mask = labels_HW == label
        y, x = np.nonzero(mask)
        filled = ndimage.binary_fill_holes(mask).sum()
        rows.append((y.mean() + 0.5, x.mean() + 0.5, len(y), filled))
    rows.sort()
    expected = np.array(rows)
    np.testing.assert_allclose(nuclei.centroid_px, expected[:, [1, 0]])
    np.testing.assert_array_equal(nuclei.area_px, expected[:, 2])
    polygons = _polygons(nuclei)
    assert shapely.is_valid(polygons).all()
    np.testing.assert_allclose(shapely.area(polygons), expected[:, 3] - 0.5)
    assert np.diff(nuclei.contour_offsets).min() >= 4


@pytest.mark.parametrize("radius", [3, 6, 12])
def test_disc_outline_has_the_disc_s_area_and_centre(radius):
    nuclei = nuclei_from_labels(_disc_grid(1, radius, 31))
    (polygon,) = _polygons(nuclei)
    assert polygon.area == pytest.approx(np.pi * radius**2, rel=0.06)
    assert polygon.area == pytest.approx(nuclei.area_px[0], abs=0.51)
    assert (polygon.centroid.x, polygon.centroid.y) == pytest.approx((15.5, 15.5))
    assert polygon.bounds == pytest.approx((15 - radius, 15 - radius, 16 + radius, 16 + radius))


def test_single_pixel_is_a_diamond_in_its_pixel():
    labels_HW = np.zeros((5, 6), np.uint16)
    labels_HW[2, 3] = 9
    nuclei = nuclei_from_labels(labels_HW, nucleus_type="Inflammatory")
    assert nuclei.centroid_px.tolist() == [[3.5, 2.5]]
    points = {tuple(point) for point in nuclei.contour_points_px.tolist()}
    assert points == {(3.0, 2.5), (3.5, 2.0), (4.0, 2.5), (3.5, 3.0)}
    assert nuclei.nucleus_type.tolist() == ["Inflammatory"]
    assert np.isnan(nuclei.type_prob).all()


def test_outline_of_a_broken_nucleus_is_its_largest_part():
    labels_HW = np.zeros((20, 20), np.int64)
    labels_HW[1:3, 1:3] = 4
    labels_HW[8:16, 8:16] = 4
    nuclei = nuclei_from_labels(labels_HW)
    assert nuclei.area_px.tolist() == [68]
    assert nuclei.contour_points_px.min() == 8
    assert nuclei.contour_points_px.max() == 16


def test_order_is_by_y_then_x_whatever_the_labels():
    labels_HW = np.zeros((10, 10), np.int32)
    for (y, x), label in {(1, 8): 5, (1, 2): 9, (7, 4): 1}.items():
        labels_HW[y, x] = label
    centroids = nuclei_from_labels(labels_HW).centroid_px.tolist()
    assert centroids == [[2.5, 1.5], [8.5, 1.5], [4.5, 7.5]]


def test_labels_far_apart_cost_nothing():
    labels_HW = np.array([[2_000_000_000, 0, 7]])
    assert len(nuclei_from_labels(labels_HW)) == 2


def test_take_reorders_every_column():
    nuclei = nuclei_from_labels(_blobs(3, 1.5))
    index = np.random.default_rng(0).permutation(len(nuclei))[:-1]
    taken = nuclei.take(index)
    assert len(taken) == len(index)
    for new, old in enumerate(index):
        np.testing.assert_array_equal(
            np.split(taken.contour_points_px, taken.contour_offsets[1:-1])[new],
            np.split(nuclei.contour_points_px, nuclei.contour_offsets[1:-1])[old],
        )
    np.testing.assert_array_equal(taken.centroid_px, nuclei.centroid_px[index])
    np.testing.assert_array_equal(taken.area_px, nuclei.area_px[index])
    assert len(nuclei.take(np.zeros(0, np.int64))) == 0


def test_wkb_is_the_closed_outline_in_level_0_px():
    nuclei = nuclei_from_labels(_blobs(5, 1.5))
    frame = Frame(1000.5, -20, 2.0, 4.0)
    wkb = nuclei.polygon_wkb(frame)
    assert all(isinstance(one, bytes) for one in wkb)
    expected = _polygons(nuclei, frame)
    assert shapely.equals_exact(shapely.from_wkb(wkb), expected).all()
    areas = [polygon.area for polygon in _polygons(nuclei)]
    np.testing.assert_allclose(shapely.area(expected), np.array(areas) * frame.area_ratio)


def test_scaled_is_the_frame_s_ratio():
    nuclei = nuclei_from_labels(_disc_grid(2, 5, 16))
    scaled = nuclei.resize(2.0, 3.0)
    np.testing.assert_allclose(scaled.area_px, nuclei.area_px * 6)
    np.testing.assert_allclose(scaled.centroid_px, nuclei.centroid_px * (2, 3))
    assert (scaled.polygon_wkb(IDENTITY) == nuclei.polygon_wkb(Frame(0, 0, 2, 3))).all()


def test_no_nuclei():
    for nuclei in (empty_nuclei(), nuclei_from_labels(np.zeros((0, 4), np.int32))):
        assert len(nuclei) == 0
        assert len(nuclei.polygon_wkb(IDENTITY)) == 0
        assert len(nuclei.take(np.zeros(0, np.int64))) == 0
        assert nuclei.contour_offsets.tolist() == [0]
        assert nuclei.type_prob.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint64])
def test_gaps_between_labels_change_nothing(dtype):
    labels_HW = np.minimum(_blobs(4, 1.5), 40)
    nuclei = nuclei_from_labels(labels_HW)
    gaps = nuclei_from_labels((3 * labels_HW).astype(dtype))
    np.testing.assert_array_equal(gaps.contour_points_px, nuclei.contour_points_px)
    np.testing.assert_array_equal(gaps.centroid_px, nuclei.centroid_px)


def test_names_and_probabilities_go_with_their_labels():
    labels_HW = np.zeros((10, 10), np.int32)
    for (y, x), label in {(1, 8): 5, (1, 2): 9, (7, 4): 1}.items():
        labels_HW[y, x] = label
    names, share = np.array(["one", "five", "nine"]), np.array([0.1, 0.5, 0.9], np.float32)
    nuclei = nuclei_from_labels(labels_HW, names, share)
    assert nuclei.nucleus_type.tolist() == ["nine", "five", "one"]
    np.testing.assert_array_equal(nuclei.type_prob, share[::-1])


def test_lines_may_be_dropped():
    labels_HW = np.zeros((12, 20), np.int32)
    labels_HW[0, 0] = 1
    labels_HW[2, 1:9] = 2
    labels_HW[3:8, 12] = 3
    labels_HW[[5, 6, 7], [2, 3, 4]] = 4
    labels_HW[9, 1:5] = 5
    labels_HW[10, 4] = 5  # a bent line has three points
    labels_HW[9:12, 9:12] = 6
    assert len(nuclei_from_labels(labels_HW)) == 6
    kept = nuclei_from_labels(labels_HW, drop_lines=True)
    assert kept.area_px.tolist() == [5, 9]


def test_boxes_are_those_of_the_pixels():
    labels_HW = _blobs(6, 0.7)
    nuclei = nuclei_from_labels(labels_HW)
    expected = [
        (columns.start, rows.start, columns.stop, rows.stop)
        for rows, columns in ndimage.find_objects(labels_HW)
    ]
    assert nuclei.boxes_px().dtype == np.int64
    assert sorted(map(tuple, nuclei.boxes_px().tolist())) == sorted(expected)
    assert empty_nuclei().boxes_px().shape == (0, 4)
    larger = nuclei.resize(2.0, 3.0).boxes_px()
    np.testing.assert_array_equal(larger, nuclei.boxes_px() * [2, 3, 2, 3])


@pytest.mark.parametrize(
    ("labels_HW", "message"),
    [
        (np.zeros((3, 3)), "integer label map"),
        (np.zeros(3, int), "integer label map"),
        (np.full((2, 2), -3), "label -3"),
    ],
)
def test_wrong_maps_are_refused(labels_HW, message):
    with pytest.raises(ValueError, match=message):
        nuclei_from_labels(labels_HW)
