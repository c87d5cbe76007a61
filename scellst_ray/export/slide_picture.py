"""A slide's picture as a pyramid that is read box by box, never as a whole.

A px of the finest level covers a whole number of level-0 px, and each further level halves the one
before it exactly. White beyond the slide fills up its last rows and columns.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scellst_ray.core.geometry import Box
from scellst_ray.runs.reading import Run
from scellst_ray.slides.reader import GRID_PX, Slide
from scellst_ray.slides.source import open_slide

PICTURE_MPP = 1.0
# Side of the largest box of the file that is decoded at once, px.
MOST_READ_PX = 2048
# A pyramid ends with the first level whose longer side is at most this, but has two levels or more.
COARSEST_PX = 1024
# The longer side of the finest level is at least this, if the slide has so many px.
SMALLEST_PX = 256


class PictureError(Exception):
    """A slide's picture cannot be read. The message names the file and the reason."""


@dataclass(frozen=True)
class Level:
    """A level of a picture, indexed like an array [3, H, W]; slices alone are read.

    Attributes:
        slide: The slide, open.
        ratio: Level-0 px per px.
        shape: (3, H, W).
    """

    slide: Slide
    ratio: int
    shape: tuple[int, int, int]
    dtype = np.dtype(np.uint8)
    ndim = 3

    def __getitem__(self, box: tuple[slice, slice, slice]) -> NDArray[np.uint8]:
        """Read a box: RGB uint8 [C, h, w].

        Raises:
            PictureError: the slide cannot be read there.
        """
        channels, rows, columns = box
        top, bottom, _ = rows.indices(self.shape[1])
        left, right, _ = columns.indices(self.shape[2])
        size = (max(0, bottom - top), max(0, right - left))
        image = np.empty((3, *size), np.uint8)
        side = self._side()
        for y in range(0, size[0], side):
            for x in range(0, size[1], side):
                height, width = min(side, size[0] - y), min(side, size[1] - x)
                part = self._read(left + x, top + y, width, height)
                image[:, y : y + height, x : x + width] = part.transpose(2, 0, 1)
        return image[channels]

    def _side(self) -> int:
        """Return the side of what is read at once: files without coarse levels have large boxes."""
        step = self.slide.step(self.ratio * self.slide.mpp)
        return max(GRID_PX, int(MOST_READ_PX / step) // GRID_PX * GRID_PX)

    def _read(self, left: int, top: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return px [left, left + width) x [top, top + height) of the level, [h, w, 3]."""
        box0 = Box(*(side * self.ratio for side in (left, top, width, height)))
        try:
            image, _ = self.slide.read(box0, self.ratio * self.slide.mpp)
        except (OSError, ValueError) as error:
            raise PictureError(_line(self.slide.uri, error)) from error
        # The reader widens a box to its grid, which may begin before the box.
        y, x = top % GRID_PX, left % GRID_PX
        return image[y : y + height, x : x + width]


@contextmanager
def open_picture(
    run: Run, slide_id: str, mpp: float = PICTURE_MPP, num_levels: int | None = None
) -> Iterator[list[Level]]:
    """Open a slide's picture; give its levels, the finest first.

    Args:
        run: The run, which knows the slide's file and resolution.
        slide_id: The slide.
        mpp: um per px of the finest level, which is rounded to a whole number of level-0 px.
        num_levels: Number of levels; as COARSEST_PX asks if None.

    Raises:
        PictureError: the slide's file is gone, cannot be read, is another one than that in which
            the run found the cells, or changed while it was open.
    """
    if slide_id not in run.sources:
        message = f"slides.json of {run.uri} does not say where slide {slide_id!r} is"
        raise PictureError(message)
    record, uri = run.records[slide_id], run.sources[slide_id]["uri"]
    try:
        opened = open_slide(uri, record["mpp"], recorded=record.get("source"))
    except FileNotFoundError as error:
        message = f"{uri} is gone"
        raise PictureError(message) from error
    except (OSError, ValueError) as error:
        raise PictureError(_line(uri, error)) from error
    with opened:
        yield levels_of(opened.slide, mpp, num_levels)
        try:
            opened.check()
        except ValueError as error:
            raise PictureError(str(error)) from error


def levels_of(slide: Slide, mpp: float, num_levels: int | None = None) -> list[Level]:
    """Return the levels of an open slide, see `open_picture`."""
    ratio = max(1, min(round(mpp / slide.mpp), max(slide.width0, slide.height0) // SMALLEST_PX))
    width, height = math.ceil(slide.width0 / ratio), math.ceil(slide.height0 / ratio)
    if num_levels is None:
        halvings = math.ceil(math.log2(max(width, height) / COARSEST_PX))
        num_levels = 1 + max(1, halvings)
    unit = 2 ** (num_levels - 1)
    width, height = math.ceil(width / unit) * unit, math.ceil(height / unit) * unit
    return [
        Level(slide, ratio * 2**i, (3, height // 2**i, width // 2**i)) for i in range(num_levels)
    ]


def _line(uri: str, error: Exception) -> str:
    """Return an error as one line that names the file."""
    text = " ".join(str(error).split())
    return text if uri in text else f"{uri}: {text}"
