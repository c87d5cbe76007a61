"""Predictions of single cells against cells that were measured one by one (Xenium).

Shape letters: N cells found, M cells measured, P pairs, G genes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from scellst_ray.evaluation.expression.scores import Truth
from scellst_ray.spots.panel import log_normalise
from scellst_ray.spots.xenium import MeasuredCells, select_genes


@dataclass(frozen=True)
class CellPairs:
    """Cells found beside cells measured, each at most once.

    Attributes:
        found: int64 [P], rows of the cells found, ascending.
        measured: int64 [P], rows of the measured cells they are.
        distance0: float64 [P], level-0 px between the centroids.
    """

    found: NDArray[np.int64]
    measured: NDArray[np.int64]
    distance0: NDArray[np.float64]


def pair_cells(
    found_xy0: NDArray[np.floating], measured_xy0: NDArray[np.floating], radius0: float
) -> CellPairs:
    """Pair cells that are each other's nearest, no farther than `radius0` apart.

    Args:
        found_xy0: Centroids [N, 2] (x, y), level-0 px.
        measured_xy0: Centroids [M, 2] in the same frame.
        radius0: Largest distance, level-0 px.
    """
    if len(found_xy0) == 0 or len(measured_xy0) == 0:
        none = np.zeros(0, np.int64)
        return CellPairs(none, none, np.zeros(0))
    distance0, there = cKDTree(measured_xy0).query(found_xy0)
    _, back = cKDTree(found_xy0).query(measured_xy0)
    rows = np.arange(len(found_xy0))
    paired = np.flatnonzero((back[there] == rows) & (distance0 <= radius0))
    return CellPairs(paired, there[paired].astype(np.int64), distance0[paired])


def cell_truth(
    cells: MeasuredCells, rows: NDArray[np.int64], genes: list[str], min_counts: int = 1
) -> tuple[Truth, NDArray[np.bool_]]:
    """Return the expression measured in some cells, for those of `genes` that were measured.

    Normalised as spots are: counts per 10,000 of all genes measured, log(1 + x). A targeted panel
    is not a transcriptome, so levels compare within a gene only.

    Args:
        cells: All cells measured.
        rows: Which [P].
        genes: The head's panel.
        min_counts: Cells with fewer counts say nothing and are left out.

    Returns:
        The truth of the cells kept, and which of the P these are.

    Raises:
        ValueError: Where no gene was measured, or no cell is kept.
    """
    totals_P = np.asarray(cells.counts[rows].sum(axis=1)).ravel()
    kept_P = totals_P >= min_counts
    if not kept_P.any():
        message = (
            f"{len(rows)} pairs of cells found and measured, and none of these has {min_counts} "
            "counts: nothing to compare. Check the alignment, the mpp and the radius."
        )
        raise ValueError(message)
    chosen, shared = select_genes(cells, genes)
    counts = chosen.counts[rows[kept_P]]
    values = log_normalise(counts, totals_P[kept_P])
    return Truth(values, np.log1p(totals_P[kept_P]), shared), kept_P
