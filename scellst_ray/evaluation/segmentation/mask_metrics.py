"""How well predicted nuclei match annotated ones: F1, AJI and PQ of two label maps.

Everything follows from one sparse table, the number of pixels that each annotated and each
predicted nucleus share, so the cost does not grow with the number of nuclei.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SegmentationScores:
    """Agreement of two label maps; a score whose denominator is zero is NaN.

    Attributes:
        num_true: Annotated nuclei.
        num_predicted: Predicted nuclei.
        num_matched: Pairs with an intersection over union above 0.5.
        precision: num_matched / num_predicted.
        recall: num_matched / num_true.
        f1: 2 num_matched / (num_true + num_predicted); the same as DQ.
        sq: Segmentation quality, mean intersection over union of the matched pairs.
        pq: Panoptic quality, f1 times sq; 0 where nuclei exist and none match.
        aji: Aggregated Jaccard index.
    """

    num_true: int
    num_predicted: int
    num_matched: int
    precision: float
    recall: float
    f1: float
    sq: float
    pq: float
    aji: float

    @property
    def dq(self) -> float:
        """Detection quality of PQ, which is the F1 score."""
        return self.f1


@dataclass(frozen=True)
class _Overlaps:
    """The pairs of nuclei that share pixels, and the area of every nucleus.

    Attributes:
        true_area: int64 [T], px of each annotated nucleus.
        predicted_area: int64 [P], px of each predicted nucleus.
        true_index: int64 [K], which annotated nucleus pair k is about, sorted.
        predicted_index: int64 [K], which predicted one.
        intersection: int64 [K], px they share.
    """

    true_area: NDArray[np.int64]
    predicted_area: NDArray[np.int64]
    true_index: NDArray[np.int64]
    predicted_index: NDArray[np.int64]
    intersection: NDArray[np.int64]

    @property
    def union(self) -> NDArray[np.int64]:
        """Px covered by either nucleus of each pair, int64 [K]."""
        areas = self.true_area[self.true_index] + self.predicted_area[self.predicted_index]
        return np.asarray(areas - self.intersection, np.int64)


def score_labels(
    true_HW: NDArray[np.integer], predicted_HW: NDArray[np.integer]
) -> SegmentationScores:
    """Score predicted nuclei against annotated ones.

    Two nuclei match when their intersection over union is above 0.5, which makes the matching
    unique (Kirillov et al. 2019, "Panoptic Segmentation", section 4.1). F1, SQ and
    PQ = SQ x F1 are theirs (section 4.2), with one class and nothing ignored. AJI is Algorithm 1
    of Kumar et al. 2017 (IEEE TMI 36(7), "A Dataset and a Technique for Generalized Nuclear
    Segmentation").

    Args:
        true_HW: Annotated nuclei, integer [H, W], 0 = background; labels need not be consecutive.
        predicted_HW: Predicted nuclei, integer [H, W], the same shape.

    Returns:
        The scores; all NaN where neither map has a nucleus, since nothing was asked.

    Raises:
        ValueError: If the maps are not integer arrays [H, W] of one shape, or hold labels below 0.
    """
    _check(true_HW, predicted_HW)
    overlaps = _overlaps(true_HW, predicted_HW)
    num_true, num_predicted = len(overlaps.true_area), len(overlaps.predicted_area)
    iou = overlaps.intersection / overlaps.union
    matched_iou = iou[iou > 0.5]
    num_matched = len(matched_iou)
    f1 = _ratio(2 * num_matched, num_true + num_predicted)
    sq = _ratio(float(matched_iou.sum()), num_matched)
    return SegmentationScores(
        num_true=num_true,
        num_predicted=num_predicted,
        num_matched=num_matched,
        precision=_ratio(num_matched, num_predicted),
        recall=_ratio(num_matched, num_true),
        f1=f1,
        sq=sq,
        pq=f1 * sq if num_matched else f1,
        aji=_aggregated_jaccard(overlaps),
    )


def _check(true_HW: NDArray[np.integer], predicted_HW: NDArray[np.integer]) -> None:
    """Raise ValueError unless both are label maps of one shape."""
    for name, labels_HW in (("true_HW", true_HW), ("predicted_HW", predicted_HW)):
        if labels_HW.ndim != 2 or not np.issubdtype(labels_HW.dtype, np.integer):
            message = (
                f"{name} is {labels_HW.dtype} {labels_HW.shape}; expected an integer label map "
                "[H, W] with 0 for background"
            )
            raise ValueError(message)
        if labels_HW.size and labels_HW.min() < 0:
            message = (
                f"{name} holds the label {labels_HW.min()}; expected 0 for background, then 1.."
            )
            raise ValueError(message)
    if true_HW.shape != predicted_HW.shape:
        message = (
            f"the maps are {true_HW.shape} and {predicted_HW.shape}; expected one shape, "
            "so resample one of them first (nearest neighbour)"
        )
        raise ValueError(message)


def _overlaps(true_HW: NDArray[np.integer], predicted_HW: NDArray[np.integer]) -> _Overlaps:
    """Count shared pixels by sorting the pairs of labels once."""
    true_labels, true_flat = np.unique(true_HW, return_inverse=True)
    predicted_labels, predicted_flat = np.unique(predicted_HW, return_inverse=True)
    width = max(len(predicted_labels), 1)
    pairs, counts = np.unique(
        true_flat.ravel() * width + predicted_flat.ravel(), return_counts=True
    )
    rows, columns = np.divmod(pairs, width)
    true_area = np.bincount(rows, counts, len(true_labels)).astype(np.int64)
    predicted_area = np.bincount(columns, counts, len(predicted_labels)).astype(np.int64)
    # Labels come sorted, so background, where present, is entry 0 of each list.
    first_true = int(true_labels[:1].tolist() == [0])
    first_predicted = int(predicted_labels[:1].tolist() == [0])
    both = (rows >= first_true) & (columns >= first_predicted)
    return _Overlaps(
        true_area=true_area[first_true:],
        predicted_area=predicted_area[first_predicted:],
        true_index=rows[both] - first_true,
        predicted_index=columns[both] - first_predicted,
        intersection=counts[both],
    )


def _aggregated_jaccard(overlaps: _Overlaps) -> float:
    """Return the aggregated Jaccard index, Algorithm 1 of Kumar et al. 2017.

    Each annotated nucleus is joined to the predicted one with the highest intersection over
    union, which may serve several; predicted nuclei joined to none add their area to the union.
    An annotated nucleus that no prediction touches adds its own area. Equal candidates are
    decided for the lowest label, which the paper leaves open.
    """
    union = overlaps.union
    iou = overlaps.intersection / union
    order = np.lexsort((overlaps.predicted_index, -iou, overlaps.true_index))
    touched, first = np.unique(overlaps.true_index[order], return_index=True)
    best = order[first]
    untouched = np.ones(len(overlaps.true_area), np.bool_)
    untouched[touched] = False
    unused = np.ones(len(overlaps.predicted_area), np.bool_)
    unused[overlaps.predicted_index[best]] = False
    total = union[best].sum() + overlaps.true_area[untouched].sum()
    total += overlaps.predicted_area[unused].sum()
    return _ratio(int(overlaps.intersection[best].sum()), int(total))


def _ratio(numerator: float, denominator: float) -> float:
    """Divide, with NaN for division by zero."""
    return numerator / denominator if denominator else float("nan")
