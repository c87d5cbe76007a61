"""Turn labels into outlines: OpenCV's chains of boundary pixels, and polygons around them.

H, W: rows, columns; N: labels, 1 to N without gaps; B: boundary pixels; P: outline points; K:
points of one contour.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

# Steps (dx, dy) to the eight neighbours, turning from +x towards +y. Even ones cross an edge.
_STEPS = np.array([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])
_STEP_CODE = np.array([5, 6, 7, 4, -1, 0, 3, 2, 1])  # 3 (dy + 1) + dx + 1 -> row of _STEPS


def pixel_contour(
    labels_HW: NDArray[np.int32], index: int, box: tuple[slice, slice]
) -> NDArray[np.int32]:
    """Return the outline of one label that the published CellViT gives.

    An outline runs through pixel centres, without the points inside straight runs. If the label has
    several parts, the first one counts. The outline of a thin part touches itself and is then no
    polygon.

    Args:
        labels_HW: Label map that holds every label from 1 to N, int32 [H, W].
        index: The label less 1.
        box: Rows and columns of the label.

    Returns:
        Pixel indices (x, y), int32 [K, 2].
    """
    mask_HW = (labels_HW[box] == index + 1).view(np.uint8)
    corner = (box[1].start, box[0].start)
    contours, _ = cv2.findContours(mask_HW, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE, offset=corner)
    return np.asarray(contours[0][:, 0])


def pixel_chains(
    compact_HW: NDArray[np.int32], boxes: list[tuple[slice, slice]], order: NDArray[np.integer]
) -> tuple[list[NDArray[np.int32]], NDArray[np.bool_]]:
    """Return the outer boundary pixels of each label's largest part.

    The function reads only the label's box. So the cost grows with the area of the nuclei, not with
    the area of the map times their number.

    Args:
        compact_HW: Label map that holds every label from 1 to N, int32 [H, W].
        boxes: Box (rows, columns) of each label.
        order: Indices of labels, label - 1, in the wanted order.

    Returns:
        (pixel indices (x, y) per label, in that order; whether a label has several parts or holes,
        by index, bool [N]).
    """
    chains, is_broken = [], np.zeros(len(boxes), np.bool_)
    for index in order.tolist():
        rows, columns = box = boxes[index]
        mask = (compact_HW[box] == index + 1).view(np.uint8)
        contours, tree = cv2.findContours(
            mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_NONE, offset=(columns.start, rows.start)
        )
        part = contours[0]
        if len(contours) > 1:
            is_broken[index] = True
            outer = [c for c, links in zip(contours, tree[0], strict=True) if links[3] < 0]
            # Pick's theorem gives the enclosed pixels, so a line of pixels outranks a single one.
            part = max(outer, key=lambda c: cv2.contourArea(c) + len(c) / 2)
        chains.append(part[:, 0])
    return chains, is_broken


def _outer_edges() -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return a table of the edges of a boundary pixel that lie outside.

    A row is 8 * back + ahead: the rows of _STEPS that lead to the previous and to the next pixel.
    OpenCV follows outer boundaries counter-clockwise on screen (y down), with the outside on the
    right. From the previous to the next pixel it turns against the order of _STEPS.

    Returns:
        (whether a k-th outer edge exists, bool [64, 4]; its middle relative to the pixel's corner,
        float64 [64, 4, 2]).
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

    Turning from the previous pixel of a chain to the next passes over the neighbours outside. Each
    of them that shares an edge with the pixel gives a point. The outline equals that of marching
    squares at 0.5 (Lorensen and Cline 1987, in the plane).

    Convex corners lose 1/8 px2 and concave corners gain it. A closed curve has four more convex
    corners, so its area is half a pixel less. Points inside straight runs are dropped.

    Args:
        pixels: Pixel indices (x, y) of all chains in turn, in OpenCV's order, int [B, 2].
        lengths: Number of pixels per chain, int [N].

    Returns:
        (points in continuous coordinates, float64 [P, 2]; number of points per chain, int64 [N]).
    """
    start = run_offsets(lengths)[:-1]
    step = _following(pixels, start) - pixels
    ahead = _STEP_CODE[3 * step[:, 1] + step[:, 0] + 4]
    back = _preceding(ahead, start) ^ 4
    is_single = ahead < 0
    ahead[is_single], back[is_single] = 1, 1  # a single pixel has all of its neighbours outside
    turn = 8 * back + ahead
    exists = _EDGE_EXISTS[turn]
    row, k = np.nonzero(exists)
    points = pixels[row] + _EDGE_MIDDLE[turn[row], k]
    return _without_straight_runs(points, np.add.reduceat(exists.sum(axis=1), start))


def _without_straight_runs(
    points: NDArray[np.float64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return closed outlines without the points between collinear neighbours, and their lengths."""
    start = run_offsets(lengths)[:-1]
    step = _following(points, start) - points
    before = _preceding(step, start)
    corner = (step[:, 0] != before[:, 0]) | (step[:, 1] != before[:, 1])
    return points[corner], np.add.reduceat(corner, start, dtype=np.int64)


def _following(values: NDArray[Any], start: NDArray[np.int64]) -> NDArray[Any]:
    """Return the value after each value in its closed run; runs begin at `start`."""
    following = np.empty_like(values)
    following[:-1] = values[1:]
    following[np.append(start[1:], len(values)) - 1] = values[start]
    return following


def _preceding(values: NDArray[Any], start: NDArray[np.int64]) -> NDArray[Any]:
    """Return the value before each value in its closed run; runs begin at `start`."""
    preceding = np.empty_like(values)
    preceding[1:] = values[:-1]
    preceding[start] = values[np.append(start[1:], len(values)) - 1]
    return preceding


def run_offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the starts of consecutive runs of these lengths, and the end of the last run."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
