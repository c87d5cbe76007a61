"""Scores of predicted nuclei against annotated points: of detection, and of types.

There are N annotated and M predicted nuclei. A score whose denominator is zero is NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching
from scipy.spatial import cKDTree

UNKNOWN = ""  # type of a nucleus that the annotator marked without naming its type


@dataclass(frozen=True)
class DetectionCounts:
    """Numbers of annotated, predicted and matched nuclei. Counts of several images add up.

    Attributes:
        num_true: Number of annotated nuclei.
        num_predicted: Number of predicted nuclei.
        num_matched: Number of pairs; each nucleus is in at most one.
    """

    num_true: int
    num_predicted: int
    num_matched: int

    def __add__(self, other: "DetectionCounts") -> "DetectionCounts":
        """Return the sum of two counts."""
        return DetectionCounts(
            self.num_true + other.num_true,
            self.num_predicted + other.num_predicted,
            self.num_matched + other.num_matched,
        )

    @property
    def precision(self) -> float:
        """Share of the predicted nuclei that match an annotated one."""
        return ratio(self.num_matched, self.num_predicted)

    @property
    def recall(self) -> float:
        """Share of the annotated nuclei that match a predicted one."""
        return ratio(self.num_matched, self.num_true)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 where nuclei exist and none match."""
        return ratio(2 * self.num_matched, self.num_true + self.num_predicted)


@dataclass(frozen=True)
class TypeCounts:
    """Numbers of nuclei of one type. Counts of several images add up.

    Attributes:
        num_true: Annotated nuclei of this type.
        num_predicted: Predicted nuclei of this type.
        num_detected: Annotated nuclei of this type that match a predicted one of any type.
        both: Pairs of which both nuclei have this type (TP).
        only_predicted: Pairs of which only the predicted nucleus has this type (FP). Pairs whose
            annotated type is unknown are left out.
        only_true: Pairs of which only the annotated nucleus has this type (FN).
        unmatched_predicted: Predicted nuclei of this type without a partner (FP_d).
        unmatched_true: Annotated nuclei of this type without a partner (FN_d).
    """

    num_true: int
    num_predicted: int
    num_detected: int
    both: int
    only_predicted: int
    only_true: int
    unmatched_predicted: int
    unmatched_true: int

    def __add__(self, other: "TypeCounts") -> "TypeCounts":
        """Return the sum of two counts."""
        mine, theirs = vars(self), vars(other)
        return TypeCounts(**{name: mine[name] + theirs[name] for name in mine})

    @property
    def detected(self) -> float:
        """Share of the annotated nuclei of this type that match a predicted one of any type."""
        return ratio(self.num_detected, self.num_true)

    @property
    def precision(self) -> float:
        """TP / (TP + 2 FP + FP_d)."""
        return ratio(self.both, self.both + 2 * self.only_predicted + self.unmatched_predicted)

    @property
    def recall(self) -> float:
        """TP / (TP + 2 FN + FN_d)."""
        return ratio(self.both, self.both + 2 * self.only_true + self.unmatched_true)

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + 2 FP + 2 FN + FP_d + FN_d), a score of detection and typing together.

        The formula is from Graham et al. 2019 ("HoVer-Net", Medical Image Analysis 58, section on
        classification), with their weights 2, 2, 1, 1 of the errors. They write 2 (TP + TN) in
        place of 2 TP. But their code and CellViT's, which gave the published figures, count for a
        type only nuclei of this type and their partners. So TN is always 0, as here.
        """
        errors = 2 * self.only_predicted + 2 * self.only_true
        errors += self.unmatched_predicted + self.unmatched_true
        return ratio(2 * self.both, 2 * self.both + errors)


@dataclass(frozen=True)
class PointMatching:
    """Annotated and predicted points matched one to one.

    Attributes:
        true_index: int64 [K], rows of the matched annotated points, ascending.
        predicted_index: int64 [K], rows of the predicted points that they match.
        distance: float64 [K], distance of each pair, in the unit of the points.
        counts: Numbers of points and of pairs.
    """

    true_index: NDArray[np.int64]
    predicted_index: NDArray[np.int64]
    distance: NDArray[np.float64]
    counts: DetectionCounts


def match_points(
    true_N2: NDArray[np.floating], predicted_M2: NDArray[np.floating], radius: float
) -> PointMatching:
    """Match points one to one within a radius.

    The result is exact: it has the largest number of pairs, and among such matchings the smallest
    sum of distances. The published evaluations minimise the sum over all points, however far
    apart, and then drop pairs beyond the radius, which can lose pairs.

    Each group of points that are candidates of each other is solved on its own. So the cost grows
    with the number of groups, not with N x M.

    Args:
        true_N2: Annotated points [N, 2].
        predicted_M2: Predicted points [M, 2], in the same frame and unit.
        radius: Largest distance of a pair, inclusive, in the unit of the points.

    Raises:
        ValueError: points are not [N, 2] and finite, or the radius is not positive.
    """
    true_N2, predicted_M2 = _points(true_N2, "true_N2"), _points(predicted_M2, "predicted_M2")
    if not radius > 0:
        message = f"radius is {radius}; expected a positive distance"
        raise ValueError(message)
    trees = cKDTree(true_N2), cKDTree(predicted_M2)
    near = trees[0].sparse_distance_matrix(trees[1], radius, output_type="ndarray")
    pairs = _best_pairs(near["i"], near["j"], near["v"], len(true_N2), len(predicted_M2))
    pairs = pairs[np.argsort(near["i"][pairs])]
    counts = DetectionCounts(len(true_N2), len(predicted_M2), len(pairs))
    rows, columns = (near[name][pairs].astype(np.int64) for name in ("i", "j"))
    return PointMatching(rows, columns, near["v"][pairs], counts)


def type_counts(
    matching: PointMatching, true_types: Sequence[str], predicted_types: Sequence[str]
) -> dict[str, TypeCounts]:
    """Return the counts of every type that is present on either side.

    Args:
        matching: Matching of the nuclei, from `match_points`.
        true_types: Type name of each annotated nucleus [N]; UNKNOWN where not annotated.
        predicted_types: Type name of each predicted nucleus [M], in the same vocabulary.
    """
    true_N = np.asarray(true_types, np.str_)
    predicted_M = np.asarray(predicted_types, np.str_)
    pair_true_K, pair_predicted_K = (
        true_N[matching.true_index],
        predicted_M[matching.predicted_index],
    )
    known_K = pair_true_K != UNKNOWN
    counts = {}
    for name in sorted({*true_N.tolist(), *predicted_M.tolist()} - {UNKNOWN}):
        is_true_K, is_predicted_K = pair_true_K == name, pair_predicted_K == name
        num_true, num_predicted = int((true_N == name).sum()), int((predicted_M == name).sum())
        num_detected = int(is_true_K.sum())
        counts[name] = TypeCounts(
            num_true=num_true,
            num_predicted=num_predicted,
            num_detected=num_detected,
            both=int((is_true_K & is_predicted_K).sum()),
            only_predicted=int((is_predicted_K & ~is_true_K & known_K).sum()),
            only_true=int((is_true_K & ~is_predicted_K).sum()),
            unmatched_predicted=num_predicted - int(is_predicted_K.sum()),
            unmatched_true=num_true - num_detected,
        )
    return counts


def common_types(
    same: Sequence[tuple[str, str]],
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the common names of annotated and of predicted types.

    Equal names mean the same type, and so do the pairs in `same`. A name in several pairs joins
    these pairs to one type. A type has the annotated names of its pairs, joined by "+".

    Args:
        same: (annotated, predicted) names that mean the same. Nuclei of an annotated name that is
            paired with "" become UNKNOWN.

    Returns:
        New name by annotated name, and new name by predicted name; names that do not change are
        left out.
    """
    pairs = [pair for pair in same if all(pair)]
    group = {name: name for pair in pairs for name in pair}
    for true, predicted in pairs:
        old, new = group[predicted], group[true]
        group = {name: new if value == old else value for name, value in group.items()}
    called = {
        value: "+".join(sorted({true for true, _ in pairs if group[true] == value}))
        for value in group.values()
    }
    renamed = {name: called[value] for name, value in group.items()}
    return renamed | {true: UNKNOWN for true, predicted in same if not predicted}, renamed


