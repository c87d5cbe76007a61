"""Nuclei at the seams between tiles: which ones a tile offers, and which of them are kept.

A tile owns the nuclei whose centroid lies in its half-open core. That alone loses and doubles
nuclei at the border of cores: one that reaches beyond the halo is cut and has another centroid in
each tile, and a network does not see quite the same in two tiles. So a tile also offers the nuclei
whose centroid lies a little outside its core (candidates). When all tiles of a slide are there,
those that show the same nucleus are found and all but one are dropped:

- Two nuclei of different tiles are the same if more than SAME of the smaller one lies in the other.
- The larger one is kept; one that is cut, and a candidate, count as DISCOUNT times their size.
- From large to small, a nucleus is dropped if it is the same as one that is kept. So what is
  dropped lies for a good part in something kept, and something only it covered is seldom lost.
- A candidate that is the same as none is a nucleus that no tile owns: it is kept.

The published merge (CellViT) drops nuclei wider than the overlap of tiles, drops the first of two
even if it is the larger, and takes neighbours that overlap by a few percent for one nucleus.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from scellst_ray.core.geometry import Box

NEAR, CANDIDATE, CUT = 1, 2, 4
TILE_BITS = 20  # cell_id = (tile_id << TILE_BITS) + index in the tile
# Of two equal discs 0.39 overlap where each centre lies on the other's rim: nuclei that touch stay
# far below, one nucleus seen twice far above, small ones shifted by 2 px in each tile included.
SAME = 0.4
# Enough to prefer the whole, owned nucleus of two alike; not enough to let one of two nuclei that
# a neighbour saw as one win over both: that loses the other.
DISCOUNT = 0.8
BAND = 8192  # boxes in one search tree: bounds the geometry objects alive at a time


class SeamCells(NamedTuple):
    """Nuclei that a neighbouring tile may also have: cell_id ascending int64 [N], WKB bytes [N]."""

    cell_id: NDArray[np.int64]
    seam: NDArray[np.uint8]
    polygon_wkb: NDArray[np.object_]


@dataclass(frozen=True)
class Resolution:
    """What to do with the nuclei a slide's tiles offer.

    Attributes:
        dropped: cell_ids to leave out, int64, ascending.
        num_doubled: Nuclei dropped that ownership alone would have doubled.
        num_adopted: Candidates kept that ownership alone would have lost.
    """

    dropped: NDArray[np.int64]
    num_doubled: int
    num_adopted: int


def offered(
    centroid_x0y0: NDArray[np.floating],
    box_x0y0x1y1: NDArray[np.floating],
    core: Box,
    read: Box,
    margin0: float,
    px0: float,
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return which nuclei a tile offers (index, int64 [M]) and their bits `seam` (uint8 [M]).

    Bits: NEAR, owned, but a neighbour's nucleus may meet it; CANDIDATE, the centroid lies outside
    the core but within the margin; CUT, it touches the border of what the tile read. 0: owned and
    met by nobody, since neighbours read no further than their halo.

    Args:
        centroid_x0y0: Centroids of all nuclei found in the tile, level-0 px, [N, 2].
        box_x0y0x1y1: Bounding boxes of their outlines, level-0 px, [N, 4].
        core: The tile's core.
        read: What the tile read.
        margin0: How far outside the core candidates are taken, level-0 px.
        px0: Size of a pixel read, level-0 px.
    """
    owned = core.contains(centroid_x0y0)
    x0, y0, x1, y1 = np.asarray(box_x0y0x1y1, np.float64).T
    core_x1, core_y1 = core.x0 + core.w0, core.y0 + core.h0
    read_x1, read_y1 = read.x0 + read.w0, read.y0 + read.h0
    # Read boxes are rounded to whole px of either kind, so a neighbour may read a little more.
    halo0 = max(core.x0 - read.x0, core.y0 - read.y0, read_x1 - core_x1, read_y1 - core_y1)
    reach0 = halo0 + 1 + px0
    inside = (x0 >= core.x0 + reach0) & (x1 <= core_x1 - reach0)
    inside &= (y0 >= core.y0 + reach0) & (y1 <= core_y1 - reach0)
    # An outline may run through the middles of the outermost pixels.
    edge0 = 0.75 * px0
    whole = (x0 > read.x0 + edge0) & (x1 < read_x1 - edge0)
    whole &= (y0 > read.y0 + edge0) & (y1 < read_y1 - edge0)
    x, y = np.asarray(centroid_x0y0, np.float64).T
    within = (x >= core.x0 - margin0) & (x < core_x1 + margin0)
    within &= (y >= core.y0 - margin0) & (y < core_y1 + margin0)
    index = np.flatnonzero(within)
    seam = np.where(owned, np.where(inside, 0, NEAR), CANDIDATE) | np.where(whole, 0, CUT)
    return index, seam[index].astype(np.uint8)


