"""Boxes of outlines, by which readers of GeoParquet find the nuclei of a window."""

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from scellst_ray.core.schemas import BBOX

SIDES = ("xmin", "ymin", "xmax", "ymax")
# GeoParquet's name for a column of boxes.
COVERING = {"bbox": {side: [BBOX.name, side] for side in SIDES}}


def with_boxes(cells: pa.Table) -> pa.Table:
    """Return cells with the column `bbox`: the box of each outline, level-0 px.

    Boxes are float32, and rounded outward: the outline lies within its box.

    Args:
        cells: Rows with the column `polygon`, WKB.
    """
    bounds = shapely.bounds(shapely.from_wkb(cells["polygon"].to_numpy())).reshape(-1, 4)
    sides = [_rounded(bounds[:, i], -np.inf if i < 2 else np.inf) for i in range(4)]
    boxes = pa.StructArray.from_arrays([pa.array(side) for side in sides], fields=list(BBOX.type))
    return cells.append_column(BBOX, boxes)


def _rounded(values: NDArray[np.float64], towards: float) -> NDArray[np.float32]:
    """Return the nearest float32 that is not on the other side."""
    near = values.astype(np.float32)
    is_within = near > values if towards < 0 else near < values
    return np.where(is_within, np.nextafter(near, np.float32(towards)), near)
