"""Transparent pixels on white: glass where a slide has nothing."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WHITE = 255
BAND_PX = 4_000_000


def blend_on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return pixels as they look on white: RGB uint8 [H, W, 3].

    Args:
        rgba: Pixels with straight (not premultiplied) alpha, uint8 [H, W, 4].
    """
    alpha = rgba[..., 3:].astype(np.uint16)
    if alpha.size == 0 or alpha.min() == WHITE:
        return rgba[..., :3]
    sums = rgba[..., :3] * alpha + WHITE * (WHITE - alpha)
    return ((sums + WHITE // 2) // WHITE).astype(np.uint8)


def decode_on_white(image: Image.Image) -> NDArray[np.uint8]:
    """Return an image decoded, as it looks on white: RGB uint8 [H, W, 3].

    Args:
        image: Image of any mode that Pillow converts to RGB.
    """
    if not image.has_transparency_data:
        # Converting an RGB image would double its memory.
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    image.load()
    out = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, BAND_PX // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        out[top : top + band.height] = blend_on_white(np.asarray(band.convert("RGBA")))
    return out


def paste_on_white(
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    inside: Callable[[int, int, int, int], NDArray[np.uint8]],
) -> NDArray[np.uint8]:
    """Return a box of an image as RGB [height, width, 3], white outside the image.

    Args:
        size: (width, height) of the image.
        box: (x, y, width, height) to return, px of the image.
        inside: Reads a box (x, y, width, height) that lies inside the image.
    """
    x, y, w, h = box
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, size[0]), min(y + h, size[1])
    out = np.full((h, w, 3), WHITE, np.uint8)
    if left < right and top < bottom:
        part = inside(left, top, right - left, bottom - top)
        out[top - y : bottom - y, left - x : right - x] = part
    return out
