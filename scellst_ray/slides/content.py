"""A look at a slide's pixels: pictures that are no H&E slide, and levels of another picture.

It reads some 200 small windows, a fraction of what looking for tissue reads.
"""

import math
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from scellst_ray.slides.pixels import Pixels
from scellst_ray.slides.tiff_pages import TO_8_BITS

GREY = (
    "a grey picture; H&E has colours. Give the colour scan; if its channels are separate pages or "
    "files, join them to RGB"
)
WINDOWS, WINDOW_PX = 8, 64
# Px decoded for all windows where tiles are large; the largest tiles whose levels are compared.
MOST_DECODED_PX, MAX_TILE_PX = 2**25, 2**20
# Channels of a grey picture differ by no more, of one in JPEG included.
GREY_SPREAD = 2
# A picture with less contrast is blank glass.
MIN_CONTRAST = 30
# H&E is scanned on white glass. The brightest pixel of 14 bits in 16 is 63 of 255.
DARK, DARK_16_BITS = 64, 128
# Fewer px are defects of a camera, which have the full range of 16 bits.
BRIGHT_SHARE = 0.005
# Levels of more px are no label, no overview of the glass and no thumbnail.
MAX_FOREIGN_PX = 4_000_000
# A level that is coarser against the finer one is not used to look for tissue.
MAX_FINE_PX = 1536
BLOCK_PX, BLOCKS, DARKEST = 16, 5, 6
# The mean of a block differs by less between two levels, however the smaller one was made.
MAX_BLOCK_DIFFERENCE = 40
MIN_DIFFERENT = 2


def check_content(pixels: Pixels, uri: str) -> None:
    """Check that pixels are those of an H&E slide in one pyramid.

    Args:
        pixels: The open slide.
        uri: Name for messages.

    Raises:
        ValueError: the picture is grey, or nearly black as 10 to 14 bits in 16 are, or a level is
            another picture than the level above it.
    """
    if pixels.is_grey:
        message = f"{uri}: {GREY}"
        raise ValueError(message)
    levels: list[int] = []
    if pixels.levels_by_tags and pixels.tile_pixels <= MAX_TILE_PX:
        levels = [n for n in range(1, len(pixels.downsamples)) if _is_comparable(pixels, n)]
    check_colours(list(_windows(pixels)), pixels.bits, uri)
    places = _places(pixels, levels[-1]) if levels else []
    for level in levels:
        _check_level(pixels, level, places, uri)


def check_colours(parts: Sequence[NDArray[np.uint8]], bits: int, uri: str) -> None:
    """Check that a picture is bright and has colours.

    Args:
        parts: Parts of the picture, RGB uint8 [H, W, 3] each.
        bits: Bits a channel in the file.
        uri: Name for messages.

    Raises:
        ValueError: it is not bright, or is grey and not blank.
    """
    lightest = [_over_channels(np.maximum, part) for part in parts]
    brightest = _brightest(lightest)
    darkest = min(int(part.min()) for part in parts)
    if brightest < (DARK if bits == 8 else DARK_16_BITS):
        used = round(math.log2(256 * max(brightest, 1)))
        cause = f"; of 16 bits a channel, {used} are used" if bits > 8 else ""
        message = (
            f"{uri}: the picture is nearly black, its brightest value is {brightest} of 255{cause}"
            f"; H&E is bright. If its samples have fewer bits than the file says, {TO_8_BITS}"
        )
        raise ValueError(message)
    darker = (_over_channels(np.minimum, part) for part in parts)
    spread = max(int((a - b).max()) for a, b in zip(lightest, darker, strict=True))
    if spread <= GREY_SPREAD and brightest - darkest > MIN_CONTRAST:
        message = f"{uri}: red, green and blue are equal everywhere: {GREY}"
        raise ValueError(message)


