"""Opening slides and reading boxes of them at any resolution.

The only place where (x, y) and [H, W, C] meet: boxes and sizes come in as (x, y, width, height) in
level-0 px, arrays go out as uint8 [H, W, 3] with the frame that leads back to level 0.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from scellst_ray.cohort import check_mpp
from scellst_ray.geometry import Box, Frame

WHITE = 255
# A plain image is held decoded in memory; larger ones belong in a pyramidal TIFF.
MAX_PLAIN_PIXELS = 600_000_000
STRIP_PIXELS = 16_000_000
# Boxes start at multiples of this many px read, so that halving them keeps their grid too.
GRID_PX = 4


class _Pixels(Protocol):
    """What a backend offers: levels and boxes of level pixels."""

    dimensions: tuple[int, int]
    downsamples: list[float]
    mpp: float | None
    mpp_error: str | None

    def region(self, level: int, x: int, y: int, w: int, h: int) -> NDArray[np.uint8]:
        """Return level px [x, x + w) x [y, y + h) as RGB [h, w, 3], white outside the image."""
        ...

    def close(self) -> None:
        """Free what was opened."""
        ...


class Slide:
    """An open slide.

    Attributes:
        uri: The name messages use.
        mpp: um per level-0 px.
        width0: Width in level-0 px.
        height0: Height in level-0 px.
    """

    def __init__(self, path: Path, uri: str = "", mpp: float | None = None) -> None:
        """Open a slide.

        Args:
            path: Local file (a folder for formats that are one).
            uri: The name for messages; the path if empty.
            mpp: um per level-0 px, overriding the file's own.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: not an image, cut off, or its resolution is unknown or absurd.
        """
        self.uri = uri or str(path)
        if not path.exists():
            message = f"{self.uri}: no such file"
            raise FileNotFoundError(message)
        self._pixels = _open_pixels(path, self.uri)
        try:
            if mpp is None and self._pixels.mpp_error:
                message = f"{self.uri}: {self._pixels.mpp_error}"
                raise ValueError(message)
            self.mpp = check_mpp(self._pixels.mpp if mpp is None else mpp, self.uri)
        except ValueError:
            self._pixels.close()
            raise
        self.width0, self.height0 = self._pixels.dimensions

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
        """Read a box at a resolution, from the best level at or above it.

        Pixels lie on one grid for the whole slide, pixel j of an axis covering [j, j + 1) * ratio,
        and the box is widened to it: two boxes that overlap share their pixels, and what is found
        in one tile is found in its neighbour. The ratio is exact, whatever the resolution.

        Args:
            box: Level-0 px; may reach beyond the slide, which is white there.
            mpp: Wanted um per px; finer than the slide means enlarging it.

        Returns:
            RGB uint8 [H, W, 3] and its frame.
        """
        ratio = mpp / self.mpp
        left, width = _on_grid(box.x0, box.w0, ratio)
        top, height = _on_grid(box.y0, box.h0, ratio)
        return self._resampled(left, top, width, height, ratio), box_frame(box, ratio)

    def overview(self, mpp: float) -> tuple[NDArray[np.uint8], Frame]:
        """Read the whole slide at a low power, strip by strip, in bounded memory."""
        ratio = mpp / self.mpp
        step = ratio / self._pixels.downsamples[self._level_for(ratio)]
        width, height = math.ceil(self.width0 / ratio), math.ceil(self.height0 / ratio)
        rows = max(1, int(STRIP_PIXELS / (width * step * step)))
        strips = [
            self._resampled(0, row, width, min(rows, height - row), ratio)
            for row in range(0, height, rows)
        ]
        return np.concatenate(strips), Frame(0.0, 0.0, ratio, ratio)

    def _resampled(
        self, left: int, top: int, width: int, height: int, ratio: float
    ) -> NDArray[np.uint8]:
        """Return px [left, left + width) x [top, top + height) of the grid of a ratio."""
        level = self._level_for(ratio)
        step = ratio / self._pixels.downsamples[level]
        if abs(step - 1) < 1e-9:
            return self._pixels.region(level, left, top, width, height)
        # The antialiasing triangle reaches one output pixel far, or one input pixel if enlarging.
        margin = math.ceil(max(step, 1.0)) + 1
        x, y = math.floor(left * step) - margin, math.floor(top * step) - margin
        x_end = math.ceil((left + width) * step) + margin
        y_end = math.ceil((top + height) * step) + margin
        region = self._pixels.region(level, x, y, x_end - x, y_end - y)
        within = (left * step - x, top * step - y)
        box = (*within, within[0] + width * step, within[1] + height * step)
        # In float: 8-bit arithmetic rounds differently in boxes that start elsewhere.
        image = np.empty((height, width, 3), np.uint8)
        for channel in range(3):
            plane = Image.fromarray(np.ascontiguousarray(region[..., channel], np.float32))
            plane = plane.resize((width, height), Image.Resampling.BILINEAR, box=box)
            image[..., channel] = np.rint(np.asarray(plane))
        return image

    def _level_for(self, downsample: float) -> int:
        """Return the coarsest level that is still at least as fine as asked for."""
        fine = [i for i, d in enumerate(self._pixels.downsamples) if d <= downsample * 1.005]
        return max(fine, default=0)


def box_frame(box: Box, ratio: float) -> Frame:
    """Return the frame of what `Slide.read` reads of a box, without reading.

    Args:
        box: Level-0 px.
        ratio: Level-0 px per px read.
    """
    left, _ = _on_grid(box.x0, box.w0, ratio)
    top, _ = _on_grid(box.y0, box.h0, ratio)
    return Frame(left * ratio, top * ratio, ratio, ratio)


def _on_grid(start0: int, size0: int, ratio: float) -> tuple[int, int]:
    """Return the first pixel and the number of pixels of a grid that cover level-0 px."""
    slack = 1e-6  # quotients that should be whole
    first = math.floor(start0 / ratio / GRID_PX + slack) * GRID_PX
    end = math.ceil((start0 + size0) / ratio / GRID_PX - slack) * GRID_PX
    return first, end - first


def _open_pixels(path: Path, uri: str) -> _Pixels:
    try:
        if openslide.OpenSlide.detect_format(str(path)) is not None:
            return _OpenSlidePixels(path, uri)
    except openslide.OpenSlideError as error:
        message = f"{uri}: OpenSlide cannot open it ({error}); the file may be cut off or damaged"
        raise ValueError(message) from error
    return _PlainPixels(path, uri)


class _OpenSlidePixels:
    """A slide OpenSlide knows."""

    def __init__(self, path: Path, uri: str) -> None:
        self._uri = uri
        self._slide = openslide.OpenSlide(str(path))
        self.dimensions = self._slide.dimensions
        self.downsamples = [self._exact(level) for level in range(self._slide.level_count)]
        self.mpp, self.mpp_error = self._file_mpp()

    def _exact(self, level: int) -> float:
        """Return the level's downsample, whole where rounding the level's size explains the rest.

        OpenSlide reports the mean of two rounded ratios (4.004 for 2967 -> 741), which would
        shift the far end of a slide by several pixels.
        """
        whole = round(self._slide.level_downsamples[level])
        sizes = zip(self.dimensions, self._slide.level_dimensions[level], strict=True)
        if all(abs(size0 / whole - size) < 1 for size0, size in sizes):
            return float(whole)
        return float(self._slide.level_downsamples[level])

    def _file_mpp(self) -> tuple[float | None, str | None]:
        """Return the file's own um per px, or None and, where there is one, the reason."""
        values = [
            self._slide.properties.get(name)
            for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
        ]
        numbers = [float(value) for value in values if value is not None]
        if not numbers:
            return None, None
        if max(numbers) > 1.02 * min(numbers):
            return None, (
                f"pixels are not square: mpp {numbers[0]:g} by {numbers[1]:g}; resample the "
                "image, or give one mpp (um per level-0 px) in the manifest's mpp column"
            )
        return numbers[0], None

    def region(self, level: int, x: int, y: int, w: int, h: int) -> NDArray[np.uint8]:
        # OpenSlide rounds a negative location by up to a level px, so it is only asked for what
        # lies in the level. It divides the location by its own downsample: multiply by that one.
        # Where that is not whole, rounding costs at most half a level-0 px.
        scale = self._slide.level_downsamples[level]

        def inside(left: int, top: int, width: int, height: int) -> NDArray[np.uint8]:
            location = (round(left * scale), round(top * scale))
            rgba = np.asarray(self._slide.read_region(location, level, (width, height)))
            alpha = rgba[..., 3:]
            if alpha.min() == WHITE:
                return rgba[..., :3]
            return np.where(alpha == 0, np.uint8(WHITE), rgba[..., :3]).astype(np.uint8)

        try:
            return _on_white(self._slide.level_dimensions[level], (x, y, w, h), inside)
        except openslide.OpenSlideError as error:
            message = (
                f"{self._uri}: OpenSlide cannot read {w} x {h} px at ({x}, {y}) of level {level} "
                f"({error}); the file may be cut off or damaged: copy it anew"
            )
            raise ValueError(message) from error

    def close(self) -> None:
        self._slide.close()


