"""From labels to outlines: boundary pixels as OpenCV follows them, and polygons around them.

H, W: rows, columns; N: labels, 1 to N without gaps; B: boundary pixels; P: outline points.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

# The eight neighbours of a pixel, (dx, dy), turning from +x towards +y. Even: across an edge.
_STEPS = np.array([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])
_STEP_CODE = np.array([5, 6, 7, 4, -1, 0, 3, 2, 1])  # 3 (dy + 1) + dx + 1 -> row of _STEPS


def pixel_contours(labels_HW: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """Return the outlines that the published CellViT gives, of labels 1 to N.

    Through pixel centres, without the points inside straight runs; that of the first part if there
    are several. For comparison: the outline of a thin part touches itself, which is no polygon.

    Args:
        labels_HW: int32 [H, W], every label from 1 to N in it.

    Returns:
        Per label, int32 [K, 2], (x, y) pixel indices.
    """
    boxes = ndimage.find_objects(labels_HW)
    return [pixel_contour(labels_HW, index, box) for index, box in enumerate(boxes)]


def pixel_contour(
    labels_HW: NDArray[np.int32], index: int, box: tuple[slice, slice]
) -> NDArray[np.int32]:
    """Return the outline of label index + 1 as `pixel_contours` does."""
    mask_HW = (labels_HW[box] == index + 1).view(np.uint8)
    corner = (box[1].start, box[0].start)
    found, _ = cv2.findContours(mask_HW, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE, offset=corner)
    return np.asarray(found[0][:, 0])


def pixel_chains(
    compact_HW: NDArray[np.int32], boxes: list[tuple[slice, slice]], order: NDArray[np.integer]
) -> tuple[list[NDArray[np.int32]], NDArray[np.bool_]]:
    """Return each label's outer boundary pixels, (x, y) indices, in the order given.

    Looks only at the label's bounding box, so the cost is that of the nuclei, not of the map
    times their number. Also tells which labels, [N], have several parts or holes.
    """
    chains, is_broken = [], np.zeros(len(boxes), np.bool_)
    for index in order.tolist():
        rows, columns = box = boxes[index]
        mask = (compact_HW[box] == index + 1).view(np.uint8)
        found, tree = cv2.findContours(
            mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_NONE, offset=(columns.start, rows.start)
        )
        part = found[0]
        if len(found) > 1:
            is_broken[index] = True
            outer = [c for c, links in zip(found, tree[0], strict=True) if links[3] < 0]
            # By pixels enclosed (Pick's theorem), so that a line of pixels outranks a single one.
            part = max(outer, key=lambda c: cv2.contourArea(c) + len(c) / 2)
        chains.append(part[:, 0])
    return chains, is_broken


def _outer_edges() -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Tabulate which of a boundary pixel's edges lie outside, by 8 * back + ahead.

    OpenCV follows outer boundaries counter-clockwise as seen on screen (y down), with the outside
    on the right hand: from the previous pixel to the next against the order of _STEPS.

    Returns:
        Whether there is a k-th outer edge, bool [64, 4], and its middle from the pixel's corner,
        float64 [64, 4, 2].
    """
    exists, middle = np.zeros((64, 4), np.bool_), np.zeros((64, 4, 2))
    for back in range(8):
        for ahead in range(8):
            turn = (back - ahead - 1) % 8 + 1
            codes = [(back - k) % 8 for k in range(1, turn) if (back - k) % 2 == 0]
            exists[8 * back + ahead, : len(codes)] = True
            middle[8 * back + ahead, : len(codes)] = 0.5 + 0.5 * _STEPS[codes]
    return exists, middle


_EDGE_EXISTS, _EDGE_MIDDLE = _outer_edges()


def edge_middles(
    pixels: NDArray[np.int32], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Turn chains of boundary pixels into outlines through the middles of their outer edges.

    At every pixel the neighbours passed over when turning from the previous pixel of the chain
    to the next lie outside; each of them across an edge gives a point. The outline is the one
    marching squares draws at 0.5 (Lorensen and Cline 1987, in the plane): convex corners lose
    1/8 px2, concave ones gain it, and a closed curve has four more of the first, hence the half
    pixel. Points on a straight run are dropped.

    Args:
        pixels: int [B, 2], (x, y) indices, all chains one after the other as OpenCV orders them.
        lengths: int [N], pixels per chain.

    Returns:
        The points, float64 [P, 2], in continuous coordinates, and their number per chain.
    """
    start = run_offsets(lengths)[:-1]
    step = _following(pixels, start) - pixels
    ahead = _STEP_CODE[3 * step[:, 1] + step[:, 0] + 4]
    back = _preceding(ahead, start) ^ 4
    alone = ahead < 0
    ahead[alone], back[alone] = 1, 1  # a single pixel: pass over all of its neighbours
    turn = 8 * back + ahead
    exists = _EDGE_EXISTS[turn]
    row, k = np.nonzero(exists)
    points = pixels[row] + _EDGE_MIDDLE[turn[row], k]
    return _without_straight_runs(points, np.add.reduceat(exists.sum(axis=1), start))


def _without_straight_runs(
    points: NDArray[np.float64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Drop the points of closed outlines that lie on the line between their neighbours."""
    start = run_offsets(lengths)[:-1]
    step = _following(points, start) - points
    before = _preceding(step, start)
    corner = (step[:, 0] != before[:, 0]) | (step[:, 1] != before[:, 1])
    return points[corner], np.add.reduceat(corner, start, dtype=np.int64)


def _following(values: NDArray[Any], start: NDArray[np.int64]) -> NDArray[Any]:
    """Return what follows each value in its closed run; runs begin at `start`."""
    following = np.empty_like(values)
    following[:-1] = values[1:]
    following[np.append(start[1:], len(values)) - 1] = values[start]
    return following


def _preceding(values: NDArray[Any], start: NDArray[np.int64]) -> NDArray[Any]:
    """Return what precedes each value in its closed run; runs begin at `start`."""
    preceding = np.empty_like(values)
    preceding[1:] = values[:-1]
    preceding[start] = values[np.append(start[1:], len(values)) - 1]
    return preceding


def run_offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each of consecutive runs of these lengths begins, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