def resolve(parts: Callable[[], Iterable[SeamCells]]) -> Resolution:
    """Decide which nuclei offered by a slide's tiles to drop.

    Takes time in proportion to the number of nuclei. Holds some columns of all seam cells, but
    outlines only until the last nucleus that may be the same has come: those of a row of tiles.

    Args:
        parts: Gives the seam cells (seam > 0) of the whole slide, ascending by cell_id, in parts
            of any size; called twice.
    """
    ids, seams, boxes = [], [], []
    for part in parts():
        ids.append(part.cell_id)
        seams.append(part.seam)
        boxes.append(shapely.bounds(shapely.from_wkb(part.polygon_wkb)))
    if not ids:
        return Resolution(np.zeros(0, np.int64), 0, 0)
    cell_id, seam = np.concatenate(ids), np.concatenate(seams)
    assert (np.diff(cell_id) > 0).all()
    pairs = _overlapping_boxes(cell_id >> TILE_BITS, np.concatenate(boxes))
    same, area = _same_nucleus(cell_id, pairs, parts())
    pairs = pairs[same]
    candidate = seam & CANDIDATE > 0
    size = np.where(candidate, DISCOUNT, 1.0) * np.where(seam & CUT > 0, DISCOUNT, 1.0) * area
    dropped = _dropped(size, pairs)
    num_doubled, num_adopted = _differences(candidate, dropped, pairs)
    return Resolution(cell_id[dropped], num_doubled, num_adopted)


def _differences(
    candidate: NDArray[np.bool_], dropped: NDArray[np.bool_], pairs: NDArray[np.int64]
) -> tuple[int, int]:
    """Count what ownership alone would have doubled, and lost."""
    met, by = np.concatenate([pairs, pairs[:, ::-1]]).T
    met, by = met[~candidate[by]], by[~candidate[by]]
    by_owned, by_kept_owned = np.zeros((2, len(candidate)), np.bool_)
    by_owned[met] = True
    by_kept_owned[met[~dropped[by]]] = True
    doubled, adopted = ~candidate & dropped & by_kept_owned, candidate & ~dropped & ~by_owned
    return int(doubled.sum()), int(adopted.sum())


def _overlapping_boxes(tile: NDArray[np.int64], boxes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the pairs [P, 2], i < j, of different tiles whose boxes meet, ascending by j, i.

    Works from top to bottom in bands, so that only a band's boxes are geometry objects.
    """
    order = np.argsort(boxes[:, 1], kind="stable")
    found = [np.zeros((0, 2), np.int64)]
    above = order[:0]
    for start in range(0, len(order), BAND):
        band = order[start : start + BAND]
        above = above[boxes[above, 3] >= boxes[band[0], 1]]
        asking = np.concatenate([above, band])
        tree = shapely.STRtree(shapely.box(*boxes[band].T))
        asked, met = tree.query(shapely.box(*boxes[asking].T))
        pairs = np.stack([asking[asked], band[met]], axis=1)
        # Within the band each pair is found twice.
        once = (asked < len(above)) | (pairs[:, 0] < pairs[:, 1])
        found.append(np.sort(pairs[once & (tile[pairs[:, 0]] != tile[pairs[:, 1]])], axis=1))
        above = asking
    pairs = np.concatenate(found)
    return pairs[np.lexsort(pairs.T)]


def _same_nucleus(
    cell_id: NDArray[np.int64], pairs: NDArray[np.int64], parts: Iterable[SeamCells]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Tell which pairs show the same nucleus, bool [P]; and areas, level-0 px2, [N].

    The area of a cell without pairs is not needed, and left at 0.
    """
    same = np.zeros(len(pairs), np.bool_)
    area = np.zeros(len(cell_id))
    polygon = np.full(len(cell_id), None, np.object_)
    last_use = np.full(len(cell_id), -1, np.int64)
    last_use[pairs[:, 1]] = 0
    np.maximum.at(last_use, pairs[:, 0], pairs[:, 1])
    start = 0
    for part in parts:
        index = np.searchsorted(cell_id, part.cell_id)
        wanted = last_use[index] >= 0
        new = index[wanted]
        if not len(new):
            continue
        polygon[new] = _valid(shapely.from_wkb(part.polygon_wkb[wanted]))
        area[new] = shapely.area(polygon[new])
        end = int(np.searchsorted(pairs[:, 1], new[-1], side="right"))
        first, second = pairs[start:end].T
        overlap = shapely.area(shapely.intersection(polygon[first], polygon[second]))
        same[start:end] = overlap > SAME * np.minimum(area[first], area[second])
        done = np.concatenate([first, new])
        polygon[done[last_use[done] <= new[-1]]] = None
        start = end
    return same, area


def _valid(polygons: NDArray[np.object_]) -> NDArray[np.object_]:
    """Mend outlines that touch or cross themselves: overlaps of such cannot be computed."""
    bad = np.flatnonzero(~shapely.is_valid(polygons))
    polygons[bad] = shapely.make_valid(polygons[bad], method="structure", keep_collapsed=False)
    return polygons


def _dropped(size: NDArray[np.float64], pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which cells to drop, bool [N], so that of every pair at most one stays.

    Greedy, from large to small (of equal size the first): a cell is dropped if one that stays is
    its partner. A cell whose larger partners have all been dropped stays.
    """
    rank = np.empty(len(size), np.int64)
    rank[np.lexsort((np.arange(len(size)), -size))] = np.arange(len(size))
    swap = rank[pairs[:, 0]] > rank[pairs[:, 1]]
    pairs = np.where(swap[:, None], pairs[:, ::-1], pairs)
    # All pairs in which a cell may be dropped come before those in which it may drop another.
    dropped = np.zeros(len(size), np.bool_)
    for larger, smaller in pairs[np.argsort(rank[pairs[:, 0]], kind="stable")].tolist():
        if not dropped[larger]:
            dropped[smaller] = True
    return dropped