def ratio(numerator: float, denominator: float) -> float:
    """Return the quotient; NaN for division by zero."""
    return numerator / denominator if denominator else float("nan")


def _points(points: NDArray[np.floating], name: str) -> NDArray[np.float64]:
    """Return points as float64 [N, 2].

    Raises:
        ValueError: points are not [N, 2] or not finite.
    """
    array = np.asarray(points, np.float64)
    if array.size == 0:
        return np.zeros((0, 2))
    if array.ndim != 2 or array.shape[1] != 2 or not np.isfinite(array).all():
        message = f"{name} is {array.dtype} {array.shape}; expected finite points [N, 2], (x, y)"
        raise ValueError(message)
    return array


def _best_pairs(
    rows: NDArray[np.integer],
    columns: NDArray[np.integer],
    distance: NDArray[np.float64],
    num_rows: int,
    num_columns: int,
) -> NDArray[np.int64]:
    """Return the candidate pairs that are matched, as indices into the candidates.

    Args:
        rows: int [E], annotated point of each candidate pair.
        columns: int [E], predicted point of each candidate pair.
        distance: float64 [E], distance of each candidate pair.
        num_rows: Number of annotated points.
        num_columns: Number of predicted points.
    """
    if not len(rows):
        return np.zeros(0, np.int64)
    size = num_rows + num_columns
    graph = coo_array((np.ones(len(rows)), (rows, columns + num_rows)), shape=(size, size))
    group_E = connected_components(graph, directed=False)[1][rows]
    order = np.argsort(group_E, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(group_E[order])) + 1)
    # Most groups are a single pair, which needs no solver.
    chosen = [
        part if len(part) == 1 else _best_of(part, rows, columns, distance) for part in groups
    ]
    return np.concatenate(chosen).astype(np.int64)


def _best_of(
    part: NDArray[np.int64],
    rows: NDArray[np.integer],
    columns: NDArray[np.integer],
    distance: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Return the matched pairs among the candidate pairs `part` of one group.

    Every annotated point also has a dummy partner that costs more than all distances together. So
    the cheapest full matching uses the fewest dummies, which means the most pairs.
    """
    true_points, row = np.unique(rows[part], return_inverse=True)
    predicted_points, column = np.unique(columns[part], return_inverse=True)
    num_true, num_predicted = len(true_points), len(predicted_points)
    step = distance[part].max() + 1  # added to all weights, since a weight of zero is no edge
    dummy = (num_true + 1) * step
    weights = np.concatenate([distance[part] + step, np.full(num_true, dummy + step)])
    ends = np.concatenate([column, num_predicted + np.arange(num_true)])
    starts = np.concatenate([row, np.arange(num_true)])
    shape = (num_true, num_predicted + num_true)
    graph = coo_array((weights, (starts, ends)), shape=shape).tocsr()
    partner = min_weight_full_bipartite_matching(graph)[1]
    return np.asarray(part[partner[row] == column])
