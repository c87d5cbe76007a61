"""Scores of gene sets as scanpy's `score_genes` defines them, as one linear map of expression.

A score is the mean of a set's genes minus the mean of control genes of like expression. Of scaled
genes, too, it is linear in the values before scaling, so that cells can be scored block by block.

Shape letters: N cells of a block, G genes, T sets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from scellst_ray.annotation.moments import Moments

# Those of scanpy.
NUM_BINS = 25
CONTROLS_PER_BIN = 50


@dataclass(frozen=True)
class Scorer:
    """Linear map from normalised expression to scores.

    Attributes:
        names: Names of the sets, T.
        num_bins: Number of bins that control genes were chosen in.
        controls: Indices of the control genes of each set.
        weight_GT: Weight of each gene in each score.
        offset_T: Added to each score.
    """

    names: tuple[str, ...]
    num_bins: int
    controls: tuple[NDArray[np.int64], ...]
    weight_GT: NDArray[np.float64]
    offset_T: NDArray[np.float64]

    def score(self, values_NG: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the scores [N, T] of cells from their normalised expression [N, G]."""
        return np.asarray(values_NG, np.float64) @ self.weight_GT + self.offset_T


def control_genes(
    means_G: NDArray[np.floating], members: Sequence[int], num_bins: int = NUM_BINS
) -> NDArray[np.int64]:
    """Return the indices of the control genes of a set: 50 of each bin that holds its genes.

    Genes are ranked by their mean and cut into bins; random choices are those of
    `numpy.random.RandomState(0)`. These are the rules of scanpy 1.11's `score_genes`. In a small
    panel no gene may be left, as then a bin holds one gene.

    Args:
        means_G: Mean of each gene [G] over all cells, before scaling: after scaling all means are
            0, and their ranks only rounding errors, which differ with the order of the cells.
        members: Indices of the genes of the set.
        num_bins: Number of bins, `n_bins` of scanpy; 1, which scanpy refuses, puts all genes into
            one bin.
    """
    per_bin = len(means_G) + 1 if num_bins == 1 else int(np.round(len(means_G) / (num_bins - 1)))
    if per_bin == 0:
        return np.zeros(0, np.int64)
    bins_G = rankdata(means_G, method="min") // per_bin
    random = np.random.RandomState(0)  # as scanpy, to give its scores
    chosen: set[int] = set()
    for cut in np.unique(bins_G[list(members)]):
        found = np.flatnonzero(bins_G == cut)
        if len(found) > CONTROLS_PER_BIN:
            found = found[random.choice(len(found), CONTROLS_PER_BIN, replace=False)]
        chosen |= set(found.tolist())
    return np.array(sorted(chosen - set(members)), np.int64)


def choose_bins(means_G: NDArray[np.floating], sets: Mapping[str, Sequence[int]]) -> int:
    """Return the number of bins: scanpy's 25, or the next lower one that gives each set controls.

    Arguments as `make_scorer` and `control_genes`.

    Raises:
        ValueError: no number of bins leaves some set a control gene.
    """
    without = ""
    for num_bins in range(NUM_BINS, 0, -1):
        without = next(
            (n for n, s in sets.items() if not len(control_genes(means_G, s, num_bins))), ""
        )
        if not without:
            return num_bins
    message = (
        f"type {without!r}: its {len(sets[without])} genes leave none of the panel's "
        f"{len(means_G)} genes as a control; name fewer markers, or take a head with more genes"
    )
    raise ValueError(message)


def make_scorer(
    moments: Moments, sets: Mapping[str, Sequence[int]], *, scale: bool = True
) -> Scorer:
    """Return the scorer of gene sets.

    Args:
        moments: Moments of the normalised expression over all cells.
        sets: Indices of the genes of each set, by its name.
        scale: Whether genes are scaled to mean 0 and variance 1 before.

    Raises:
        ValueError: See `choose_bins`.
    """
    num_bins = choose_bins(moments.mean_G, sets)
    weight_GT = np.zeros((len(moments.mean_G), len(sets)))
    all_controls = []
    for column, members in enumerate(sets.values()):
        controls = control_genes(moments.mean_G, members, num_bins)
        all_controls.append(controls)
        weight_GT[list(members), column] = 1 / len(members)
        weight_GT[controls, column] = -1 / len(controls)
    offset_T = np.zeros(len(sets))
    if scale:
        sd_G = np.sqrt(moments.variance_G)
        sd_G[moments.is_constant_G] = 1
        weight_GT /= sd_G[:, None]
        offset_T = -(moments.mean_G @ weight_GT)
    return Scorer(tuple(sets), num_bins, tuple(all_controls), weight_GT, offset_T)
