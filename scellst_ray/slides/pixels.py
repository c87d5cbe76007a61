"""Sources of a slide's pixels: formats that OpenSlide reads, and plain images decoded whole.

Files are not trusted. Sizes are checked before memory is allocated, and every error that a damaged
file causes in a library becomes a ValueError that names the file.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import (
    IMAGEDESCRIPTION,
    RESOLUTION_UNIT,
    X_RESOLUTION,
    Y_RESOLUTION,
    TiffImageFile,
)

from scellst_ray.core.geometry import MAX_MPP, MIN_MPP
from scellst_ray.slides.depth import has_deep_samples
from scellst_ray.slides.folders import picture_in
from scellst_ray.slides.openslide_errors import why_not_opened
from scellst_ray.slides.resolution import (
    UM_PER_TIFF_UNIT,
    FileResolution,
    collect_statements,
    ome_pixel_size,
)
from scellst_ray.slides.tiff_pages import (
    COMMON_COMPRESSIONS,
    CONVERSION,
    Page,
    check_orientation,
    check_pages,
    check_samples_for_pillow,
    check_tiles_upright,
    compression_name,
    is_level,
    read_pages,
)
from scellst_ray.slides.white import WHITE, blend_on_white, decode_on_white, paste_on_white

# A plain image is held decoded in memory; larger images belong in a pyramidal TIFF.
MAX_PLAIN_PIXELS = 600_000_000
# Pillow's further formats hold no slides, and for some of them (EPS) it starts other programs.
PLAIN_FORMATS = ("BMP", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Deflate and JPEG pack fewer than 2,000 bytes into one; a header that claims more is damaged.
# Images of less than 100 MB decoded need no check.
MAX_PACKING, MIN_PACKED_BYTES = 2000, 100_000_000
# A tile of the file is decoded whole for every read. Scanners write tiles of 240 to 4096 px.
MAX_TILE_PIXELS = 8192**2
# OpenSlide's names of formats. Levels of a generic TIFF are pages with a tag, those of Aperio all
# tiled pages. The files of Hamamatsu are TIFFs with tags of another meaning.
GENERIC, LEVELS_BY_TAGS, UNLIKE_TIFF = "generic-tiff", ("generic-tiff", "aperio"), ("hamamatsu",)
GREY_MODES = ("1", "L", "LA", "La")
# Errors that Pillow raises on damaged files.
DAMAGE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError),
    *(RuntimeError, ArithmeticError, struct.error, zlib.error, Image.DecompressionBombError),
)


class Pixels(Protocol):
    """Interface of a source of pixels: a pyramid of levels that is read in boxes.

    Attributes:
        dimensions: (width, height) in level-0 px.
        downsamples: Level-0 px per px of each level, ascending.
        resolution: All that the file states about its resolution.
        tile_pixels: Most px that are decoded for the smallest read; 1 for a decoded image.
        bits: Bits of a channel in the file: 8 or 16.
        is_grey: Whether the file has one channel, which cannot hold colours.
        levels_by_tags: Whether tags alone make a page a level: it may be another picture.
    """

    dimensions: tuple[int, int]
    downsamples: list[float]
    resolution: FileResolution
    tile_pixels: int
    bits: int
    is_grey: bool
    levels_by_tags: bool

    def region(self, level: int, x: int, y: int, w: int, h: int) -> NDArray[np.uint8]:
        """Return level px [x, x + w) x [y, y + h) as RGB [h, w, 3], white outside the image."""
        ...

    def close(self) -> None:
        """Close the file and free its memory."""
        ...


def open_pixels(path: Path, uri: str) -> Pixels:
    """Open an image file, or a folder for formats that consist of one.

    Args:
        path: Local file or folder.
        uri: Name for messages.

    Raises:
        ValueError: The file is no image, is cut off or damaged, or claims impossible sizes.
    """
    if not (path.is_file() or path.is_dir()):
        message = f"{uri}: neither a file nor a folder (a pipe, a device?); give an image file"
        raise ValueError(message)
    if path.is_dir():
        path = picture_in(path, uri)
    pages = read_pages(path)
    try:
        vendor = openslide.OpenSlide.detect_format(str(path))
        if vendor == GENERIC:
            check_pages(pages, uri)
        elif vendor not in UNLIKE_TIFF:
            check_tiles_upright(pages, uri)
        if vendor is not None:
            return _OpenSlidePixels(path, uri, pages)
    except openslide.OpenSlideError as error:
        raise ValueError(why_not_opened(str(error), uri)) from error
    check_pages(pages, uri)
    check_samples_for_pillow(pages, uri)
    return _PlainPixels(path, uri, pages)


class _OpenSlidePixels:
    """A slide in a format that OpenSlide reads."""

    def __init__(self, path: Path, uri: str, pages: list[Page]) -> None:
        self._uri = uri
        self._slide = openslide.OpenSlide(str(path))
        self.dimensions = self._slide.dimensions
        self.tile_pixels = self._check_tiles()
        vendor = self._slide.properties.get(openslide.PROPERTY_NAME_VENDOR)
        self.bits = 16 if pages and pages[0].bits > 8 else 8
        self.is_grey, self.levels_by_tags = False, vendor in LEVELS_BY_TAGS
        self._is_generic = vendor == GENERIC
        self._has_alpha = self._is_generic and bool(pages) and bool(pages[0].extra)
        self._levels = list(range(self._slide.level_count))
        if self.levels_by_tags:
            sizes = self._slide.level_dimensions
            self._levels = [n for n in self._levels if is_level(self.dimensions, sizes[n])]
        self.downsamples = [self._downsample(level) for level in self._levels]
        self.resolution = self._resolution()

    def _check_tiles(self) -> int:
        """Return the px of the largest tile; raise ValueError if it would not fit into memory."""
        largest = 1
        for level in range(self._slide.level_count):
            names = [f"openslide.level[{level}].tile-{side}" for side in ("width", "height")]
            sides = [int(self._slide.properties.get(name, 0)) for name in names]
            largest = max(largest, sides[0] * sides[1])
            if largest > MAX_TILE_PIXELS:
                self._slide.close()
                message = (
                    f"{self._uri}: tiles of {sides[0]} x {sides[1]} px in level {level} are too "
                    f"large; if the file is not damaged, {CONVERSION}"
                )
                raise ValueError(message)
        return largest

    def _downsample(self, level: int) -> float:
        """Return the level's downsample, as a whole number where the level's size allows it.

        OpenSlide reports the mean of two rounded ratios (4.004 for 2967 -> 741). Such a ratio
        would shift the far end of a slide by several pixels.
        """
        whole = round(self._slide.level_downsamples[level])
        sizes = zip(self.dimensions, self._slide.level_dimensions[level], strict=True)
        if all(abs(size0 / whole - size) < 1 for size0, size in sizes):
            return float(whole)
        return float(self._slide.level_downsamples[level])

    def _resolution(self) -> FileResolution:
        """Return what OpenSlide finds, and the OME-XML that it does not look at."""
        properties = self._slide.properties
        names = (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
        sides = [float(properties[name]) for name in names if name in properties]
        description = properties.get("tiff.ImageDescription", "") if self._is_generic else ""
        return collect_statements(
            {
                "the file's tags" if self._is_generic else "the file": (
                    (sides[0], sides[-1]) if sides else None
                ),
                "the file's OME-XML": ome_pixel_size(description, self.dimensions),
            },
            _objective(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)),
        )

    def region(self, level: int, x: int, y: int, w: int, h: int) -> NDArray[np.uint8]:
        # OpenSlide rounds a negative location by up to a level px, so read only inside the level.
        # It divides a location by its own downsample; the error is at most half a level-0 px.
        level = self._levels[level]
        scale = self._slide.level_downsamples[level]

        def inside(left: int, top: int, width: int, height: int) -> NDArray[np.uint8]:
            location = (round(left * scale), round(top * scale))
            rgba = np.asarray(self._slide.read_region(location, level, (width, height)))
            if self._has_alpha:
                return blend_on_white(rgba)
            # Without alpha in the file, OpenSlide gives the rim of a level a part of it.
            alpha = rgba[..., 3:]
            if alpha.min() == WHITE:
                return rgba[..., :3]
            return np.where(alpha == 0, np.uint8(WHITE), rgba[..., :3]).astype(np.uint8)

        try:
            return paste_on_white(self._slide.level_dimensions[level], (x, y, w, h), inside)
        except openslide.OpenSlideError as error:
            message = (
                f"{self._uri}: OpenSlide cannot read {w} x {h} px at ({x}, {y}) of level {level} "
                f"({error}); the file may be cut off or damaged: copy it again"
            )
            raise ValueError(message) from error

    def close(self) -> None:
        self._slide.close()


def _objective(text: str | None) -> float | None:
    with suppress(TypeError, ValueError):
        return float(text or "")
    return None


class _PlainPixels:
    """A PNG, JPEG or plain TIFF, decoded whole: one level. Only a TIFF states its resolution."""

    downsamples: list[float] = [1.0]  # noqa: RUF012 - never changed
    levels_by_tags, tile_pixels = False, 1

    def __init__(self, path: Path, uri: str, pages: list[Page]) -> None:
        with _lift_pillow_limit(), ExitStack() as stack:
            with _report_damage(uri, pages):
                image = stack.enter_context(Image.open(path, formats=PLAIN_FORMATS))
            self.dimensions = image.size
            _check_plain(image, path, uri)
            self.resolution = _plain_resolution(image)
            self.bits = 16 if has_deep_samples(image, path, pages) else 8
            check_orientation(_exif_orientation(image), uri)
            self.is_grey = image.mode in GREY_MODES
            with _report_damage(uri, pages):
                self._image = decode_on_white(image)

    def region(self, level: int, x: int, y: int, w: int, h: int) -> NDArray[np.uint8]:
        assert level == 0
        return paste_on_white(
            self.dimensions,
            (x, y, w, h),
            lambda left, top, w, h: self._image[top : top + h, left : left + w],
        )

    def close(self) -> None:
        self._image = np.empty((0, 0, 3), np.uint8)


def _exif_orientation(image: Image.Image) -> int:
    """Return the orientation that the file's EXIF states; 1 if it states none."""
    with suppress(*DAMAGE_ERRORS):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _plain_resolution(image: Image.Image) -> FileResolution:
    """Return what the tags of a TIFF state about its resolution; nothing for other formats."""
    if not isinstance(image, TiffImageFile):
        return FileResolution()
    tags = image.tag_v2
    um = UM_PER_TIFF_UNIT.get(tags.get(RESOLUTION_UNIT, 2))
    per_unit = [float(tags.get(tag, 0)) for tag in (X_RESOLUTION, Y_RESOLUTION)]
    sides = (um / per_unit[0], um / per_unit[1]) if um and min(per_unit) > 0 else None
    # Pillow takes the text for Latin-1; OME-XML is UTF-8.
    text = str(tags.get(IMAGEDESCRIPTION, "")).encode("latin-1", "replace")
    description = text.decode("utf-8", "replace")
    # The tags of a plain TIFF are most often those of a screen or a printer.
    if sides and not all(MIN_MPP <= side <= MAX_MPP for side in sides):
        sides = None
    return collect_statements(
        {
            "the file's tags": sides,
            "the file's OME-XML": ome_pixel_size(description, image.size),
        }
    )


