"""Compute the watershed from markers without a queue.

The classic algorithm repeatedly floods the lowest pixel next to a flooded one (Meyer 1991, "Un
algorithme optimal pour la ligne de partage des eaux"). Every path from a marker to a pixel crosses
some greatest height; the least of these over all paths is the pixel's level. Water reaches the
pixel at this level, and the pixel gets the marker of its neighbour with the least level.

A hollow is a basin without a marker; a pass is the lowest way out of it. Hollows and passes give
the levels without a queue. Only neighbours of equal level with different markers depend on the
order of the queue; such maps go to scikit-image's watershed.

H, W: rows, columns; P: pixels to flood; K: hollows; E: pairs of neighbours across passes. Pixel
numbers refer to the map with a frame of one pixel around it.
"""

import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import watershed

_MAX_ROUNDS = 64  # limit for hollows within hollows; smooth maps need a few rounds


def flood(
    height_HW: NDArray[np.float64], markers_HW: NDArray[np.int32], mask_HW: NDArray[np.bool_]
) -> NDArray[np.int32]:
    """Return skimage.segmentation.watershed(height_HW, markers_HW, mask=mask_HW), but faster.

    Args:
        height_HW: Finite heights, float64 [H, W]; low pixels are flooded first.
        markers_HW: Markers above 0 where the flood starts, int32 [H, W].
        mask_HW: Pixels that may be flooded, 4-connected, bool [H, W].

    Returns:
        Marker of each pixel of the mask, 0 elsewhere, int32 [H, W].
    """
    framed = (mask_HW.shape[0] + 2, mask_HW.shape[1] + 2)
    walled_HW = np.full(framed, np.inf)
    np.copyto(walled_HW[1:-1, 1:-1], height_HW, where=mask_HW)
    labels_HW = np.zeros(framed, np.int32)
    np.copyto(labels_HW[1:-1, 1:-1], markers_HW, where=mask_HW)
    dry_P = np.flatnonzero((labels_HW == 0) & (walled_HW < np.inf))
    steps = np.array([-framed[1], -1, 1, framed[1]])
    if not _spread(walled_HW.ravel(), labels_HW.ravel(), dry_P, steps):
        labels_HW = watershed(height_HW, markers_HW, mask=mask_HW)  # type: ignore[no-untyped-call]
        return np.asarray(labels_HW)
    return labels_HW[1:-1, 1:-1]


def _spread(
    height: NDArray[np.float64],
    labels: NDArray[np.int32],
    dry_P: NDArray[np.intp],
    steps: NDArray[np.intp],
) -> bool:
    """Write the labels of dry pixels into `labels`; return False if a queue's order matters.

    Args:
        height: Height per pixel, infinite outside of the mask.
        labels: Marker per pixel, 0 for dry pixels; changed in place.
        dry_P: Indices of the pixels without a marker.
        steps: Index steps to the four neighbours.
    """
    target = np.arange(len(height))
    lowest_P, at_P = _least(height, dry_P, steps)
    is_bottom_P = lowest_P >= height[dry_P]
    target[dry_P] = np.where(is_bottom_P, dry_P, at_P)
    level = height
    if is_bottom_P.any():
        downhill = target.copy()
        _follow(downhill, dry_P)
        level = height.copy()
        passes = _fill_hollows(level, height, labels, downhill, dry_P, steps)
        if passes is None:
            return False
        lowest_P, at_P = _least(level, dry_P, steps)
        is_rising_P = height[dry_P] == level[dry_P]
        if (is_rising_P & (lowest_P >= level[dry_P])).any():  # a plateau
            return False
        target[dry_P] = np.where(is_rising_P, at_P, downhill[dry_P])
        bottoms, ways_out = passes
        target[bottoms] = ways_out
    _follow(target, dry_P)
    labels[dry_P] = labels.take(target.take(dry_P))
    for step in steps:
        other_P = np.flatnonzero(labels.take(dry_P + step) != labels.take(dry_P))
        least_P = lowest_P[other_P]
        if ((level[dry_P[other_P] + step] == least_P) & (least_P < np.inf)).any():
            return False
    return True


