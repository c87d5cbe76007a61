"""Settle nuclei at the seams between tiles: which a tile offers, and which of them are kept.

A seam is the border between two cores. A tile reads its core and a halo around it, and owns the
nuclei whose centroid lies in its half-open core. Ownership alone loses and doubles nuclei at seams.
A nucleus that reaches beyond the halo is cut and has another centroid in each tile. A network also
finds slightly different nuclei in two tiles. So a tile also offers candidates: nuclei whose
centroid lies a little outside its core. Once all tiles of a slide are complete:

- Two nuclei of different tiles are the same if more than SAME of the smaller lies in the larger.
- The larger is kept. A cut nucleus, and a candidate, count as DISCOUNT times their size.
- From large to small, a nucleus is dropped if it is the same as a kept one. So a large part of a
  dropped nucleus lies in a kept one, and tissue that only the dropped one covered is rarely lost.
- A candidate that is the same as no other is a nucleus that no tile owns, and is kept.

The published merge of CellViT drops nuclei wider than the overlap of tiles. It drops the first of
two nuclei even if it is the larger, and treats neighbours that overlap by a few percent as one.
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
# Two equal discs overlap by 0.39 if the centre of each lies on the rim of its partner. Touching
# nuclei overlap far less. A nucleus found twice, even small and shifted by 2 px, overlaps far more.
SAME = 0.4
# Low enough to prefer a complete, owned nucleus to a similar candidate. High enough that a single
# nucleus does not win over a neighbouring tile's outline of two, which would lose the second.
DISCOUNT = 0.8
BAND = 8192  # boxes per search tree, which bounds the number of geometry objects in memory


class SeamCells(NamedTuple):
    """Nuclei that a neighbouring tile may also offer.

    Attributes:
        cell_id: Cell ids, ascending, int64 [N].
        seam: Bits NEAR, CANDIDATE and CUT, uint8 [N] (see `select_offered`).
        polygon_wkb: Outlines in level-0 px, WKB bytes [N].
    """

    cell_id: NDArray[np.int64]
    seam: NDArray[np.uint8]
    polygon_wkb: NDArray[np.object_]


@dataclass(frozen=True)
class Resolution:
    """Decision about the nuclei that a slide's tiles offer.

    Attributes:
        dropped: cell_ids to leave out, int64, ascending.
        num_doubled: Number of dropped nuclei that ownership alone would have doubled.
        num_adopted: Number of kept candidates that ownership alone would have lost.
    """

    dropped: NDArray[np.int64]
    num_doubled: int
    num_adopted: int


def select_offered(
    centroid_x0y0: NDArray[np.floating],
    box_x0y0x1y1: NDArray[np.floating],
    core: Box,
    read: Box,
    margin0: float,
    px0: float,
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return which nuclei a tile offers (index, int64 [M]) and their bits `seam` (uint8 [M]).

    The bits are:

    - NEAR: the tile owns the nucleus, but a neighbour's nucleus may overlap it.
    - CANDIDATE: the centroid lies outside the core, but within the margin.
    - CUT: the nucleus touches the border of the box that the tile read.
    - 0: the tile owns the nucleus, and no neighbour's halo reaches it.

    Args:
        centroid_x0y0: Centroids of all nuclei found in the tile, level-0 px, [N, 2].
        box_x0y0x1y1: Bounding boxes of their outlines, level-0 px, [N, 4].
        core: Core of the tile.
        read: Box that the tile read.
        margin0: Largest distance of candidates from the core, level-0 px.
        px0: Size of a pixel read, level-0 px.
    """
    is_owned = core.contains(centroid_x0y0)
    x0, y0, x1, y1 = np.asarray(box_x0y0x1y1, np.float64).T
    core_x1, core_y1 = core.x0 + core.w0, core.y0 + core.h0
    read_x1, read_y1 = read.x0 + read.w0, read.y0 + read.h0
    # Rounding to whole px read and whole level-0 px lets a neighbour read slightly more.
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
    seam = np.where(is_owned, np.where(inside, 0, NEAR), CANDIDATE) | np.where(whole, 0, CUT)
    return index, seam[index].astype(np.uint8)


