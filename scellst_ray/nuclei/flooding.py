"""The watershed from markers, without its queue.

Flooding takes the lowest pixel next to what is flooded, again and again (Meyer 1991, "Un
algorithme optimal pour la ligne de partage des eaux"). So a pixel is flooded when the water has
risen to the least height that a way from some marker to it must cross, its level, and it goes with
the neighbour flooded first: the one of the least level. Levels follow without a queue, from the
hollows that have no marker and the passes out of them. Only where neighbours of equal level go
with different markers does the order of a queue decide; then scikit-image's own is asked.

H, W: rows, columns; P: pixels to be flooded; K: hollows; E: pairs of neighbours across passes.
Pixels are numbered in the map with a frame of one pixel around it.
"""

import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import watershed

_MAX_ROUNDS = 64  # hollows in hollows; in smooth maps a few


def flood(
    height_HW: NDArray[np.float64], markers_HW: NDArray[np.int32], mask_HW: NDArray[np.bool_]
) -> NDArray[np.int32]:
    """Return skimage.segmentation.watershed(height_HW, markers_HW, mask=mask_HW), only faster.

    Args:
        height_HW: float64 [H, W], finite; low pixels are flooded first.
        markers_HW: int32 [H, W], above 0 where the flood starts.
        mask_HW: bool [H, W], what may be flooded, 4-connected.

    Returns:
        int32 [H, W], the marker each pixel of the mask goes with; 0 elsewhere.
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
    """Write the labels of dry pixels into `labels`; return False where a queue's order matters."""
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
        if (is_rising_P & (lowest_P >= level[dry_P])).any():  # level ground
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
    """Return the least value among each pixel's neighbours, and the neighbour that has it."""
    at = pixels + steps[0]
    least = values.take(at)
    for step in steps[1:]:
        other = pixels + step
        value = values.take(other)
        at = np.where(value < least, other, at)
        least = np.minimum(least, value)
    return least, at


def _follow(target: NDArray[np.intp], pixels: NDArray[np.intp]) -> None:
    """Let each pixel's target be the end of its way: a pixel that is its own target."""
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
    """Raise `level` in hollows without a marker to their lowest way out, in place.

    Args:
        level: Per pixel, starts as its height.
        height: Per pixel; infinite outside of the mask.
        labels: Per pixel, the marker or 0.
        bottom: Per pixel, where the steepest way down ends.
        dry_P: Pixels without a marker.
        steps: To the four neighbours.

    Returns:
        The bottoms that have a way out and where it leads, the pass or a pixel of a hollow that
        fills to the same level; or None if there are too many hollows within hollows.
    """
    inside = dry_P[labels[bottom[dry_P]] == 0]
    bottoms = inside[bottom[inside] == inside]
    number = np.zeros(len(height), np.int32)  # of the hollow, from 1; 0 for what drains to a marker
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
            found = np.flatnonzero(level_K < np.inf)[1:]
            return bottoms[found - 1], way_out_K[found]
        level_K[hollow_E[better]] = way_E[better]
        # The water comes over the pass itself, be it the last pixel of the hollow.
        is_pass = height[one_E[better]] == way_E[better]
        way_out_K[hollow_E[better]] = np.where(is_pass, one_E[better], other_E[better])
    return None


def _ways_out(
    number: NDArray[np.int32],
    height: NDArray[np.float64],
    inside: NDArray[np.intp],
    steps: NDArray[np.intp],
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return neighbours of different numbers, the first inside a hollow, sorted by its number."""
    one_E = np.tile(inside, len(steps))
    other_E = one_E + np.repeat(steps, len(inside))
    across_E = np.flatnonzero((number[other_E] != number[one_E]) & (height[other_E] < np.inf))
    order = across_E[np.argsort(number[one_E[across_E]], kind="stable")]
    return one_E[order], other_E[order]