def _least(
    values: NDArray[np.float64], pixels: NDArray[np.intp], steps: NDArray[np.intp]
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return the least value among each pixel's neighbours, and the index of that neighbour."""
    lowest = pixels + steps[0]
    least = values.take(lowest)
    for step in steps[1:]:
        neighbour = pixels + step
        value = values.take(neighbour)
        lowest = np.where(value < least, neighbour, lowest)
        least = np.minimum(least, value)
    return least, lowest


def _follow(target: NDArray[np.intp], pixels: NDArray[np.intp]) -> None:
    """Replace each pixel's target by the end of its path: a pixel that is its own target."""
    ends = target.take(pixels)
    while not np.array_equal(ends, further := target.take(ends)):
        target[pixels] = ends = further


def _fill_hollows(
    level: NDArray[np.float64],
    height: NDArray[np.float64],
    labels: NDArray[np.int32],
    bottom: NDArray[np.intp],
    dry_P: NDArray[np.intp],
    steps: NDArray[np.intp],
) -> tuple[NDArray[np.intp], NDArray[np.intp]] | None:
    """Raise `level` in hollows to the height of their lowest way out, in place.

    Args:
        level: Level per pixel; its height at first.
        height: Height per pixel, infinite outside of the mask.
        labels: Marker per pixel, or 0.
        bottom: Index of the pixel where the steepest way down ends, per pixel.
        dry_P: Indices of the pixels without a marker.
        steps: Index steps to the four neighbours.

    Returns:
        (bottoms of hollows that have a way out, the pixel it leads to). That pixel is the pass, or
        lies in a hollow that fills to the same level. None if hollows lie too deep within hollows.
    """
    inside = dry_P[labels[bottom[dry_P]] == 0]
    bottoms = inside[bottom[inside] == inside]
    # Number of each pixel's hollow, from 1; 0 for pixels that drain to a marker.
    number = np.zeros(len(height), np.int32)
    number[bottoms] = np.arange(1, len(bottoms) + 1)
    number[inside] = number[bottom[inside]]
    one_E, other_E = _ways_out(number, height, inside, steps)
    pass_E = np.maximum(height[one_E], height[other_E])
    hollow_E, next_E = number[one_E], number[other_E]
    level_K = np.full(len(bottoms) + 1, np.inf)
    level_K[0] = -np.inf
    way_out_K = np.zeros(len(bottoms) + 1, np.intp)
    start = np.flatnonzero(np.diff(hollow_E, prepend=0))
    length = np.diff(np.append(start, len(hollow_E)))
    for _ in range(_MAX_ROUNDS):
        way_E = np.maximum(pass_E, level_K[next_E])
        best_E = np.repeat(np.minimum.reduceat(way_E, start) if len(start) else way_E, length)
        better = np.flatnonzero((way_E == best_E) & (way_E < level_K[hollow_E]))
        if len(better) == 0:
            level[inside] = np.maximum(height[inside], level_K[number[inside]])
            open_hollows = np.flatnonzero(level_K < np.inf)[1:]
            return bottoms[open_hollows - 1], way_out_K[open_hollows]
        level_K[hollow_E[better]] = way_E[better]
        # Water leaves over the pass, which may be the last pixel of the hollow.
        is_pass = height[one_E[better]] == way_E[better]
        way_out_K[hollow_E[better]] = np.where(is_pass, one_E[better], other_E[better])
    return None


def _ways_out(
    number: NDArray[np.int32],
    height: NDArray[np.float64],
    inside: NDArray[np.intp],
    steps: NDArray[np.intp],
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return pairs of neighbours with different numbers, sorted by the number of the first.

    The first of each pair lies inside a hollow.
    """
    one_E = np.tile(inside, len(steps))
    other_E = one_E + np.repeat(steps, len(inside))
    across_E = np.flatnonzero((number[other_E] != number[one_E]) & (height[other_E] < np.inf))
    order = across_E[np.argsort(number[one_E[across_E]], kind="stable")]
    return one_E[order], other_E[order]
