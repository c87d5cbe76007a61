import cv2
import numpy as np
import pytest
from scipy.spatial import cKDTree
from skimage.color import rgb2hed

from scellst_ray.evaluation.segmentation.mask_metrics import score_labels
from scellst_ray.nuclei import hematoxylin
from scellst_ray.nuclei.hematoxylin import segment, segment_labels
from tests.support.paths import SHARED

DATA = SHARED / "data"
EOSIN_RGB = (232, 180, 205)


def _tissue(seed, size_um=200.0, mpp=0.5, pitch_um=20.0):
    """Return an image of round dark, large pale and elongated nuclei on eosin, and its labels."""
    rng = np.random.default_rng(seed)
    side = round(size_um / mpp)
    fine = 4  # drawn at four times the resolution, then averaged like an optical system does
    canvas_HWC = np.full((side * fine, side * fine, 3), EOSIN_RGB, np.uint8)
    labels_HW = np.zeros((side, side), np.int32)
    kinds = [((6.5, 6.5), (70, 50, 120)), ((13, 10), (150, 110, 175)), ((14, 4.5), (95, 65, 140))]
    centres_um = np.arange(pitch_um / 2, size_um, pitch_um)
    centres_um = np.stack(np.meshgrid(centres_um, centres_um), axis=-1).reshape(-1, 2)
    for label, centre_um in enumerate(centres_um + rng.uniform(-2, 2, centres_um.shape), start=1):
        axes_um, colour = kinds[rng.integers(3)]
        angle = rng.uniform(0, 180)
        for canvas, scale, value in (
            (canvas_HWC, fine / mpp, colour),
            (labels_HW, 1 / mpp, label),
        ):
            middle, axes = centre_um * scale - 0.5, np.array(axes_um) * scale
            cv2.ellipse(canvas, (tuple(middle), tuple(axes), angle), value, -1)
    image_HWC = cv2.resize(canvas_HWC, (side, side), interpolation=cv2.INTER_AREA)
    blurred_HWC = cv2.GaussianBlur(image_HWC, (0, 0), 0.4 / mpp).astype(np.float64)
    noisy_HWC = blurred_HWC + rng.normal(0, 4, image_HWC.shape)
    return np.clip(noisy_HWC, 0, 255).astype(np.uint8), labels_HW


@pytest.mark.parametrize("mpp", [0.2, 0.25, 0.5, 0.687, 1.0])
def test_clean_tissue_is_found_at_any_resolution(mpp):
    image_HWC, true_HW = _tissue(seed=1, mpp=mpp)
    scores = score_labels(true_HW, segment_labels(image_HWC, mpp))
    assert scores.precision >= 0.95
    assert scores.recall >= 0.95


def test_outlines_centroids_and_areas_are_in_px_of_the_image_given():
    image_HWC, true_HW = _tissue(seed=2, mpp=0.25)
    nuclei = segment(image_HWC, 0.25)
    labels_HW = segment_labels(image_HWC, 0.25)
    assert len(nuclei) == len(np.unique(labels_HW)) - 1
    assert set(nuclei.nucleus_type) == {"nucleus"}
    assert np.isnan(nuclei.type_prob).all()
    assert nuclei.area_px.sum() == pytest.approx(np.count_nonzero(labels_HW), rel=0.02)
    labels = np.unique(true_HW)[1:]
    truth = np.array([np.argwhere(true_HW == k).mean(axis=0)[::-1] + 0.5 for k in labels])
    distance_px, _ = cKDTree(nuclei.centroid_px).query(truth)
    assert np.median(distance_px) * 0.25 < 0.25  # um
    assert nuclei.contour_points_px.min() >= 0
    assert nuclei.contour_points_px.max() <= image_HWC.shape[0]


def test_touching_nuclei_are_split():
    image_HWC = np.full((80, 80, 3), EOSIN_RGB, np.uint8)
    for x in (32, 47):  # discs of 8 um, centres 7.5 um apart: less than two radii
        cv2.circle(image_HWC, (x, 40), 8, (70, 50, 120), -1)
    nuclei = segment(cv2.GaussianBlur(image_HWC, (0, 0), 0.8), 0.5)
    np.testing.assert_allclose(nuclei.centroid_px, [[32.5, 40.5], [47.5, 40.5]], atol=1.0)