class _PlainPixels:
    """A PNG, JPEG or plain TIFF, decoded whole; one level and no resolution of its own."""

    mpp: float | None = None
    mpp_error: str | None = None
    downsamples: list[float] = [1.0]  # noqa: RUF012 - never changed

    def __init__(self, path: Path, uri: str) -> None:
        try:
            with _large_images_allowed(), Image.open(path) as image:
                self.dimensions = image.size
                if image.size[0] * image.size[1] > MAX_PLAIN_PIXELS:
                    message = (
                        f"{uri}: {image.size[0]} x {image.size[1]} px is too large for a plain "
                        "image; convert it to a pyramidal TIFF (for example `vips tiffsave "
                        "--tile --pyramid`)"
                    )
                    raise ValueError(message)
                if image.mode.startswith(("I", "F")):
                    message = (
                        f"{uri}: pixels of type {image.mode!r}; expected 8 bits a channel: "
                        "convert it to 8-bit RGB"
                    )
                    raise ValueError(message)
                self._image = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            message = (
                f"{uri}: neither OpenSlide nor Pillow can read it as an image ({error}); "
                "it may be cut off, damaged or of another kind"
            )
            raise ValueError(message) from error

    def region(self, level: int, x: int, y: int, w: int, h: int) -> NDArray[np.uint8]:
        assert level == 0
        return _on_white(
            self.dimensions,
            (x, y, w, h),
            lambda left, top, w, h: self._image[top : top + h, left : left + w],
        )

    def close(self) -> None:
        self._image = np.empty((0, 0, 3), np.uint8)


def _on_white(
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    inside: Callable[[int, int, int, int], NDArray[np.uint8]],
) -> NDArray[np.uint8]:
    """Return a box of an image, white where it reaches beyond it.

    Args:
        size: (width, height) of the image.
        box: (x, y, width, height) wanted, px of the image.
        inside: Called with the part of the box (x, y, width, height) that lies in the image.
    """
    x, y, w, h = box
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, size[0]), min(y + h, size[1])
    out = np.full((h, w, 3), WHITE, np.uint8)
    if left < right and top < bottom:
        part = inside(left, top, right - left, bottom - top)
        out[top - y : bottom - y, left - x : right - x] = part
    return out


@contextmanager
def _large_images_allowed() -> Iterator[None]:
    """Lift Pillow's own size limit; ours is checked before decoding."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
