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

NUM_BINS = 25
CONTROLS_PER_BIN = 50


@dataclass(frozen=True)
class Scorer:
    """Linear map from normalised expression to scores.

    Attributes:
        names: Names of the sets, T.
        weight_GT: Weight of each gene in each score.
        offset_T: Added to each score.
    """

    names: tuple[str, ...]
    weight_GT: NDArray[np.float64]
    offset_T: NDArray[np.float64]

    def score(self, values_NG: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the scores [N, T] of cells from their normalised expression [N, G]."""
        return np.asarray(values_NG, np.float64) @ self.weight_GT + self.offset_T


def control_genes(means_G: NDArray[np.floating], members: Sequence[int]) -> NDArray[np.int64]:
    """Return the indices of the control genes of a set: 50 of each bin that holds its genes.

    Genes are ranked by their mean and cut into bins; random choices are those of
    `numpy.random.RandomState(0)`. These are the rules of scanpy 1.11's `score_genes`.

    Args:
        means_G: Mean of each gene [G] over all cells, before scaling: after scaling all means are
            0, and their ranks only rounding errors, which differ with the order of the cells.
        members: Indices of the genes of the set.

    Raises:
        ValueError: there are fewer than 13 genes, or no gene is left as a control.
    """
    per_bin = int(np.round(len(means_G) / (NUM_BINS - 1)))
    if per_bin == 0:
        message = f"a panel of {len(means_G)} genes: expected at least 13 to choose controls from"
        raise ValueError(message)
    bins_G = rankdata(means_G, method="min") // per_bin
    random = np.random.RandomState(0)  # as scanpy, to give its scores
    chosen: set[int] = set()
    for cut in np.unique(bins_G[list(members)]):
        found = np.flatnonzero(bins_G == cut)
        if len(found) > CONTROLS_PER_BIN:
            found = found[random.choice(len(found), CONTROLS_PER_BIN, replace=False)]
        chosen |= set(found.tolist())
    controls = np.array(sorted(chosen - set(members)), np.int64)
    if not len(controls):
        message = f"a set of {len(members)} genes leaves no control gene; name fewer markers"
        raise ValueError(message)
    return controls


def make_scorer(moments: Moments, sets: Mapping[str, Sequence[int]]) -> Scorer:
    """Return the scorer of gene sets over genes scaled to mean 0 and variance 1.

    Args:
        moments: Moments of the normalised expression over all cells.
        sets: Indices of the genes of each set, by its name.

    Raises:
        ValueError: See `control_genes`.
    """
    sd_G = np.sqrt(moments.variance_G)
    sd_G[sd_G == 0] = 1
    weight_GT = np.zeros((len(sd_G), len(sets)))
    for column, members in enumerate(sets.values()):
        controls = control_genes(moments.mean_G, members)
        weight_GT[list(members), column] = 1 / len(members)
        weight_GT[controls, column] = -1 / len(controls)
    weight_GT /= sd_G[:, None]
    return Scorer(tuple(sets), weight_GT, -(moments.mean_G @ weight_GT))
