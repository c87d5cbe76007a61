"""Plan the tiles of a slide: boxes only, no pixels.

A tile reads its core and a halo, the margin around the core. Cores partition the slide into
half-open boxes, so each nucleus belongs to one tile: the one whose core holds its centroid.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scellst_ray.core.geometry import Box, Frame

FINEST_MPP, COARSEST_MPP = 0.25, 0.5
# The published CellViT pipeline: trained at 0.25 um/px, it reads slides of 0.20 to 0.30 um/px
# without resampling and refuses slides coarser than 0.75 um/px.
NETWORK_MPP, NETWORK_NATIVE_MPP, NETWORK_COARSEST_MPP = 0.25, (0.20, 0.30), 0.75


@dataclass(frozen=True)
class Tile:
    """One tile of a slide.

    Attributes:
        tile_id: Number of the core, counted row by row over the whole slide, also without tissue.
        core: Core in level-0 px.
        read: Core and halo, the box that is read, in level-0 px.
    """

    tile_id: int
    core: Box
    read: Box


def default_read_mpp(mpp: float) -> float:
    """Return the resolution at which a slide is read, um per px.

    A slide of 0.25 to 0.5 um/px is read as it is. A finer slide is shrunk to 0.25, the resolution
    of the crops. A coarser slide is enlarged to 0.5, since touching nuclei merge in coarser pixels.
    """
    return min(max(mpp, FINEST_MPP), COARSEST_MPP)


def network_read_mpp(mpp: float, source: str) -> float:
    """Return the resolution at which CellViT reads a slide, um per px.

    Args:
        mpp: Resolution of the slide, um per level-0 px.
        source: Name of the slide for the message.

    Raises:
        ValueError: The slide is too coarse for a network trained at 0.25 um/px.
    """
    if mpp > NETWORK_COARSEST_MPP:
        message = (
            f"{source}: {mpp:g} um/px is coarser than {NETWORK_COARSEST_MPP}, the limit of "
            "CellViT (trained at 0.25); scan the slide again, or use segmenter hematoxylin"
        )
        raise ValueError(message)
    low, high = NETWORK_NATIVE_MPP
    return mpp if low <= mpp <= high else NETWORK_MPP


def plan_tiles(
    size0: tuple[int, int],
    ratio: float,
    mask: NDArray[np.bool_],
    mask_frame: Frame,
    core_px: int = 960,
    halo_px: int = 32,
) -> list[Tile]:
    """Return the tiles of one slide whose cores touch tissue, in row-major order.

    Args:
        size0: (width, height) of the slide in level-0 px.
        ratio: Level-0 px per px read (read mpp / slide mpp).
        mask: Tissue mask, bool [H, W].
        mask_frame: Frame of the mask on the slide.
        core_px: Core size in px read.
        halo_px: Halo on each side in px read.
    """
    edges_x, edges_y = tile_edges(size0, ratio, core_px)
    sums = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    tiles = []
    num_columns = len(edges_x) - 1
    for row in range(len(edges_y) - 1):
        for column in range(num_columns):
            x0, y0 = edges_x[column], edges_y[row]
            core = Box(x0, y0, edges_x[column + 1] - x0, edges_y[row + 1] - y0)
            if _count(sums, core, mask_frame) > 0:
                read_x0, read_w0 = _read_span(column, core_px, halo_px, ratio, size0[0])
                read_y0, read_h0 = _read_span(row, core_px, halo_px, ratio, size0[1])
                read = Box(read_x0, read_y0, read_w0, read_h0)
                tiles.append(Tile(row * num_columns + column, core, read))
    return tiles


def tile_edges(size0: tuple[int, int], ratio: float, core_px: int) -> tuple[list[int], list[int]]:
    """Return the edges of all cores in level-0 px: columns + 1 along x, rows + 1 along y."""
    edges_x, edges_y = (_edges(size, core_px * ratio) for size in size0)
    return edges_x, edges_y


def _read_span(index: int, core_px: int, halo_px: int, ratio: float, size0: int) -> tuple[int, int]:
    """Return start and size in level-0 px, along one axis, of the box that a tile reads.

    In px read the box is [index * core - halo, (index + 1) * core + halo), rounded inwards to
    level-0 px. Reading widens the box to the pixel grid, at most to this size, so all tiles have
    one size for a network. The last tile ends one halo beyond the slide.
    """
    slack = 1e-6  # level-0 px: rounding error of products that are whole numbers
    start0 = math.ceil((index * core_px - halo_px) * ratio - slack)
    end0 = math.floor(((index + 1) * core_px + halo_px) * ratio + slack)
    end0 = min(end0, size0 + math.ceil(halo_px * ratio))
    return start0, end0 - start0


def _edges(size0: int, step0: float) -> list[int]:
    """Return the edges of cores along one axis: multiples of `step0` rounded to level-0 px."""
    count = max(1, math.ceil(size0 / step0))
    edges = [round(i * step0) for i in range(count)] + [size0]
    # Rounding may make the last core empty.
    return [edge for i, edge in enumerate(edges) if i == 0 or edge > edges[i - 1]]


def _count(sums: NDArray[np.int64], box: Box, frame: Frame) -> int:
    """Count the mask pixels that a box touches.

    Args:
        sums: Summed-area table of the mask, [H + 1, W + 1].
        box: Box in level-0 px.
        frame: Frame of the mask on the slide.
    """
    corners = np.array([[box.x0, box.y0], [box.x0 + box.w0, box.y0 + box.h0]], np.float64)
    (left, top), (right, bottom) = frame.from_level0(corners)
    height, width = sums.shape[0] - 1, sums.shape[1] - 1
    c0, c1 = max(0, math.floor(left)), min(width, math.ceil(right))
    r0, r1 = max(0, math.floor(top)), min(height, math.ceil(bottom))
    return int(sums[r1, c1] - sums[r0, c1] - sums[r1, c0] + sums[r0, c0])