def resolve(parts: Callable[[], Iterable[SeamCells]]) -> Resolution:
    """Decide which of the nuclei that a slide's tiles offer are dropped.

    The time is proportional to the number of nuclei. Memory holds some columns of all seam cells,
    and the outlines of about one row of tiles. An outline is freed after its last possible partner.

    Args:
        parts: Function that yields the seam cells (seam > 0) of the slide, ascending by cell_id,
            in parts of any size. It is called twice.
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
    dropped = _choose_dropped(size, pairs)
    num_doubled, num_adopted = _differences(candidate, dropped, pairs)
    return Resolution(cell_id[dropped], num_doubled, num_adopted)


def _differences(
    candidate: NDArray[np.bool_], dropped: NDArray[np.bool_], pairs: NDArray[np.int64]
) -> tuple[int, int]:
    """Return the numbers of nuclei that ownership alone would have doubled and lost."""
    cell, partner = np.concatenate([pairs, pairs[:, ::-1]]).T
    cell, partner = cell[~candidate[partner]], partner[~candidate[partner]]
    has_owned, has_kept_owned = np.zeros((2, len(candidate)), np.bool_)
    has_owned[cell] = True
    has_kept_owned[cell[~dropped[partner]]] = True
    doubled, adopted = ~candidate & dropped & has_kept_owned, candidate & ~dropped & ~has_owned
    return int(doubled.sum()), int(adopted.sum())


def _overlapping_boxes(tile: NDArray[np.int64], boxes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the pairs of cells of different tiles whose boxes meet, int64 [P, 2].

    Pairs (i, j) have i < j and ascend by j, then i. Boxes are searched from top to bottom in bands,
    so that only the boxes of a band are geometry objects.
    """
    order = np.argsort(boxes[:, 1], kind="stable")
    pairs_of_bands = [np.zeros((0, 2), np.int64)]
    above = order[:0]
    for start in range(0, len(order), BAND):
        band = order[start : start + BAND]
        above = above[boxes[above, 3] >= boxes[band[0], 1]]
        queries = np.concatenate([above, band])
        tree = shapely.STRtree(shapely.box(*boxes[band].T))
        query, hit = tree.query(shapely.box(*boxes[queries].T))
        pairs = np.stack([queries[query], band[hit]], axis=1)
        # The tree returns each pair within the band twice.
        once = (query < len(above)) | (pairs[:, 0] < pairs[:, 1])
        is_pair = once & (tile[pairs[:, 0]] != tile[pairs[:, 1]])
        pairs_of_bands.append(np.sort(pairs[is_pair], axis=1))
        above = queries
    pairs = np.concatenate(pairs_of_bands)
    return pairs[np.lexsort(pairs.T)]


def _same_nucleus(
    cell_id: NDArray[np.int64], pairs: NDArray[np.int64], parts: Iterable[SeamCells]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return which pairs show the same nucleus, bool [P], and the areas in level-0 px2, [N].

    The area of a cell without pairs stays 0, since it is not needed.
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
        polygon[new] = _repair(shapely.from_wkb(part.polygon_wkb[wanted]))
        area[new] = shapely.area(polygon[new])
        end = int(np.searchsorted(pairs[:, 1], new[-1], side="right"))
        first, second = pairs[start:end].T
        overlap = shapely.area(shapely.intersection(polygon[first], polygon[second]))
        same[start:end] = overlap > SAME * np.minimum(area[first], area[second])
        done = np.concatenate([first, new])
        polygon[done[last_use[done] <= new[-1]]] = None
        start = end
    return same, area


def _repair(polygons: NDArray[np.object_]) -> NDArray[np.object_]:
    """Repair outlines that touch or cross themselves, since they have no computable overlaps."""
    invalid = np.flatnonzero(~shapely.is_valid(polygons))
    polygons[invalid] = shapely.make_valid(
        polygons[invalid], method="structure", keep_collapsed=False
    )
    return polygons


def _choose_dropped(size: NDArray[np.float64], pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which cells to drop, bool [N], so that at most one cell of every pair is kept.

    Cells are visited from large to small, cells of equal size in their order. A cell is dropped if
    a kept cell is its partner. It is kept if all its larger partners are dropped.
    """
    rank = np.empty(len(size), np.int64)
    rank[np.lexsort((np.arange(len(size)), -size))] = np.arange(len(size))
    swap = rank[pairs[:, 0]] > rank[pairs[:, 1]]
    pairs = np.where(swap[:, None], pairs[:, ::-1], pairs)
    # The order ensures that a cell's own fate is decided before it can drop another cell.
    dropped = np.zeros(len(size), np.bool_)
    for larger, smaller in pairs[np.argsort(rank[pairs[:, 0]], kind="stable")].tolist():
        if not dropped[larger]:
            dropped[smaller] = True
    return dropped