def _check_plain(image: Image.Image, path: Path, uri: str) -> None:
    """Raise ValueError, before decoding, if an image is too large or has no 8-bit channels."""
    width, height = image.size
    if width * height > MAX_PLAIN_PIXELS:
        message = (
            f"{uri}: {width} x {height} px is too large for a plain image, which is held in "
            f"memory; {CONVERSION}"
        )
        raise ValueError(message)
    num_bytes = path.stat().st_size
    if 3 * width * height > max(MIN_PACKED_BYTES, MAX_PACKING * num_bytes):
        message = (
            f"{uri}: {width} x {height} px in {num_bytes:,} bytes; the file is cut off or "
            "damaged: copy it again"
        )
        raise ValueError(message)
    if image.mode.startswith(("I", "F")):
        message = (
            f"{uri}: pixels of type {image.mode!r}; expected 8 bits per channel: convert the "
            "image to 8-bit RGB"
        )
        raise ValueError(message)


@contextmanager
def _report_damage(uri: str, pages: list[Page]) -> Iterator[None]:
    """Turn Pillow's errors on a damaged file into a ValueError that names the file."""
    try:
        yield
    except DAMAGE_ERRORS as error:
        if pages and pages[0].compression not in COMMON_COMPRESSIONS:
            name = compression_name(pages[0].compression)
            message = f"{uri}: compressed as {name}, which Pillow does not read; {CONVERSION}"
            raise ValueError(message) from error
        message = (
            f"{uri}: neither OpenSlide nor Pillow can read it as an image ({error}); "
            "it may be cut off, damaged or in another format: copy or convert it again"
        )
        raise ValueError(message) from error


@contextmanager
def _lift_pillow_limit() -> Iterator[None]:
    """Lift Pillow's size limit; `_check_plain` checks the size before decoding."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
