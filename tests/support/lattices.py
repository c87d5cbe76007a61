"""Lattices of spots."""

import numpy as np


def hexagons(pitch0=200.0, rows=8, columns=9):
    """Return rows and columns as Visium numbers them, and spot centres [S, 2]."""
    row, column = (axis.ravel() for axis in np.mgrid[:rows, :columns])
    column = 2 * column + row % 2
    return row, column, np.column_stack([column * pitch0 / 2, row * pitch0 * np.sqrt(0.75)])


def squares(pitch0=200.0, rows=8, columns=9):
    """Return rows, columns and spot centres [S, 2]."""
    row, column = (axis.ravel() for axis in np.mgrid[:rows, :columns])
    return row, column, np.column_stack([column, row]) * pitch0
