import cv2
import numpy as np
import pytest
from scipy import ndimage

from scellst_ray.evaluation.segmentation.mask_metrics import score_labels
from scellst_ray.nuclei.hv_maps import label_packed, nuclei_from_packed, pack_maps
from scellst_ray.slides.synthetic.ideal_maps import ideal_maps

NAMES = ["background", *"abcde"]


def crowd(seed, num, side, shortest=8, longest=18):
    """Return labels of ellipses (semi-axes in px) that touch but do not overlap."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((side, side), np.int32)
    while labels.max() < num:
        axes, centre = 2 * rng.uniform(shortest, longest, 2), rng.uniform(0, side, 2)
        mask = np.zeros((side, side), np.uint8)
        cv2.ellipse(mask, (tuple(centre), tuple(axes), rng.uniform(0, 180)), 1, -1)
        if mask.sum() > 40 and not labels[mask > 0].any():
            labels[mask > 0] = labels.max() + 1
    return labels


def discs(*centres, radius, side=64):
    y, x = np.mgrid[:side, :side]
    labels = np.zeros((side, side), np.int32)
    for label, (column, row) in enumerate(centres, start=1):
        labels[(x - column) ** 2 + (y - row) ** 2 <= radius**2] = label
    return labels


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop_over_nuclei(seed):
    labels = crowd(seed, 12, 120)
    labels[labels == 5] = 0  # a label that does not occur
    types = np.random.default_rng(seed).integers(1, 6, 12)
    binary, hv, kinds = ideal_maps(labels, types, 6)
    assert all(maps.dtype == np.float32 for maps in (binary, hv, kinds))
    expected = np.zeros((2, 120, 120))
    for label in range(1, 13):
        inside = labels == label
        for channel, position in enumerate(np.nonzero(inside)[::-1]):
            if label != 5:
                away = position - position.mean()
                expected[channel, inside] = away / np.where(away < 0, -away.min(), away.max())
    np.testing.assert_allclose(hv, expected, atol=1e-6)
    assert hv.min() == -1
    assert hv.max() == 1
    np.testing.assert_array_equal(binary.argmax(axis=0), labels > 0)
    np.testing.assert_array_equal(binary[0], -binary[1])
    np.testing.assert_array_equal(kinds.argmax(axis=0), np.append(0, types)[labels])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num", "side"), [(20, 512), (85, 360)])
def test_every_nucleus_is_found_with_its_type(seed, num, side):
    labels = crowd(seed, num, side)
    types = np.random.default_rng(seed).integers(1, 6, num)
    packed = pack_maps(*ideal_maps(labels, types, 6))
    scores = score_labels(labels.astype(np.int64), label_packed(packed).astype(np.int64))
    assert scores.num_matched == scores.num_predicted == num
    nuclei = nuclei_from_packed(packed, NAMES)
    centroids = np.array(ndimage.center_of_mass(labels > 0, labels, range(1, num + 1)))
    order = np.lexsort((centroids[:, 1], centroids[:, 0]))
    np.testing.assert_allclose(nuclei.centroid_px[:, ::-1], centroids[order] + 0.5, atol=0.5)
    assert nuclei.nucleus_type.tolist() == [NAMES[kind] for kind in types[order]]


@pytest.mark.parametrize("radius", [6, 8, 12, 18])
@pytest.mark.parametrize("angle", [0, 30, 45, 90])
def test_two_that_touch_are_separated(radius, angle):
    turn = np.deg2rad(angle)
    across = (2 * radius - 0.5) * np.array([np.cos(turn), np.sin(turn)])
    middle = np.array([48.2, 47.6])
    labels = discs(middle - across / 2, middle + across / 2, radius=radius, side=96)
    assert ndimage.label(labels, np.ones((3, 3)))[1] == 1
    found = label_packed(pack_maps(*ideal_maps(labels, np.array([1, 2]), 6)))
    assert score_labels(labels.astype(np.int64), found.astype(np.int64)).num_matched == 2
    assert found.max() == 2
    np.testing.assert_array_equal(found > 0, labels > 0)


def test_jitter_moves_edges_by_about_its_px():
    labels = discs((100, 100), radius=80, side=200)
    edge = ndimage.distance_transform_edt(labels) - ndimage.distance_transform_edt(labels == 0)
    for jitter in (0.3, 0.6, 1.0):
        rng = np.random.default_rng(1)
        binary, hv, kinds = ideal_maps(labels, np.array([2]), 6, jitter=jitter, rng=rng)
        moved = (binary.argmax(axis=0) > 0) != (labels > 0)
        # The mean of the absolute value of a normal is 0.8 of its standard deviation.
        assert moved.sum() / (2 * np.pi * 80) == pytest.approx(0.8 * jitter, rel=0.35)
        assert np.abs(edge[moved]).max() < 6
        smooth = ideal_maps(labels, np.array([2]), 6)[1]
        assert (hv - smooth).std() == pytest.approx(0.05 * jitter, rel=0.1)
        other = (kinds.argmax(axis=0) != 2)[edge > 8].mean()
        assert other == pytest.approx(0.05 * jitter * 5 / 6, rel=0.2)


def test_jitter_is_repeatable_and_differs_between_draws():
    labels, types = crowd(1, 10, 128), np.ones(10, np.int64)
    first = ideal_maps(labels, types, 6, jitter=1, rng=np.random.default_rng(7))
    again = ideal_maps(labels, types, 6, jitter=1, rng=np.random.default_rng(7))
    rng = np.random.default_rng(8)
    other = ideal_maps(labels, types, 6, jitter=1, rng=rng)
    for one, two, three in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, two)
        assert (one != three).any()
    found = [label_packed(pack_maps(*maps)) for maps in (first, other)]
    assert found[0].max() == found[1].max() == 10
    assert (found[0] != found[1]).any()


def test_a_line_a_pixel_and_nothing():
    labels = np.zeros((20, 30), np.uint8)
    labels[3, 4:9] = 1
    labels[10, 10] = 2
    _, hv, _ = ideal_maps(labels, np.array([1, 1]), 2)
    np.testing.assert_allclose(hv[0, 3, 4:9], [-1, -0.5, 0, 0.5, 1])
    assert not hv[1].any()
    assert hv[0, 10, 10] == 0
    binary, hv, kinds = ideal_maps(np.zeros((5, 6), np.int32), np.zeros(0, np.int64), 3)
    assert not hv.any()
    assert (binary[0] > binary[1]).all()
    assert (kinds.argmax(axis=0) == 0).all()


@pytest.mark.parametrize(
    ("labels", "types", "options", "message"),
    [
        (np.full((4, 4), 3), [1, 1], {}, "labels 0 to 3"),
        (np.full((4, 4), -1), [1, 1], {}, "labels -1 to 0"),
        (np.zeros(4, int), [1], {}, "expected \\[H, W\\]"),
        (np.ones((4, 4), int), [6], {}, "types range from 6 to 6"),
        (np.ones((4, 4), int), [-1], {}, "types range from -1"),
        (np.ones((4, 4), int), [1], {"jitter": -1.0}, "jitter is -1.0"),
    ],
)
def test_wrong_input_is_refused(labels, types, options, message):
    with pytest.raises(ValueError, match=message):
        ideal_maps(labels, np.array(types), 6, **options)
