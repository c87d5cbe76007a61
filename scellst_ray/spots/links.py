"""Link the cells to the spots above them: bags as offsets into one flat list of cells.

A bag holds the cells under one spot. S: spots; N: cells; L: pairs of a cell and a spot.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from scellst_ray.spots.table import Spots


@dataclass(frozen=True)
class Links:
    """S bags of cells, without padding.

    Attributes:
        offsets: Starts of the bags, int64 [S + 1]; bag s is cell_index[offsets[s]:offsets[s + 1]].
        cell_index: Rows of the cell table, ascending within each bag, int64 [L].
    """

    offsets: NDArray[np.int64]
    cell_index: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of spots."""
        return len(self.offsets) - 1

    @property
    def num_cells(self) -> NDArray[np.int64]:
        """Number of cells under each spot, int64 [S]."""
        return np.diff(self.offsets)

    def select(self, mask: NDArray[np.bool_] | NDArray[np.integer]) -> "Links":
        """Return the bags of some spots.

        Args:
            mask: bool [S], or indices in the wanted order.
        """
        rows = np.flatnonzero(mask) if np.asarray(mask).dtype == bool else np.asarray(mask)
        num_cells = self.num_cells[rows]
        offsets = np.concatenate([[0], np.cumsum(num_cells)]).astype(np.int64)
        shift = np.repeat(self.offsets[:-1][rows] - offsets[:-1], num_cells)
        return Links(offsets, self.cell_index[np.arange(offsets[-1]) + shift])


def link_cells(cell_xy0: NDArray[np.floating], spots: Spots) -> Links:
    """Link every cell to every spot whose centre is at most a spot radius away.

    A cell under two spots belongs to both, since both measured it. The published code gives it to
    the last spot. Spots of Visium and ST arrays overlap only if their radius is enlarged.

    Args:
        cell_xy0: Cell centroids [N, 2] (x, y), level-0 px.
        spots: S spots in the same frame.

    Returns:
        Bags in the order of the spots, cells ascending; a spot without cells has an empty bag.
    """
    xy0 = np.asarray(cell_xy0, np.float64).reshape(-1, 2)
    if len(xy0) == 0 or len(spots) == 0:
        return Links(np.zeros(len(spots) + 1, np.int64), np.zeros(0, np.int64))
    # The tree may round distances: query a slightly larger radius, then compare exactly.
    near = cKDTree(xy0).query_ball_point(
        spots.xy0, r=spots.radius0 * (1 + 1e-9), return_sorted=True
    )
    num_near = np.array([len(cells) for cells in near], np.int64)
    cell_index = np.concatenate([np.asarray(cells, np.int64) for cells in near])
    spot_index = np.repeat(np.arange(len(spots)), num_near)
    offset_xy0 = xy0[cell_index] - spots.xy0[spot_index]
    inside = (offset_xy0**2).sum(axis=1) <= spots.radius0**2
    num_cells = np.bincount(spot_index[inside], minlength=len(spots))
    offsets = np.concatenate([[0], np.cumsum(num_cells)]).astype(np.int64)
    return Links(offsets, cell_index[inside])


def alignment_report(links: Links, num_cells: int) -> dict[str, float]:
    """Summarise the links; a wrong mpp or swapped axes show here first.

    Args:
        links: Links as link_cells returns them.
        num_cells: Number of cells on the slide.

    Returns:
        share_spots_with_cells, mean_cells_per_spot (over all spots), share_cells_in_spots
        (about 0.2 to 0.3 on Visium, the share of the area under spots), share_cells_in_many_spots.
    """
    num_spots = max(len(links), 1)
    spots_per_cell = np.bincount(links.cell_index, minlength=max(num_cells, 1))
    return {
        "share_spots_with_cells": float((links.num_cells > 0).sum() / num_spots),
        "mean_cells_per_spot": len(links.cell_index) / num_spots,
        "share_cells_in_spots": float((spots_per_cell > 0).mean()),
        "share_cells_in_many_spots": float((spots_per_cell > 1).mean()),
    }
