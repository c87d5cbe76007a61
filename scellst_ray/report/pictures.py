"""Pictures within a page: arrays as PNG or JPEG in data URIs, equal bytes for equal arrays."""

import base64
import io
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

QUALITY = 82
# Colours of a map: 0 to TOP are its values, BLANK is where nothing lies, FRAME an outline.
TOP, FRAME, BLANK = 253, 254, 255
BLANK_RGB, FRAME_RGB = (244, 244, 242), (60, 60, 60)


class Picture(NamedTuple):
    """A picture as HTML takes it.

    Attributes:
        uri: The picture itself, as a data URI.
        width: Width, px.
        height: Height, px.
        alt: What it shows, in words.
    """

    uri: str
    width: int
    height: int
    alt: str


@cache
def value_colours() -> NDArray[np.uint8]:
    """Return the colours of low to high values (viridis), uint8 [TOP + 1, 3], RGB."""
    grey = np.linspace(0, 255, TOP + 1).round().astype(np.uint8)[:, None]
    return np.asarray(cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS)[:, 0, ::-1], np.uint8)


def indexed(
    image_HW: NDArray[np.uint8], alt: str, colours: Sequence[Sequence[int]] = ()
) -> Picture:
    """Return a picture of numbers of colours as PNG.

    Args:
        image_HW: Numbers of colours, uint8 [H, W].
        alt: What it shows.
        colours: RGB of the first numbers; those of `value_colours` if empty. BLANK and FRAME have
            their own.
    """
    palette = np.full((256, 3), BLANK_RGB, np.uint8)
    rows = value_colours() if not len(colours) else np.asarray(colours, np.uint8)
    palette[: len(rows)] = rows
    palette[FRAME] = FRAME_RGB
    height, width = image_HW.shape
    coded = Image.frombytes("P", (width, height), image_HW.tobytes())
    coded.putpalette(palette.tobytes())
    return _coded(coded, alt, "PNG", compress_level=6)


def photograph(image: NDArray[np.uint8], alt: str, longest_px: int | None = None) -> Picture:
    """Return an RGB picture, uint8 [H, W, 3], as JPEG, its longer side of so many px."""
    shown = Image.fromarray(image)
    if longest_px is not None and max(shown.size) != longest_px:
        factor = longest_px / max(shown.size)
        width, height = (max(1, round(side * factor)) for side in shown.size)
        how = Image.Resampling.BOX if factor < 1 else Image.Resampling.BICUBIC
        shown = shown.resize((width, height), how)
    return _coded(shown, alt, "JPEG", quality=QUALITY)


def _coded(image: Image.Image, alt: str, kind: str, **options: int) -> Picture:
    """Code a picture. Neither format gets a time or the name of a program."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    text = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/{kind.lower()};base64,{text}", *image.size, alt)


def levels(values: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """Return the number of the colour of each value; BLANK for NaN."""
    span = high - low if high > low else 1.0
    with np.errstate(invalid="ignore"):
        scaled = np.clip((values - low) / span, 0, 1) * TOP
    return np.where(np.isnan(values), BLANK, np.nan_to_num(scaled).round()).astype(np.uint8)
