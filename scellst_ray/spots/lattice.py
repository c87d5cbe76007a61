"""Recognise lattices of spots, and measure their pitch in px.

The pitch is the distance of neighbouring spots. Visium has hexagons of 100 um; ST arrays, bins of
Visium HD and pooled squares have squares. S: spots.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

MIN_SPOTS = 6
# Distance to neighbours, in pitches: the next ring lies 1.41 (squares) or 1.73 (hexagons) away.
REACH = 1.2
# Largest deviation of a spot from the fitted lattice, and of the scales of both axes.
MAX_RESIDUAL, MAX_ANISOTROPY = 0.15, 0.05
MAX_SPOTS = 20_000


class Lattice(NamedTuple):
    """A lattice of spots.

    Attributes:
        kind: 'hexagons' or 'squares'.
        pitch0: Distance of neighbouring spots, level-0 px.
    """

    kind: str
    pitch0: float


def find_lattice(xy0: NDArray[np.floating]) -> Lattice | None:
    """Return the lattice that spots lie on; None if it cannot be told.

    Directions to the neighbours decide: multiples of 60 degrees on hexagons, of 90 degrees on
    squares, in whatever way the lattice is turned.

    Args:
        xy0: Spot centres [S, 2].
    """
    points = np.asarray(xy0, np.float64)
    if len(points) < MIN_SPOTS or not np.isfinite(points).all():
        return None
    tree = cKDTree(points)
    some = points[:: max(1, len(points) // MAX_SPOTS)]
    nearest = tree.query(some, k=2)[0][:, 1]
    pitch0 = float(np.median(nearest))
    if pitch0 <= 0 or np.mean(np.abs(nearest - pitch0) <= 0.1 * pitch0) < 0.8:
        return None
    distance, neighbour = tree.query(some, k=7, distance_upper_bound=REACH * pitch0)
    spot, order = np.nonzero(np.isfinite(distance) & (distance > 0))
    offset = points[neighbour[spot, order]] - some[spot]
    if len(offset) < MIN_SPOTS:
        return None
    angle = np.arctan2(offset[:, 1], offset[:, 0])
    six, four = (abs(np.exp(1j * number * angle).mean()) for number in (6, 4))
    if max(six, four) < 0.85 or min(six, four) > 0.5:
        return None
    return Lattice("hexagons" if six > four else "squares", float(np.median(distance[spot, order])))


def pitch_of_visium(
    rows: NDArray[np.floating], columns: NDArray[np.floating], xy0: NDArray[np.floating]
) -> float | None:
    """Return the pitch of Visium's hexagons, level-0 px; None if spots are not numbered so.

    Visium numbers every second column of a row: row + column is even, neighbours of a row are two
    columns apart, and rows are 0.87 pitches apart.

    Args:
        rows: Rows in the array [S].
        columns: Columns in the array [S].
        xy0: Spot centres [S, 2], level-0 px; the image may be turned or mirrored.
    """
    if len(rows) and not ((rows + columns) % 2 == 0).all():
        return None
    return _pitch_by_fit(np.column_stack([columns / 2, rows * np.sqrt(0.75)]), xy0)


def pitch_of_squares(
    rows: NDArray[np.floating], columns: NDArray[np.floating], xy0: NDArray[np.floating]
) -> float | None:
    """Return the pitch of numbered squares, level-0 px; None if the spots do not lie on squares.

    Arguments are those of `pitch_of_visium`.
    """
    return _pitch_by_fit(np.column_stack([columns, rows]).astype(np.float64), xy0)


def _pitch_by_fit(units: NDArray[np.float64], xy0: NDArray[np.floating]) -> float | None:
    """Return px per unit of an affine map from places in pitches [S, 2] to px; None if none fits.

    Both axes must have the same scale and stand at right angles.
    """
    points = np.asarray(xy0, np.float64)
    is_known = np.isfinite(units).all(axis=1) & np.isfinite(points).all(axis=1)
    units, points = units[is_known], points[is_known]
    if len(units) < MIN_SPOTS or np.ptp(units, axis=0).min(initial=np.inf) == 0:
        return None
    centred = units - units.mean(axis=0)
    target = points - points.mean(axis=0)
    matrix, _, rank, _ = np.linalg.lstsq(centred, target, rcond=None)
    if rank < 2:
        return None
    scales = np.linalg.svd(matrix, compute_uv=False)
    pitch0 = float(scales.mean())
    residual = np.abs(centred @ matrix - target).max(axis=1)
    is_lattice = (
        scales[0] - scales[1] <= MAX_ANISOTROPY * pitch0
        and np.percentile(residual, 95) <= MAX_RESIDUAL * pitch0
    )
    return pitch0 if is_lattice else None
