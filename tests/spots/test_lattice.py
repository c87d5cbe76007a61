"""Lattices by their geometry and by their numbering."""

import numpy as np
import pytest

from scellst_ray.spots.lattice import find_lattice, pitch_of_squares, pitch_of_visium
from tests.support.lattices import hexagons, squares


def turned(xy0, degrees):
    angle = np.deg2rad(degrees)
    return xy0 @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) + 999


@pytest.mark.parametrize("degrees", [0, 7, 45, 90])
@pytest.mark.parametrize("make", [hexagons, squares])
def test_lattices_are_told_in_whatever_way_they_are_turned(make, degrees):
    xy0 = turned(make(137.0)[2], degrees) + np.random.default_rng(0).uniform(-1, 1, (72, 2))
    lattice = find_lattice(xy0)
    assert lattice is not None
    assert lattice.kind == make.__name__
    assert lattice.pitch0 == pytest.approx(137, rel=0.02)


def test_points_without_lattice_are_none():
    assert find_lattice(np.random.default_rng(0).uniform(0, 1000, (300, 2))) is None
    assert find_lattice(squares(rows=1)[2]) is None  # one row may belong to either
    assert find_lattice(squares()[2][:5]) is None
    assert find_lattice(np.zeros((9, 2))) is None
    assert find_lattice(np.full((9, 2), np.nan)) is None


@pytest.mark.parametrize("degrees", [0, 30, 180])
def test_the_pitch_by_visiums_numbers(degrees):
    row, column, xy0 = hexagons(200.0)
    assert pitch_of_visium(row, column, turned(xy0, degrees)) == pytest.approx(200)
    assert pitch_of_visium(row, column, np.rint(xy0 * [-1, 1])) == pytest.approx(200, rel=0.01)
    some = np.arange(len(xy0)) % 5 == 0
    assert pitch_of_visium(row[some], column[some], xy0[some]) == pytest.approx(200)


def test_other_numbers_say_nothing():
    row, column, xy0 = hexagons(200.0)
    assert pitch_of_visium(row, column + 1, xy0) is None  # row + column is odd
    assert pitch_of_visium(row, 2 * column, xy0) is None  # axes of another scale
    assert pitch_of_visium(row * 0, column * 0, xy0) is None
    assert pitch_of_visium(*squares()) is None
    assert pitch_of_visium(row[:4], column[:4], xy0[:4]) is None
    scattered = np.random.default_rng(0).permutation(xy0)
    assert pitch_of_visium(row, column, scattered) is None
    assert pitch_of_squares(*squares(29.0)) == pytest.approx(29)
    assert pitch_of_squares(*hexagons()) is None
