"""Agreement of the masks of predicted and annotated nuclei: F1, AJI and PQ of two label maps.

All scores follow from one sparse table: the number of pixels that an annotated and a predicted
nucleus share. So the cost does not grow with the number of nuclei.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scellst_ray.evaluation.segmentation.detection_metrics import ratio


@dataclass(frozen=True)
class SegmentationScores:
    """Agreement of two label maps; a score whose denominator is zero is NaN.

    Attributes:
        num_true: Number of annotated nuclei.
        num_predicted: Number of predicted nuclei.
        num_matched: Number of pairs with an intersection over union above 0.5.
        precision: num_matched / num_predicted.
        recall: num_matched / num_true.
        f1: 2 num_matched / (num_true + num_predicted); the detection quality (DQ) of PQ.
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


@dataclass(frozen=True)
class _Overlaps:
    """The pairs of nuclei that share pixels, and the area of every nucleus.

    Attributes:
        true_area: int64 [T], px of each annotated nucleus.
        predicted_area: int64 [P], px of each predicted nucleus.
        true_index: int64 [K], annotated nucleus of each pair, ascending.
        predicted_index: int64 [K], predicted nucleus of each pair.
        intersection: int64 [K], px that both nuclei of a pair share.
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

    Two nuclei match if their intersection over union is above 0.5, which makes the matching unique
    (Kirillov et al. 2019, "Panoptic Segmentation", section 4.1). F1, SQ and PQ = SQ x F1 follow
    their section 4.2, with one class and no ignored pixels. AJI is Algorithm 1 of Kumar et al. 2017
    (IEEE TMI 36(7), "A Dataset and a Technique for Generalized Nuclear Segmentation").

    Args:
        true_HW: Annotated nuclei, integer [H, W], 0 = background. Labels need not be consecutive.
        predicted_HW: Predicted nuclei, integer [H, W], of the same shape.

    Returns:
        The scores; all are NaN if neither map has a nucleus.

    Raises:
        ValueError: the maps are not integer arrays [H, W] of one shape, or hold labels below 0.
    """
    _check(true_HW, predicted_HW)
    overlaps = _overlaps(true_HW, predicted_HW)
    num_true, num_predicted = len(overlaps.true_area), len(overlaps.predicted_area)
    iou = overlaps.intersection / overlaps.union
    matched_iou = iou[iou > 0.5]
    num_matched = len(matched_iou)
    f1 = ratio(2 * num_matched, num_true + num_predicted)
    sq = ratio(float(matched_iou.sum()), num_matched)
    return SegmentationScores(
        num_true=num_true,
        num_predicted=num_predicted,
        num_matched=num_matched,
        precision=ratio(num_matched, num_predicted),
        recall=ratio(num_matched, num_true),
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
    # Labels are sorted, so background, where present, is entry 0 of each list.
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

    - Each annotated nucleus is joined to the predicted one with the highest intersection over
      union. A predicted nucleus may be joined to several.
    - A predicted nucleus that is joined to none adds its area to the union.
    - An annotated nucleus that no prediction touches adds its own area.
    - Of equal candidates, the one with the lowest label is taken; the paper leaves this open.
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
    return ratio(int(overlaps.intersection[best].sum()), int(total))
