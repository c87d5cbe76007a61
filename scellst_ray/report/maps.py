"""Maps over a slide: values of cells as means of small squares, types, and spots.

Shape letters: N cells, S spots, R rows and C columns of squares.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from scellst_ray.report.pictures import BLANK, Picture, indexed, levels

# Longer side of a map, px: three stand side by side.
MAP_PX = 360
# So many cells lie in a square on average, if the slide were evenly filled.
CELLS_A_SQUARE = 3.0


@dataclass(frozen=True)
class Squares:
    """Squares over a slide, each of which is some px of a map.

    Attributes:
        shape: Rows and columns of squares.
        zoom: Side of a square on the map, px.
        side0: Side of a square on the slide, level-0 px.
        of_cell_N: Number of each cell's square, int64 [N].
        size_px: Width and height of the map, px.
    """

    shape: tuple[int, int]
    zoom: int
    side0: float
    of_cell_N: NDArray[np.int64]
    size_px: tuple[int, int]

    def means(self, values_N: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the mean of the cells of each square, float64 [R, C]; NaN without finite cells."""
        length = self.shape[0] * self.shape[1]
        known_N = np.isfinite(values_N)
        of_cell_N, values_N = self.of_cell_N[known_N], values_N[known_N]
        counts = np.bincount(of_cell_N, minlength=length)
        sums = np.bincount(of_cell_N, weights=values_N, minlength=length)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(sums / counts).reshape(self.shape)

    def commonest(self, codes_N: NDArray[np.integer], num: int) -> NDArray[np.uint8]:
        """Return the commonest code of each square, uint8 [R, C]; BLANK without cells.

        Cells of negative codes do not count.
        """
        length = self.shape[0] * self.shape[1]
        known_N = codes_N >= 0
        numbers_N = self.of_cell_N[known_N] * num + codes_N[known_N]
        counts = np.bincount(numbers_N, minlength=length * num)
        table = counts.reshape(length, num)
        found = np.where(table.any(axis=1), table.argmax(axis=1), BLANK)
        return found.astype(np.uint8).reshape(self.shape)

    def drawn(self, squares_RC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return squares as a map, uint8 [H, W]."""
        large = squares_RC.repeat(self.zoom, axis=0).repeat(self.zoom, axis=1)
        return large[: self.size_px[1], : self.size_px[0]]


def squares_over(
    xy0_N2: NDArray[np.floating], size0: tuple[int, int], longest_px: int = MAP_PX
) -> Squares:
    """Return squares that are small where a slide has many cells.

    Args:
        xy0_N2: Centroids (x, y) of cells, level-0 px.
        size0: Width and height of the slide, level-0 px.
        longest_px: Longer side of the map, px.
    """
    width0, height0 = size0
    px0 = max(size0) / longest_px
    area_px = width0 * height0 / px0**2
    wanted = math.sqrt(CELLS_A_SQUARE * area_px / max(1, len(xy0_N2)))
    zoom = min(max(1, round(wanted)), 16)
    side0 = zoom * px0
    shape = (math.ceil(height0 / side0), math.ceil(width0 / side0))
    # A centroid may lie a little beyond the slide.
    column_N = (xy0_N2[:, 0] / side0).astype(np.int64).clip(0, shape[1] - 1)
    row_N = (xy0_N2[:, 1] / side0).astype(np.int64).clip(0, shape[0] - 1)
    size_px = (max(1, round(width0 / px0)), max(1, round(height0 / px0)))
    return Squares(shape, zoom, side0, row_N * shape[1] + column_N, size_px)


def limits_of(values: NDArray[np.floating]) -> tuple[float, float]:
    """Return the values at which a colour scale begins and ends: the 1 % and 99 % quantiles."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 0.0
    low, high = np.quantile(finite, (0.01, 0.99))
    return float(low), float(high)


def mean_map(
    squares: Squares, means_RC: NDArray[np.floating], limits: tuple[float, float], alt: str
) -> Picture:
    """Return the map of means, coloured from the lower to the upper limit."""
    return indexed(squares.drawn(levels(means_RC, *limits)), alt)


def spot_map(
    xy0_S2: NDArray[np.floating],
    radius0: float,
    values_S: NDArray[np.floating],
    size0: tuple[int, int],
    alt: str,
) -> tuple[Picture, tuple[float, float]]:
    """Return a map of discs, and the limits of its colour scale.

    Args:
        xy0_S2: Centres of spots, level-0 px.
        radius0: Their radius, level-0 px.
        values_S: Value of each; NaN: not known.
        size0: Width and height of the slide, level-0 px.
        alt: What it shows.
    """
    px0 = max(size0) / MAP_PX
    limits = limits_of(values_S)
    image = Image.new("L", (max(1, round(size0[0] / px0)), max(1, round(size0[1] / px0))), BLANK)
    draw = ImageDraw.Draw(image)
    radius_px = max(radius0 / px0, 1.0)
    for (x, y), colour in zip(xy0_S2 / px0, levels(values_S, *limits).tolist(), strict=True):
        if colour != BLANK:
            box = (x - radius_px, y - radius_px, x + radius_px, y + radius_px)
            draw.ellipse(box, fill=colour)
    return indexed(np.asarray(image), alt), limits