@pytest.mark.parametrize("mpp", [0.1, 0.25, 0.5, 1.2])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 3), (7, 40), (200, 200)])
@pytest.mark.parametrize("colour", [(255,) * 3, (0,) * 3, (128,) * 3, EOSIN_RGB, (70, 50, 120)])
def test_uniform_images_hold_no_nuclei(shape, colour, mpp):
    image_HWC = np.full((*shape, 3), colour, np.uint8)
    assert len(segment(image_HWC, mpp)) == 0
    assert segment_labels(image_HWC, mpp).shape == shape


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("colour", [(245, 244, 246), EOSIN_RGB])
def test_noise_holds_no_nuclei(seed, colour):
    noise = np.random.default_rng(seed).normal(0, 5, (256, 256, 3))
    image_HWC = np.clip(noise + colour, 0, 255).astype(np.uint8)
    assert len(segment(image_HWC, 0.5)) == 0


@pytest.mark.parametrize("ink", [(15, 15, 15), (20, 130, 60), (30, 50, 190), (200, 30, 40)])
def test_pen_marks_hold_no_nuclei(ink):
    image_HWC = np.full((300, 300, 3), 245, np.uint8)
    cv2.line(image_HWC, (-10, 30), (310, 260), ink, 60)
    image_HWC = cv2.GaussianBlur(image_HWC, (0, 0), 2)
    assert len(segment(image_HWC, 0.5)) == 0


def test_random_pixels_do_not_crash_and_are_deterministic():
    image_HWC = np.random.default_rng(0).integers(0, 256, (64, 70, 3)).astype(np.uint8)
    first, second = segment(image_HWC, 0.4), segment(image_HWC.copy(), 0.4)
    np.testing.assert_array_equal(first.contour_points_px, second.contour_points_px)


def test_neighbouring_tiles_agree_on_nuclei_near_their_seam():
    image_HWC, _ = _tissue(seed=3, size_um=360)
    halo, seam = 32, 360  # px; a tile sees its core and 16 um more
    left = segment(np.ascontiguousarray(image_HWC[:, : seam + halo]), 0.5).centroid_px
    right = segment(np.ascontiguousarray(image_HWC[:, seam - halo :]), 0.5).centroid_px
    right += np.array([seam - halo, 0])
    owned = np.concatenate([left[left[:, 0] < seam], right[right[:, 0] >= seam]])
    whole = segment(image_HWC, 0.5).centroid_px
    distance_px, index = cKDTree(owned).query(whole)
    assert len(owned) == len(whole)
    assert distance_px.max() < 2
    assert len(set(index)) == len(whole)


def test_hematoxylin_is_the_colour_deconvolution_of_scikit_image():
    image_HWC, _ = _tissue(seed=4, size_um=50)
    ours_HW = hematoxylin._hematoxylin(hematoxylin._DENSITY[image_HWC])
    # The reference uses natural logarithms over -log(1e-6) and clips; ours adds 1 to each value.
    theirs_HW = rgb2hed(image_HWC)[..., 0]
    assert np.corrcoef(ours_HW.ravel(), theirs_HW.ravel())[0, 1] > 0.99


def _threshold_of(image_HWC, mpp):
    """Return the hematoxylin OD that separates nuclei from the rest, as `segment` computes it."""
    density_HWC = hematoxylin._DENSITY[image_HWC]
    stain_HW = hematoxylin._blur(hematoxylin._hematoxylin(density_HWC), hematoxylin._SIGMA_UM / mpp)
    return hematoxylin._threshold(stain_HW, hematoxylin._tissue(density_HWC))


def test_threshold_separates_nuclei_from_eosin():
    image_HWC, true_HW = _tissue(seed=5)
    threshold = _threshold_of(image_HWC, 0.5)
    stain_HW = hematoxylin._hematoxylin(hematoxylin._DENSITY[image_HWC])
    assert np.median(stain_HW[true_HW == 0]) < threshold < np.median(stain_HW[true_HW > 0])
    assert _threshold_of(np.full((9, 9, 3), 255, np.uint8), 0.5) == np.inf


def _climb(height_HW, y, x, radius):
    """Return the end of the steepest ascent from one pixel, followed step by step."""
    near = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    reach = range(-int(radius), int(radius) + 1)
    wide = [(dy, dx) for dy in reach for dx in reach if dy * dy + dx * dx <= radius * radius]
    while True:
        for steps in (near, wide):
            places = [(y + dy, x + dx) for dy, dx in steps]
            places = [
                p for p in places if 0 <= p[0] < len(height_HW) and 0 <= p[1] < len(height_HW)
            ]
            best = max(places, key=lambda p: height_HW[p])  # the first among equals
            if best != (y, x):
                break
        if best == (y, x):
            return best
        y, x = best


