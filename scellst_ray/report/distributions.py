"""How the expression of genes is distributed over the cells of each type.

Histograms have the bins of PROFILES, so those of slides can be added up. Lowest and highest values
are exact.

Shape letters: N cells, G genes, B bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scellst_ray.report.cells import NUM_TYPES, OTHERS
from scellst_ray.runs.profiles import NUM_BINS, histograms


@dataclass(frozen=True)
class TypeCounts:
    """Histograms of the cells of a type.

    Attributes:
        num_cells: Number of cells.
        first: Number of the first bin that is kept: those before are empty, as are those behind.
        counts_GB: Histograms, int64 [G, B].
    """

    num_cells: int
    first: int
    counts_GB: NDArray[np.int64]

    def whole(self) -> NDArray[np.int64]:
        """Return the histograms with all bins, int64 [G, NUM_BINS]."""
        before = self.first
        behind = NUM_BINS - before - self.counts_GB.shape[1]
        return np.pad(self.counts_GB, ((0, 0), (before, behind)))


@dataclass(frozen=True)
class Distributions:
    """Distributions of genes over the cells of each type.

    Attributes:
        genes: The genes.
        low_G: Lowest value of each.
        high_G: Highest value of each.
        by_type: Histograms by type.
    """

    genes: tuple[str, ...]
    low_G: NDArray[np.float64]
    high_G: NDArray[np.float64]
    by_type: dict[str, TypeCounts]


def count_values(
    genes: Sequence[str],
    values_NG: NDArray[np.float32],
    types: Sequence[str],
    codes_N: NDArray[np.integer],
) -> Distributions | None:
    """Return the distributions of genes over some cells; None if no value is finite.

    Args:
        genes: The genes.
        values_NG: Their expression; a cell with a value that is not finite is left out.
        types: Names of types.
        codes_N: Number of each cell's type; cells of other numbers are left out.
    """
    known_N = np.isfinite(values_NG).all(axis=1) & (codes_N >= 0) & (codes_N < len(types))
    values_NG, codes_N = values_NG[known_N], codes_N[known_N]
    if not values_NG.size:
        return None
    low_G, high_G = values_NG.min(axis=0), values_NG.max(axis=0)
    by_type = {
        name: _type_counts(histograms(values_NG[codes_N == code]), int((codes_N == code).sum()))
        for code, name in enumerate(types)
        if (codes_N == code).any()
    }
    return Distributions(tuple(genes), low_G.astype(float), high_G.astype(float), by_type)


def add_up(parts: Sequence[Distributions]) -> Distributions | None:
    """Return the distributions of the cells of all parts; None without parts.

    The commonest types are kept; the others become one.
    """
    if not parts:
        return None
    totals: dict[str, list[TypeCounts]] = {}
    for part in parts:
        for name, counts in part.by_type.items():
            totals.setdefault(name, []).append(counts)
    numbers = {name: sum(c.num_cells for c in counts) for name, counts in totals.items()}
    order = sorted(totals, key=lambda name: (name == OTHERS, -numbers[name], name))
    if len(order) > NUM_TYPES:
        rest = [c for name in order[NUM_TYPES:] for c in totals[name]]
        totals = {name: totals[name] for name in order[:NUM_TYPES]} | {OTHERS: rest}
        order = list(totals)
    by_type = {name: _sum(totals[name]) for name in order}
    low_G = np.min([part.low_G for part in parts], axis=0)
    high_G = np.max([part.high_G for part in parts], axis=0)
    return Distributions(parts[0].genes, low_G, high_G, by_type)


def _type_counts(counts_GB: NDArray[np.int64], num_cells: int) -> TypeCounts:
    filled = np.flatnonzero(counts_GB.any(axis=0))
    first, end = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)
    return TypeCounts(num_cells, first, counts_GB[:, first:end].copy())


def _sum(parts: Sequence[TypeCounts]) -> TypeCounts:
    whole_GB = parts[0].whole()
    for part in parts[1:]:
        end = part.first + part.counts_GB.shape[1]
        whole_GB[:, part.first : end] += part.counts_GB
    return _type_counts(whole_GB, sum(part.num_cells for part in parts))
