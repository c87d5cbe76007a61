import math

import numpy as np
import pytest

from scellst_ray.evaluation.segmentation.mask_metrics import score_labels


def _square(size, row, column, side=10, label=1):
    labels_HW = np.zeros((size, size), np.int32)
    labels_HW[row : row + side, column : column + side] = label
    return labels_HW


def _slow_twin(true_HW, predicted_HW):
    """F1, SQ, PQ and AJI by loops over masks, as the papers write them."""
    true = [true_HW == k for k in np.unique(true_HW) if k]
    predicted = [predicted_HW == k for k in np.unique(predicted_HW) if k]
    matched = []
    used = set()
    intersection = union = 0
    for one in true:
        ious = [(one & other).sum() / (one | other).sum() for other in predicted]
        matched += [iou for iou in ious if iou > 0.5]
        best = int(np.argmax(ious)) if ious else -1
        if best < 0 or ious[best] == 0:
            union += one.sum()
            continue
        intersection += (one & predicted[best]).sum()
        union += (one | predicted[best]).sum()
        used.add(best)
    union += sum(other.sum() for k, other in enumerate(predicted) if k not in used)
    tp = len(matched)
    denominator = tp + (len(predicted) - tp) / 2 + (len(true) - tp) / 2
    return {
        "f1": 2 * tp / (2 * tp + len(predicted) - tp + len(true) - tp),
        "sq": np.mean(matched) if matched else math.nan,
        "pq": sum(matched) / denominator,
        "aji": intersection / union,
    }


def _random_labels(rng, size=40, num=25):
    labels_HW = np.zeros((size, size), np.int64)
    for label in rng.permutation(np.arange(1, 4 * num))[:num]:
        row, column, height, width = rng.integers([0, 0, 2, 2], [size, size, 12, 12])
        labels_HW[row : row + height, column : column + width] = label
    return labels_HW


@pytest.mark.parametrize("seed", range(20))
def test_scores_equal_the_slow_twin(seed):
    rng = np.random.default_rng(seed)
    true_HW = _random_labels(rng)
    # A shifted copy with some nuclei redrawn has matches as well as misses.
    predicted_HW = np.roll(true_HW, rng.integers(0, 3, 2), (0, 1))
    redrawn_HW = _random_labels(rng, num=4)
    predicted_HW = np.where(redrawn_HW > 0, redrawn_HW + 1000, predicted_HW)
    scores = score_labels(true_HW, predicted_HW)
    for name, value in _slow_twin(true_HW, predicted_HW).items():
        assert getattr(scores, name) == pytest.approx(value, nan_ok=True), name


def test_identical_maps_are_perfect_under_any_numbering():
    true_HW = _square(40, 2, 3) + _square(40, 20, 20, label=7)
    renumbered_HW = np.where(true_HW == 1, 500, true_HW).astype(np.uint16)
    scores = score_labels(true_HW, renumbered_HW)
    assert (scores.num_true, scores.num_predicted, scores.num_matched) == (2, 2, 2)
    for value in (scores.f1, scores.sq, scores.pq, scores.aji, scores.precision):
        assert value == 1


def test_map_without_background():
    scores = score_labels(np.ones((4, 4), np.int32), np.full((4, 4), 3, np.int32))
    assert scores.pq == scores.aji == 1


@pytest.mark.parametrize("shift", range(11))
def test_one_shifted_square_has_the_closed_form(shift):
    # Two 10 x 10 squares `shift` px apart share 10 (10 - shift) px.
    iou = (10 - shift) / (10 + shift)
    scores = score_labels(_square(40, 5, 5), _square(40, 5, 5 + shift))
    assert scores.aji == pytest.approx(iou)
    assert scores.f1 == (iou > 0.5)
    assert scores.pq == pytest.approx(iou if iou > 0.5 else 0)
    assert math.isnan(scores.sq) == (iou <= 0.5)


def test_exactly_half_does_not_match():
    true_HW, predicted_HW = _square(20, 0, 0), _square(20, 0, 0)
    predicted_HW[:5] = 0
    assert score_labels(true_HW, predicted_HW).num_matched == 0


def test_empty_maps():
    empty_HW, one_HW = np.zeros((20, 20), np.int32), _square(20, 0, 0)
    both = score_labels(empty_HW, empty_HW)
    assert all(math.isnan(v) for v in (both.f1, both.sq, both.pq, both.aji, both.recall))
    missed = score_labels(one_HW, empty_HW)
    assert (missed.f1, missed.pq, missed.aji, missed.recall) == (0, 0, 0, 0)
    assert math.isnan(missed.precision)
    invented = score_labels(empty_HW, one_HW)
    assert (invented.f1, invented.pq, invented.aji, invented.precision) == (0, 0, 0, 0)
    assert score_labels(np.zeros((0, 5), np.int32), np.zeros((0, 5), np.int32)).num_true == 0


def test_one_prediction_may_serve_two_annotations_in_aji():
    true_HW = _square(20, 0, 0) + _square(20, 0, 10, label=2)
    predicted_HW = (true_HW > 0).astype(np.int32)
    # Both annotations join the one prediction: (100 + 100) / (200 + 200).
    assert score_labels(true_HW, predicted_HW).aji == 0.5


@pytest.mark.parametrize(
    ("true_HW", "predicted_HW", "message"),
    [
        (np.zeros((3, 3)), np.zeros((3, 3), int), "true_HW is float64"),
        (np.zeros((3, 3), int), np.zeros((3, 3, 1), int), "predicted_HW is int64"),
        (np.zeros((3, 3), int), np.zeros((3, 4), int), "one shape"),
        (np.full((3, 3), -1), np.zeros((3, 3), int), "label -1"),
    ],
)
def test_wrong_maps_are_refused(true_HW, predicted_HW, message):
    with pytest.raises(ValueError, match=message):
        score_labels(true_HW, predicted_HW)
