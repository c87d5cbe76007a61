"""Rasterising of outlines: a pixel belongs to the outline that contains its centre."""

import numpy as np
import shapely
from numpy.typing import NDArray


def rasterise(polygons_N: NDArray[np.object_], height: int, width: int) -> NDArray[np.int32]:
    """Return the label map of outlines: outline i has label i + 1, background has 0.

    The even-odd rule is applied along each row of pixel centres, so the result is exact for holes
    and for outlines of several parts. Where outlines overlap, the later one is on top. An outline
    that contains no pixel centre has no pixel.

    `nuclei_from_labels` draws outlines through the middles of outer pixel edges. Such an outline
    gives back the pixels it was made of, except filled holes and all parts but one.

    Args:
        polygons_N: shapely polygons or multipolygons [N], in px of the map, (x, y).
        height: Rows of the map.
        width: Columns of the map.

    Returns:
        int32 [H, W].
    """
    labels_HW = np.zeros((height, width), np.int32)
    owner, starts, ends = _segments(polygons_N)
    owner, row, x = _crossings(owner, starts, ends, height)
    # Along a row, crossings of an outline alternate: the first enters it, the second leaves it.
    order = np.lexsort((x, row, owner))
    owner, row, x = owner[order][::2], row[order][::2], x[order]
    # Centres x = column + 0.5 lie in [in, out): half-open, so neighbours never share a pixel.
    first = np.clip(np.ceil(x[::2] - 0.5), 0, width).astype(np.int64)
    last = np.clip(np.ceil(x[1::2] - 0.5), 0, width).astype(np.int64)
    lengths = np.maximum(last - first, 0)
    begin = np.cumsum(lengths) - lengths
    column = np.arange(lengths.sum()) + np.repeat(first - begin, lengths)
    # Sorted by owner: if an index comes twice, NumPy keeps the last value.
    labels_HW[np.repeat(row, lengths), column] = np.repeat(owner + 1, lengths)
    return labels_HW


def _segments(
    polygons_N: NDArray[np.object_],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the owner [S], start [S, 2] and end [S, 2] of every straight piece of all rings."""
    parts, owner = shapely.get_parts(polygons_N, return_index=True)
    rings, part = shapely.get_rings(parts, return_index=True)
    points, ring = shapely.get_coordinates(rings, return_index=True)
    same = ring[1:] == ring[:-1]
    owners = owner[part[ring[1:][same]]]
    return owners.astype(np.int64), points[:-1][same], points[1:][same]


def _crossings(
    owner: NDArray[np.int64], starts: NDArray[np.float64], ends: NDArray[np.float64], height: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return owner, row and x of every crossing of a piece with a row of pixel centres.

    A piece crosses the rows whose centres lie in [upper end, lower end). So every ring crosses
    every row an even number of times, even at corners.
    """
    low = np.minimum(starts[:, 1], ends[:, 1])
    high = np.maximum(starts[:, 1], ends[:, 1])
    first = np.clip(np.ceil(low - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(high - 0.5), 0, height).astype(np.int64)
    lengths = np.maximum(last - first, 0)
    piece = np.repeat(np.arange(len(owner)), lengths)
    row = np.arange(lengths.sum()) + np.repeat(first - (np.cumsum(lengths) - lengths), lengths)
    slope = (ends - starts)[piece]
    x = starts[piece, 0] + (row + 0.5 - starts[piece, 1]) * slope[:, 0] / slope[:, 1]
    return owner[piece], row, x
