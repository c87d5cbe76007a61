"""Exact mean and variance of genes over blocks of cells, and t-tests between groups of cells.

Shape letters: N cells of a block, G genes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FloatArray = NDArray[np.float64]
# Deviations that are rounding errors, as a share of the mean.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Moments:
    """Moments of genes over some cells.

    Attributes:
        num_cells: Number of cells.
        mean_G: Mean of each gene, [G].
        squares_G: Sum of squared deviations from the mean, [G].
    """

    num_cells: int
    mean_G: FloatArray
    squares_G: FloatArray

    @property
    def variance_G(self) -> FloatArray:
        """Variance over N - 1 [G], as scanpy takes it; 0 for a single cell."""
        return self.squares_G / max(1, self.num_cells - 1)

    @property
    def is_constant_G(self) -> NDArray[np.bool_]:
        """Return which genes vary by no more than rounding errors, [G]."""
        return np.asarray(np.sqrt(self.variance_G) <= ROUNDING * np.abs(self.mean_G))

    def without(self, part: "Moments") -> "Moments":
        """Return the moments of the cells that are not in a part of these."""
        num_cells = self.num_cells - part.num_cells
        if num_cells == 0:
            zeros_G = np.zeros_like(self.mean_G)
            return Moments(0, zeros_G, zeros_G)
        # As differences from the mean of all, so that large means cost no digits.
        step_G = (self.mean_G - part.mean_G) * (part.num_cells / num_cells)
        between_G = part.num_cells * np.square(part.mean_G - self.mean_G)
        squares_G = self.squares_G - part.squares_G - between_G - num_cells * np.square(step_G)
        return Moments(num_cells, self.mean_G + step_G, np.maximum(squares_G, 0))


def block_moments(values_NG: NDArray[np.floating]) -> Moments:
    """Return the moments of a block of cells, computed in float64."""
    values = np.asarray(values_NG, np.float64)
    if not len(values):
        zeros_G = np.zeros(values.shape[1])
        return Moments(0, zeros_G, zeros_G)
    mean_G = values.mean(axis=0)
    return Moments(len(values), mean_G, np.square(values - mean_G).sum(axis=0))


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all cells of some parts (Chan, Golub and LeVeque 1983).

    Raises:
        ValueError: there is no part.
    """
    if not parts:
        message = "no moments to merge; give those of at least one block of cells"
        raise ValueError(message)
    num_cells = sum(part.num_cells for part in parts)
    share = [part.num_cells / max(1, num_cells) for part in parts]
    mean_G = sum((s * part.mean_G for s, part in zip(share, parts, strict=True)), start=0.0)
    squares_G = sum(
        (part.squares_G + part.num_cells * np.square(part.mean_G - mean_G) for part in parts),
        start=0.0,
    )
    return Moments(num_cells, np.asarray(mean_G), np.asarray(squares_G))


def t_test(
    group: Moments, rest: Moments, *, overestimate_variance: bool = False
) -> tuple[FloatArray, FloatArray]:
    """Return Welch's t [G] and its p-value [G] of a group of cells against the other cells.

    Equal to scanpy's `rank_genes_groups` with the method 't-test', or 't-test_overestim_var', which
    takes the rest for as small as the group. A gene that is constant in both has t 0 and p 1.

    Raises:
        ValueError: the group or the rest has fewer than 2 cells.
    """
    if min(group.num_cells, rest.num_cells) < 2:
        message = (
            f"a t-test of {group.num_cells} cells against {rest.num_cells}: expected at least 2 "
            "of each; leave this type out"
        )
        raise ValueError(message)
    num_rest = group.num_cells if overestimate_variance else rest.num_cells
    with np.errstate(invalid="ignore", divide="ignore"):
        t_G, p_G = stats.ttest_ind_from_stats(
            group.mean_G,
            np.sqrt(group.variance_G),
            group.num_cells,
            rest.mean_G,
            np.sqrt(rest.variance_G),
            num_rest,
            equal_var=False,
        )
    is_same_G = np.abs(group.mean_G - rest.mean_G) <= ROUNDING * np.abs(rest.mean_G)
    is_same_G &= group.is_constant_G & rest.is_constant_G
    is_same_G |= np.isnan(t_G)
    return np.where(is_same_G, 0.0, t_G), np.where(is_same_G, 1.0, p_G)
