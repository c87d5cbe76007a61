"""A place of a slide from near: the outlines of its cells, coloured by a value or a type.

Shape letters: N cells, V points of an outline.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from scellst_ray.report.pictures import BLANK, FRAME, Picture, indexed
from scellst_ray.runs.reading import Run

# Side of the window on the slide, and of its picture.
WINDOW_UM, WINDOW_PX = 200.0, 280
# A window with fewer cells is no place to judge a gene by.
MIN_CELLS = 8


@dataclass(frozen=True)
class Window:
    """A square of a slide.

    Attributes:
        x0: Left side, level-0 px.
        y0: Top side, level-0 px.
        side0: Its side, level-0 px.
    """

    x0: float
    y0: float
    side0: float

    def holds(self, xy0_N2: NDArray[np.floating]) -> NDArray[np.int64]:
        """Return the rows of the cells whose centroid lies in it."""
        begin = np.array([self.x0, self.y0])
        inside = (xy0_N2 >= begin) & (xy0_N2 < begin + self.side0)
        return np.flatnonzero(inside.all(axis=1))


def highest_place(
    xy0_N2: NDArray[np.floating], values_N: NDArray[np.floating], mpp: float
) -> Window:
    """Return the window whose cells have the highest mean.

    Windows begin at multiples of half their side. One counts only if it has half as many cells as
    a quarter of the windows have: it must not lie half beyond the tissue.

    Args:
        xy0_N2: Centroids (x, y) of at least one cell, level-0 px.
        values_N: Their values.
        mpp: um per level-0 px.
    """
    step0 = WINDOW_UM / mpp / 2
    column_N, row_N = (xy0_N2 / step0).astype(np.int64).clip(min=0).T
    width, height = int(column_N.max()) + 2, int(row_N.max()) + 2
    numbers = row_N * width + column_N
    counts, sums = (
        _by_four(np.bincount(numbers, weights, width * height).reshape(height, width))
        for weights in (None, values_N)
    )
    usual = np.quantile(counts[counts > 0], 0.75)
    enough = min(max(MIN_CELLS, usual / 2), counts.max())
    means = np.where(counts >= enough, sums / np.maximum(counts, 1), -np.inf)
    row, column = np.unravel_index(int(means.argmax()), means.shape)
    return Window(float(column * step0), float(row * step0), 2 * step0)


def _by_four(table: NDArray[np.number]) -> NDArray[np.float64]:
    """Return the sums of each entry, its right and lower neighbour, and the one between these."""
    values = table.astype(np.float64)
    return values[:-1, :-1] + values[1:, :-1] + values[:-1, 1:] + values[1:, 1:]


def read_outlines(run: Run, slide_id: str, rows_N: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    """Return the outlines of some cells, float64 [V, 2] in level-0 px; reads only their row groups.

    Args:
        run: The run.
        slide_id: The slide.
        rows_N: Rows of CELLS, ascending.
    """
    found: list[bytes] = []
    with run.open_table(slide_id, "CELLS") as file:
        if file is None:
            return []
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            here = rows_N[(rows_N >= start) & (rows_N < end)] - start
            if len(here):
                column = file.read_row_group(group, columns=["polygon"])["polygon"]
                found += column.take(pa.array(here)).to_pylist()
            start = end
    return [shapely.get_coordinates(shapely.from_wkb(wkb)) for wkb in found]


def draw_outlines(
    outlines: list[NDArray[np.float64]],
    colours_N: NDArray[np.uint8],
    window: Window,
    alt: str,
    colours: Sequence[Sequence[int]] = (),
) -> Picture:
    """Return a picture of outlines, each filled with the colour of its number.

    Args:
        outlines: Outlines, float64 [V, 2] each, level-0 px.
        colours_N: Numbers of colours, see `pictures.indexed`.
        window: What to show.
        alt: What it shows.
        colours: RGB of the numbers; those of values if empty.
    """
    image = Image.new("L", (WINDOW_PX, WINDOW_PX), BLANK)
    draw = ImageDraw.Draw(image)
    scale = WINDOW_PX / window.side0
    for outline, colour in zip(outlines, colours_N.tolist(), strict=True):
        points = ((outline - (window.x0, window.y0)) * scale).round(1)
        draw.polygon([tuple(point) for point in points.tolist()], fill=colour, outline=FRAME)
    return indexed(np.asarray(image), alt, colours)
