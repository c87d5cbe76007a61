"""Pairing of found cells with cells that were measured one by one (Xenium).

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
    """Pairs of a found and a measured cell; no cell is in two pairs.

    Attributes:
        found: int64 [P], rows of the found cells, ascending.
        measured: int64 [P], rows of the measured cells.
        distance0: float64 [P], distance of the centroids, level-0 px.
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
    distance0, nearest_measured = cKDTree(measured_xy0).query(found_xy0)
    _, nearest_found = cKDTree(found_xy0).query(measured_xy0)
    rows = np.arange(len(found_xy0))
    is_mutual = nearest_found[nearest_measured] == rows
    paired = np.flatnonzero(is_mutual & (distance0 <= radius0))
    return CellPairs(paired, nearest_measured[paired].astype(np.int64), distance0[paired])


def cell_truth(
    cells: MeasuredCells, rows: NDArray[np.int64], genes: list[str], min_counts: int = 1
) -> tuple[Truth, NDArray[np.bool_]]:
    """Return the expression measured in some cells, for the genes that were measured.

    Counts are normalised as those of spots: log(1 + counts per 10,000 of all measured genes). A
    targeted panel is not a transcriptome, so values can only be compared within a gene.

    Args:
        cells: All measured cells.
        rows: Rows of the cells to return [P].
        genes: Genes of the head.
        min_counts: Cells with fewer counts are left out.

    Returns:
        The truth of the kept cells, and a mask [P] of the cells kept.

    Raises:
        ValueError: no gene was measured, or no cell is kept.
    """
    totals_P = np.asarray(cells.counts[rows].sum(axis=1)).ravel()
    kept_P = totals_P >= min_counts
    if not kept_P.any():
        message = (
            f"none of {len(rows)} pairs of a found and a measured cell has {min_counts} or more "
            "counts. Check the alignment, the mpp and the radius."
        )
        raise ValueError(message)
    chosen, shared = select_genes(cells, genes)
    counts = chosen.counts[rows[kept_P]]
    values = log_normalise(counts, totals_P[kept_P])
    return Truth(values, np.log1p(totals_P[kept_P]), shared), kept_P
