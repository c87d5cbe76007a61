"""Comparison of predictions with the known truth of synthetic slides.

Nuclei are compared one to one, expression cell by cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from scellst_ray.evaluation.expression.metrics import pearson_by_column
from scellst_ray.spots.panel import log_normalise


@dataclass(frozen=True)
class Matching:
    """Nuclei matched one to one at an intersection over union (IoU) above 0.5.

    Attributes:
        found: int64 [M], rows of the matched nuclei among those found.
        true: int64 [M], rows of the true nuclei that they match.
        num_found: Number of nuclei found.
        num_true: Number of true nuclei.
    """

    found: NDArray[np.int64]
    true: NDArray[np.int64]
    num_found: int
    num_true: int

    @property
    def precision(self) -> float:
        """Share of the found nuclei that match a true one."""
        return len(self.found) / max(self.num_found, 1)

    @property
    def recall(self) -> float:
        """Share of the true nuclei that were found."""
        return len(self.true) / max(self.num_true, 1)


def match_nuclei(found_wkb: list[bytes], true_wkb: list[bytes]) -> Matching:
    """Match outlines (WKB, both in one frame) with an IoU above 0.5, the best pairs first.

    If the outlines of each side do not overlap, every outline has at most one partner. A nucleus
    that was found twice counts once.
    """
    found, true = shapely.from_wkb(found_wkb), shapely.from_wkb(true_wkb)
    tree = shapely.STRtree(true)
    left, right = tree.query(found, predicate="intersects")
    both = shapely.area(shapely.intersection(found[left], true[right]))
    either = shapely.area(found[left]) + shapely.area(true[right]) - both
    good = both > 0.5 * either
    order = np.argsort(-both[good] / either[good], kind="stable")
    left, right = left[good][order], right[good][order]
    taken_found, taken_true, pairs = set(), set(), []
    for pair in zip(left.tolist(), right.tolist(), strict=True):
        if pair[0] not in taken_found and pair[1] not in taken_true:
            taken_found.add(pair[0])
            taken_true.add(pair[1])
            pairs.append(pair)
    matched = np.array(sorted(pairs), np.int64).reshape(-1, 2)
    return Matching(matched[:, 0], matched[:, 1], len(found), len(true))


def cell_correlation(
    predicted_NP: NDArray[np.floating],
    expected_NG: NDArray[np.floating],
    panel: list[int],
    seed: int | None = None,
) -> NDArray[np.float64]:
    """Return Pearson's r over cells for each panel gene, against log-normalised true rates.

    Args:
        predicted_NP: Predicted expression of N matched cells, P panel genes.
        expected_NG: Their true rates of all genes, in counts per cell. They are normalised over
            all genes, as spots are, before the panel's columns are taken.
        panel: Columns of the panel genes.
        seed: If given, the truth is shuffled over cells first, which gives the score of chance.

    Returns:
        float64 [P].
    """
    truth_NP = log_normalise(np.asarray(expected_NG))[:, panel]
    if seed is not None:
        truth_NP = np.random.default_rng(seed).permutation(truth_NP)
    return pearson_by_column(predicted_NP, truth_NP)


def balanced_accuracy(found: Sequence[str | None], true: Sequence[str]) -> float:
    """Return the mean over true types of the share of their cells that were given this type.

    Args:
        found: Type that each cell was given; None counts as wrong.
        true: Its true type.
    """
    right: dict[str, list[bool]] = {}
    for given, type_ in zip(found, true, strict=True):
        right.setdefault(type_, []).append(given == type_)
    return float(np.mean([np.mean(each) for each in right.values()]))
