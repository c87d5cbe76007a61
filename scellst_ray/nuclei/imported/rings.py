"""Outer rings of objects, and which objects with several rings are classes of nuclei.

An object with several parts is a nucleus in pieces or a class of nuclei. Formats do not say which
it is, so the geometry decides: pieces of one nucleus touch or nearly do, nuclei of a class lie
apart. Arrays: P points, R rings, N objects.
"""

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

# A part below this share of the object's largest part is a crumb, which decides nothing.
CRUMB = 0.1
# Pieces of one nucleus: highest number, and widest gap in level-0 px and as a share of their side.
MAX_PIECES = 7
GAP_PX, GAP_SHARE = 3.0, 0.1
# Three or more pieces of one nucleus fill at least this share of their convex hull.
FILLED = 0.7


@dataclass(frozen=True)
class Rings:
    """Outer rings of the parts of objects.

    Attributes:
        points_x0y0: Points of all rings in turn, closed or not, float64 [P, 2].
        lengths: Number of points per ring, int64 [R].
        owner: Number of the object to which a ring belongs, ascending, int64 [R].
        missing: Reason (a key of `Tally.dropped`) if an object has no ring, str [N].
        has_hole: Whether the part within a ring has holes, bool [R].
    """

    points_x0y0: NDArray[np.float64]
    lengths: NDArray[np.int64]
    owner: NDArray[np.int64]
    missing: NDArray[np.str_]
    has_hole: NDArray[np.bool_]

    def select(self, start: int, stop: int) -> "Rings":
        """Return the rings of objects `start` to `stop` (exclusive), numbered from 0 again."""
        first, last = np.searchsorted(self.owner, [start, stop])
        offset = self.lengths[:first].sum()
        lengths, has_hole = self.lengths[first:last], self.has_hole[first:last]
        points = self.points_x0y0[offset : offset + lengths.sum()]
        owner = self.owner[first:last] - start
        return Rings(points, lengths, owner, self.missing[start:stop], has_hole)

    def take(self, rings: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the points of some rings in turn [P', 2], and the place of each point's ring."""
        lengths = self.lengths[rings]
        starts = (np.cumsum(self.lengths) - self.lengths)[rings]
        place = np.repeat(np.arange(len(rings)), lengths)
        within = np.arange(lengths.sum()) - (np.cumsum(lengths) - lengths)[place]
        return self.points_x0y0[starts[place] + within], place


def split_classes(rings: Rings) -> tuple[Rings, NDArray[np.int64]]:
    """Return the rings with each part of a class as an object of its own.

    Args:
        rings: Outer rings of N objects.

    Returns:
        The rings of M >= N objects, and the number of the old object of each, int64 [M].
    """
    num_objects = len(rings.missing)
    num_parts = np.bincount(rings.owner, minlength=num_objects)
    is_class = np.zeros(num_objects, np.bool_)
    if (num_parts > 1).any():
        is_class = _are_classes(rings)
    num_new = np.where(is_class, num_parts, 1)
    source = np.repeat(np.arange(num_objects), num_new)
    within = np.arange(len(rings.owner)) - (np.cumsum(num_parts) - num_parts)[rings.owner]
    starts = (np.cumsum(num_new) - num_new)[rings.owner]
    owner = starts + within * is_class[rings.owner]
    missing = rings.missing[source]
    return Rings(rings.points_x0y0, rings.lengths, owner, missing, rings.has_hole), source


def ring_areas(rings: Rings) -> NDArray[np.float64]:
    """Return the area within each ring in px2, float64 [R]; 0 if a point is not finite."""
    points, lengths = rings.points_x0y0, rings.lengths
    ring = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    following = np.arange(len(points)) + 1
    is_last = np.append(ring[1:] != ring[:-1], [True] * bool(len(ring)))
    following[is_last] = starts[ring[is_last]]
    with np.errstate(all="ignore"):  # huge and missing coordinates give no finite area
        # Points are taken from the ring's first one: nothing cancels far from the origin.
        x, y = (points - points[starts[ring]]).T
        cross = x * y[following] - x[following] * y
        area = np.abs(np.bincount(ring, cross, minlength=len(lengths))) / 2
    return np.where(np.isfinite(area), area, 0.0)


def _are_classes(rings: Rings) -> NDArray[np.bool_]:
    """Return which objects are classes of nuclei, bool [N]."""
    num_objects = len(rings.missing)
    area = ring_areas(rings)
    largest = np.zeros(num_objects)
    np.maximum.at(largest, rings.owner, area)
    is_large = (area > 0) & (area >= CRUMB * largest[rings.owner])
    num_large = np.bincount(rings.owner[is_large], minlength=num_objects)
    is_class = num_large > MAX_PIECES
    pieces = np.flatnonzero(is_large & ((num_large > 1) & ~is_class)[rings.owner])
    if len(pieces):
        objects, owner = np.unique(rings.owner[pieces], return_inverse=True)
        points, place = rings.take(pieces)
        num_groups = _count_groups(points, place, owner, area[pieces])
        hulls = shapely.convex_hull(shapely.multipoints(points, indices=owner[place]))
        filled = np.bincount(owner, area[pieces]) / np.maximum(shapely.area(hulls), 1e-9)
        is_loose = (num_large[objects] > 2) & (filled < FILLED)
        is_class[objects] = (num_groups > 1) | is_loose
    return is_class


def _count_groups(
    points: NDArray[np.float64],
    place: NDArray[np.int64],
    owner: NDArray[np.int64],
    area: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Return into how many groups of neighbours the pieces of each object fall.

    Args:
        points: Points of the pieces in turn, [P, 2].
        place: Number of the piece to which a point belongs, [P].
        owner: Number of the object of each piece, ascending, [R].
        area: Areas of the pieces in px2, [R].
    """
    # Every finisher loads this module, and few of them import nuclei.
    from scipy.sparse import coo_array  # noqa: PLC0415
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    # A ring of one or two points, which has no polygon, has no area and is no piece.
    polygons = np.atleast_1d(shapely.polygons(shapely.linearrings(points, indices=place)))
    num_pieces = np.bincount(owner)
    last = np.cumsum(num_pieces)[owner]
    num_later = last - np.arange(len(owner)) - 1
    first = np.repeat(np.arange(len(owner)), num_later)
    second = first + 1 + np.arange(len(first)) - (np.cumsum(num_later) - num_later)[first]
    widest = np.maximum(GAP_PX, GAP_SHARE * np.sqrt(np.minimum(area[first], area[second])))
    is_near = shapely.distance(polygons[first], polygons[second]) <= widest
    edges = (np.ones(int(is_near.sum()), np.bool_), (first[is_near], second[is_near]))
    graph = coo_array(edges, shape=(len(owner), len(owner)))
    _, group = connected_components(graph, directed=False)
    pairs = np.unique(np.column_stack([owner, group]), axis=0)
    return np.bincount(pairs[:, 0])