def _over_channels(choose: np.ufunc, part: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the largest or smallest value of each px: faster than a reduction of three values."""
    chosen: NDArray[np.uint8] = choose(choose(part[..., 0], part[..., 1]), part[..., 2])
    return chosen


def _brightest(lightest: Sequence[NDArray[np.uint8]]) -> int:
    """Return the value that BRIGHT_SHARE of the px reach in any channel."""
    counts = sum(np.bincount(part.ravel(), minlength=256) for part in lightest)
    reached = np.cumsum(np.asarray(counts)[::-1])[::-1]
    return int(np.flatnonzero(reached >= max(1, BRIGHT_SHARE * reached[0]))[-1])


def _windows(pixels: Pixels) -> Iterator[NDArray[np.uint8]]:
    """Yield windows spread evenly over the coarsest level."""
    level = len(pixels.downsamples) - 1
    width, height = _size(pixels, level)
    side = (min(WINDOW_PX, width), min(WINDOW_PX, height))
    num = min(WINDOWS, max(2, math.isqrt(MOST_DECODED_PX // pixels.tile_pixels)))
    lefts = np.unique(np.linspace(0, width - side[0], num).astype(int))
    tops = np.unique(np.linspace(0, height - side[1], num).astype(int))
    for top in tops.tolist():
        for left in lefts.tolist():
            yield pixels.region(level, left, top, *side)


def _size(pixels: Pixels, level: int) -> tuple[int, int]:
    """Return the (width, height) of a level up to rounding."""
    width, height = (max(1, int(side / pixels.downsamples[level])) for side in pixels.dimensions)
    return width, height


def _is_comparable(pixels: Pixels, level: int) -> bool:
    """Return whether a level is so small that it may be another picture, and not too small."""
    width, height = _size(pixels, level)
    is_small = width * height <= MAX_FOREIGN_PX and _fine_side(pixels, level) <= MAX_FINE_PX
    return is_small and min(width, height) >= 2 * BLOCK_PX


def _fine_side(pixels: Pixels, level: int) -> int:
    """Return the side in px that a block of a level has in the finer one."""
    ratio = pixels.downsamples[level] / pixels.downsamples[level - 1]
    return max(1, round(BLOCK_PX * ratio))


def _places(pixels: Pixels, level: int) -> list[tuple[float, float]]:
    """Return (x, y), level-0 px, of blocks of a level: on a grid, and where it is darkest."""
    columns, rows = (side // BLOCK_PX for side in _size(pixels, level))
    whole = pixels.region(level, 0, 0, columns * BLOCK_PX, rows * BLOCK_PX)
    means = cv2.resize(whole, (columns, rows), interpolation=cv2.INTER_AREA).sum(axis=2)
    grid = [
        (int(row), int(column))
        for row in np.linspace(0, rows - 1, BLOCKS).astype(int)
        for column in np.linspace(0, columns - 1, BLOCKS).astype(int)
    ]
    order = np.argsort(means, axis=None)[:DARKEST].tolist()
    step = BLOCK_PX * pixels.downsamples[level]
    blocks = sorted({*grid, *(divmod(at, columns) for at in order)})
    return [(column * step, row * step) for row, column in blocks]


def _check_level(
    pixels: Pixels, level: int, places: Sequence[tuple[float, float]], uri: str
) -> None:
    """Check a level against the finer one in blocks.

    Args:
        pixels: The open slide.
        level: The level.
        places: (x, y) of the blocks, level-0 px.
        uri: Name for messages.

    Raises:
        ValueError: the level is another picture.
    """
    width, height = _size(pixels, level)
    num_different = 0
    for place in places:
        x, y = (int(side / pixels.downsamples[level]) for side in place)
        x, y = min(x, width - BLOCK_PX), min(y, height - BLOCK_PX)
        ratio = pixels.downsamples[level] / pixels.downsamples[level - 1]
        side = _fine_side(pixels, level)
        coarse = cv2.mean(pixels.region(level, x, y, BLOCK_PX, BLOCK_PX))
        fine = cv2.mean(pixels.region(level - 1, round(x * ratio), round(y * ratio), side, side))
        num_different += bool(np.abs(np.subtract(fine, coarse)).max() > MAX_BLOCK_DIFFERENCE)
    if num_different >= MIN_DIFFERENT:
        message = (
            f"{uri}: the page of {width} x {height} px, marked as a smaller copy, is another "
            "picture than the slide (a label, a view of the glass?); remove that page, or write "
            "the first page alone to a new pyramid"
        )
        raise ValueError(message)
