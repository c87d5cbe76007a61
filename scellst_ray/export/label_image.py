"""Pictures in which each px has the number of its cell, for squidpy's `spatial_segment`."""

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray

from scellst_ray.export.cell_blocks import cell_blocks
from scellst_ray.runs.reading import Run

# OpenCV takes places as whole numbers of this part of a px.
_BITS = 4
# A cell without a px may get one so far from its centre, px.
_REACH_PX = 2


def label_image(
    run: Run, slide_id: str, shape: tuple[int, int], ratio: float
) -> tuple[NDArray[np.int32], int]:
    """Draw the outlines of a slide's cells, each filled with its number.

    The first cell has the number 1, and 0 is between the cells. Where outlines overlap, the px
    belongs to the later cell. A cell that would have no px gets one of a neighbour that has more,
    since squidpy gives cells the colours of others where one has no px.

    Args:
        run: The run.
        slide_id: The slide.
        shape: Height and width of the picture, px.
        ratio: Level-0 px per px.

    Returns:
        (Labels int32 [H, W], number of cells without a px.)
    """
    labels = np.zeros(shape, np.int32)
    centres: list[NDArray[np.float64]] = []
    number = 0
    for block in cell_blocks(run, slide_id, ["cell_id", "x0", "y0", "polygon"]):
        polygons = shapely.from_wkb(block.cells["polygon"].to_numpy())
        rings = shapely.get_exterior_ring(polygons)
        xy, of_ring = shapely.get_coordinates(rings, return_index=True)
        # OpenCV's whole numbers are the centres of px.
        places = np.rint((xy / ratio - 0.5) * 2**_BITS).astype(np.int32)
        starts = np.searchsorted(of_ring, np.arange(1, len(rings)))
        for points in np.split(places, starts):
            number += 1
            cv2.fillPoly(labels, [points], number, shift=_BITS)
        centres.append(np.stack([block.cells["x0"], block.cells["y0"]], axis=1) / ratio)
    if not number:
        return labels, 0
    return labels, _give_px(labels, np.concatenate(centres))


def _give_px(labels: NDArray[np.int32], centres_N2: NDArray[np.float64]) -> int:
    """Give a px to each cell that has none; return the number of those for which none was found."""
    counts = np.bincount(labels.ravel(), minlength=len(centres_N2) + 1)
    height, width = labels.shape
    steps = np.arange(-_REACH_PX, _REACH_PX + 1)
    around = sorted(
        ((dy, dx) for dy in steps for dx in steps), key=lambda at: at[0] ** 2 + at[1] ** 2
    )
    lost = 0
    for number in np.flatnonzero(counts[1:] == 0) + 1:
        x, y = np.floor(centres_N2[number - 1]).astype(int)
        for dy, dx in around:
            row, column = y + dy, x + dx
            if not (0 <= row < height and 0 <= column < width):
                continue
            owner = labels[row, column]
            if owner == 0 or counts[owner] > 1:
                counts[owner] -= 1
                counts[number] = 1
                labels[row, column] = number
                break
        else:
            lost += 1
    return lost
