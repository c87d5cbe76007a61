"""Open slides and read boxes of them at any resolution.

This is the only place where (x, y) and [H, W, C] meet. Boxes come in as (x, y, width, height) in
level-0 px. Arrays go out as uint8 [H, W, 3], with the frame that maps their px to level 0.
"""

import math
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scellst_ray.core.geometry import Box, Frame, check_mpp
from scellst_ray.core.resolution import check_agreement
from scellst_ray.slides.content import check_colours, check_content
from scellst_ray.slides.pixels import open_pixels
from scellst_ray.slides.resolution import check_objective

STRIP_PIXELS = 16_000_000
# The largest glass slides measure 127 x 102 mm. A larger slide has a damaged header, and its
# overview would not fit into memory.
MAX_SIDE_MM = 130.0
# Boxes start at multiples of this number of px read, so that a halved image keeps a common grid.
GRID_PX = 4


class Slide:
    """An open slide.

    Attributes:
        uri: Name for messages.
        mpp: Resolution in um per level-0 px.
        width0: Width in level-0 px.
        height0: Height in level-0 px.
    """

    def __init__(self, path: Path, uri: str = "", mpp: float | None = None) -> None:
        """Open a slide.

        Args:
            path: Local file, or a folder for formats that consist of one.
            uri: Name for messages; the path if empty.
            mpp: Resolution in um per level-0 px; None takes the file's.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is no image or is cut off, or its resolution or size is unknown
                or impossible.
        """
        self.uri = uri or str(path)
        if not path.exists():
            message = f"{self.uri}: no such file"
            raise FileNotFoundError(message)
        self._pixels = open_pixels(path, self.uri)
        try:
            stated = self._pixels.resolution
            if mpp is None and stated.mpp is None and stated.error:
                message = f"{self.uri}: {stated.error}"
                raise ValueError(message)
            self.mpp = check_mpp(stated.mpp if mpp is None else mpp, self.uri)
            self.width0, self.height0 = self._pixels.dimensions
            self._check_sides()
        except ValueError:
            self._pixels.close()
            raise

    def check_resolution(self, *, confirmed: bool) -> list[str]:
        """Compare the resolution in use with all that the file states.

        Args:
            confirmed: Whether the manifest confirms the resolution in use.

        Returns:
            One line for each statement that differs a little.

        Raises:
            ValueError: a statement differs by more than 10 % and nothing confirms the one in use.
        """
        resolution = self._pixels.resolution
        notes = check_agreement(resolution.stated, self.mpp, confirmed=confirmed, source=self.uri)
        if self.mpp != resolution.mpp:
            notes += check_objective(
                resolution.objective, self.mpp, confirmed=confirmed, source=self.uri
            )
        return notes

    def check_content(self) -> None:
        """Check a sample of the pixels: whether they are those of an H&E slide in one pyramid.

        Raises:
            ValueError: the picture is grey or nearly black, or a level is another picture.
        """
        check_content(self._pixels, self.uri)

    def check_overview(self, image: NDArray[np.uint8]) -> None:
        """Check the whole slide at a coarse resolution, where no tissue was found on it.

        Args:
            image: What `overview` returned, RGB uint8 [H, W, 3].

        Raises:
            ValueError: the picture is grey or nearly black.
        """
        # The white beyond the slide reaches into the pixels of its rim.
        inner = image[1:-1, 1:-1] if min(image.shape[:2]) > 2 else image
        check_colours([inner], self._pixels.bits, self.uri)

    def _check_sides(self) -> None:
        """Raise ValueError if the slide is larger than any glass slide."""
        sides_mm = (self.width0 * self.mpp / 1000, self.height0 * self.mpp / 1000)
        if not 0 < min(sides_mm) <= max(sides_mm) <= MAX_SIDE_MM:
            message = (
                f"{self.uri}: {self.width0} x {self.height0} px of {self.mpp:g} um are "
                f"{sides_mm[0]:.4g} x {sides_mm[1]:.4g} mm; a slide has at most {MAX_SIDE_MM:g} "
                "mm a side: the file is damaged, or correct the manifest's mpp"
            )
            raise ValueError(message)

    def __enter__(self) -> Self:
        """Return the open slide."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the slide."""
        self.close()

    def close(self) -> None:
        """Close the file; the slide cannot be read afterwards."""
        self._pixels.close()

    def read(self, box: Box, mpp: float) -> tuple[NDArray[np.uint8], Frame]:
        """Read a box at a resolution, from the coarsest level that is fine enough.

        Pixels lie on one grid for the whole slide: pixel j of an axis covers [j, j + 1) * ratio.
        The box is widened to this grid, so two overlapping boxes share their pixels and
        neighbouring tiles show a nucleus in the same pixels.

        Args:
            box: Box in level-0 px. It may reach beyond the slide, where pixels are white.
            mpp: um per px to return; the slide is enlarged if its own resolution is coarser.

        Returns:
            (RGB uint8 [H, W, 3], its frame). The frame's ratio is exactly mpp over the slide's mpp.
        """
        ratio = mpp / self.mpp
        left, width = _on_grid(box.x0, box.w0, ratio)
        top, height = _on_grid(box.y0, box.h0, ratio)
        return self._resample(left, top, width, height, ratio), box_frame(box, ratio)

    def overview(self, mpp: float) -> tuple[NDArray[np.uint8], Frame]:
        """Read the whole slide at a coarse resolution, in strips that bound the memory.

        Args:
            mpp: um per px to return.

        Returns:
            (RGB uint8 [H, W, 3], its frame).
        """
        ratio = mpp / self.mpp
        step = self.step(mpp)
        width, height = math.ceil(self.width0 / ratio), math.ceil(self.height0 / ratio)
        rows = max(1, int(STRIP_PIXELS / (width * step * step)))
        strips = [
            self._resample(0, row, width, min(rows, height - row), ratio)
            for row in range(0, height, rows)
        ]
        return np.concatenate(strips), Frame(0.0, 0.0, ratio, ratio)

    def step(self, mpp: float) -> float:
        """Return how many px of the file's best level one px of a result spans, along one axis.

        Args:
            mpp: um per px to return.
        """
        ratio = mpp / self.mpp
        return ratio / self._pixels.downsamples[self._level_for(ratio)]

    def _resample(
        self, left: int, top: int, width: int, height: int, ratio: float
    ) -> NDArray[np.uint8]:
        """Return px [left, left + width) x [top, top + height) of the grid of `ratio`."""
        level = self._level_for(ratio)
        step = ratio / self._pixels.downsamples[level]
        if abs(step - 1) < 1e-9:
            return self._pixels.region(level, left, top, width, height)
        # The resampling kernel reaches one output pixel, or one input pixel when enlarging.
        margin = math.ceil(max(step, 1.0)) + 1
        x, y = math.floor(left * step) - margin, math.floor(top * step) - margin
        x_end = math.ceil((left + width) * step) + margin
        y_end = math.ceil((top + height) * step) + margin
        region = self._pixels.region(level, x, y, x_end - x, y_end - y)
        within = (left * step - x, top * step - y)
        box = (*within, within[0] + width * step, within[1] + height * step)
        # Float, because 8-bit arithmetic rounds differently in boxes with another start.
        image = np.empty((height, width, 3), np.uint8)
        for channel in range(3):
            plane = Image.fromarray(np.ascontiguousarray(region[..., channel], np.float32))
            plane = plane.resize((width, height), Image.Resampling.BILINEAR, box=box)
            image[..., channel] = np.rint(np.asarray(plane))
        return image

    def _level_for(self, downsample: float) -> int:
        """Return the coarsest level whose downsample is at most `downsample` (0.5 % slack)."""
        fine_levels = [i for i, d in enumerate(self._pixels.downsamples) if d <= downsample * 1.005]
        return max(fine_levels, default=0)


def box_frame(box: Box, ratio: float) -> Frame:
    """Return the frame of the image that `Slide.read` returns for a box, without reading it.

    Args:
        box: Box in level-0 px.
        ratio: Level-0 px per px read.
    """
    left, _ = _on_grid(box.x0, box.w0, ratio)
    top, _ = _on_grid(box.y0, box.h0, ratio)
    return Frame(left * ratio, top * ratio, ratio, ratio)


def _on_grid(start0: int, size0: int, ratio: float) -> tuple[int, int]:
    """Return the first pixel and the number of pixels of the grid that cover a level-0 range."""
    slack = 1e-6  # rounding error of quotients that are whole numbers
    first = math.floor(start0 / ratio / GRID_PX + slack) * GRID_PX
    end = math.ceil((start0 + size0) / ratio / GRID_PX - slack) * GRID_PX
    return first, end - first