def test_cut_leads_every_pixel_up_to_its_peak():
    noise_HW = np.random.default_rng(6).normal(size=(48, 48)).astype(np.float32)
    mask_HW = (cv2.GaussianBlur(noise_HW, (0, 0), 3) > 0).astype(np.uint8)
    labels_HW = hematoxylin._cut(mask_HW, 0.5)
    depth_HW = cv2.GaussianBlur(
        cv2.distanceTransform(mask_HW, cv2.DIST_L2, 5), (0, 0), 1, borderType=cv2.BORDER_REFLECT
    )
    depth_HW[mask_HW == 0] = -1
    ends = {(y, x): _climb(depth_HW, y, x, 4) for y, x in zip(*np.nonzero(mask_HW), strict=True)}
    np.testing.assert_array_equal(labels_HW > 0, mask_HW > 0)
    order = {end: k for k, end in enumerate(sorted(set(ends.values())), start=1)}
    assert {place: int(labels_HW[place]) for place in ends} == {
        p: order[e] for p, e in ends.items()
    }


@pytest.mark.parametrize(("apart", "parts"), [(8, 1), (24, 2)])
def test_rejoining_undoes_cuts_through_convex_shapes_only(apart, parts):
    labels_HW = np.zeros((50, 80), np.int32)
    for x in (28, 28 + apart):  # discs of radius 14: solidity 0.98 and 0.89
        cv2.circle(labels_HW, (x, 25), 14, 1, -1)
    labels_HW[:, 28 + apart // 2 :] *= 2
    assert len(np.unique(hematoxylin._rejoin(labels_HW))) == parts + 1


def test_refining_ends_half_way_between_inside_and_surroundings():
    y, x = np.mgrid[:60, :60]
    edge_px = np.hypot(x - 30, y - 30) - 12  # a disc of radius 12 with an edge of 4 px
    stain_HW = (0.1 + 0.6 * np.clip(0.5 - edge_px / 4, 0, 1)).astype(np.float32)
    labels_HW = 7 * (edge_px < 3).astype(np.int32)
    for _ in range(2):
        labels_HW, contrast_N = hematoxylin._refine(labels_HW, stain_HW, 0.5)
    assert np.count_nonzero(labels_HW) == pytest.approx(np.pi * 12**2, rel=0.08)
    assert set(np.unique(labels_HW)) == {0, 7}
    assert 0.4 < contrast_N[7] < 0.6


def test_a_lumen_ringed_by_nuclei_stays_empty():
    image_HWC = np.full((160, 160, 3), 245, np.uint8)
    for angle in np.arange(0, 2 * np.pi, np.pi / 12):  # discs of 8 um around 44 um
        centre = np.rint(80 + 52 * np.array([np.cos(angle), np.sin(angle)])).astype(int)
        cv2.circle(image_HWC, centre.tolist(), 8, (70, 50, 120), -1)
    nuclei = segment(cv2.GaussianBlur(image_HWC, (0, 0), 0.8), 0.5)
    assert len(nuclei) == 24
    assert np.abs(np.hypot(*(nuclei.centroid_px - 80).T) - 52).max() < 2


@pytest.mark.parametrize(
    ("image_HWC", "mpp", "message"),
    [
        (np.zeros((4, 4), np.uint8), 0.5, "expected uint8"),
        (np.zeros((4, 4, 4), np.uint8), 0.5, "expected uint8"),
        (np.zeros((4, 4, 3), np.float32), 0.5, "float32"),
        (np.zeros((4, 4, 3), np.uint8), 2.0, "mpp is 2.0"),
        (np.zeros((4, 4, 3), np.uint8), float("nan"), "mpp is nan"),
    ],
)
def test_wrong_input_is_refused(image_HWC, mpp, message):
    with pytest.raises(ValueError, match=message):
        segment(image_HWC, mpp)


def test_real_tissue_with_annotations():
    folder = DATA / "seg_monuseg"
    if not folder.is_dir():
        pytest.skip(f"needs the annotated images in {folder}")
    name = "TCGA-G9-6356-01Z-00-DX1.png"
    image_HWC = cv2.imread(str(folder / "images" / name))[..., ::-1]
    true_HW = cv2.imread(str(folder / "labels" / name), cv2.IMREAD_UNCHANGED)
    scores = score_labels(true_HW, segment_labels(np.ascontiguousarray(image_HWC), 0.25))
    assert scores.f1 >= 0.75
    assert scores.pq >= 0.55
