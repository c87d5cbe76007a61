"""Pages of a TIFF: what OpenSlide's generic reader and Pillow do not look at.

Both take the first page for the slide and pass over tags that change what pixels mean. A file whose
pixels would be wrong is refused here, with the tag or page at fault and what to do.
"""

import logging
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tifffile

TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Pages beyond are passed over: a slide has a pyramid, a label and an overview.
MAX_PAGES = 64
ORIENTATIONS = {
    2: "mirrored",
    3: "turned by 180 degrees",
    4: "upside down",
    5: "mirrored and turned",
    6: "turned by 90 degrees",
    7: "mirrored and turned",
    8: "turned by 270 degrees",
}
# Values of PhotometricInterpretation.
GREY, COLOURS, RGB = (0, 1), (2, 3, 5, 6), 2
# None, CCITT, LZW, JPEG, deflate and PackBits: any reader has them, so a failure is damage.
COMMON_COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946)
# Any error of tifffile on a damaged file: the page is then judged by who reads its pixels.
DAMAGE_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, RuntimeError, struct.error),
)
# Sides of a level are rounded; a writer may round up, down or to the next number.
ROUNDING_PX = 1.5
CONVERSION = (
    "convert it, for example `vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg "
    "--xres R --yres R` with R = 1000 / mpp px per mm (vips keeps no resolution: without "
    "--xres and --yres the file states 72 dots per inch; then give mpp in the manifest)"
)


@dataclass(frozen=True)
class Page:
    """One page of a TIFF.

    Attributes:
        number: Its number, from 1.
        size: (width, height) in px.
        bits: Bits of a sample; the most where samples differ.
        is_unsigned: Whether samples are unsigned whole numbers.
        max_value: Largest sample by the tag MaxSampleValue; None without it.
        num_samples: Samples of a pixel.
        extra: Kinds of the samples beyond the colours: 0 unknown, 1 and 2 alpha.
        photometric: Value of PhotometricInterpretation.
        compression: Value of Compression.
        orientation: Value of Orientation; 1 without the tag.
        is_planar: Whether each sample has a plane of its own.
        is_tiled: Whether it is stored in tiles, not in strips.
        is_picture: Whether a reader may take it for the slide or a level of it.
    """

    number: int
    size: tuple[int, int]
    bits: int
    is_unsigned: bool
    max_value: int | None
    num_samples: int
    extra: tuple[int, ...]
    photometric: int
    compression: int
    orientation: int
    is_planar: bool
    is_tiled: bool
    is_picture: bool


def compression_name(compression: int) -> str:
    """Return the name of a value of the tag Compression, with the number."""
    known = {int(item): item.name for item in tifffile.COMPRESSION}
    return f"{known.get(compression, 'unknown')} ({compression})"


def read_pages(path: Path) -> list[Page]:
    """Return the pages of a TIFF without its pixels; none for another format or a damaged file."""
    if not path.is_file():
        return []
    logger = logging.getLogger("tifffile")
    is_disabled, logger.disabled = logger.disabled, True  # damage is reported by the readers
    pages: list[Page] = []
    try:
        with path.open("rb") as file:
            if file.read(4) not in TIFF_MAGICS:
                return []
        with suppress(*DAMAGE_ERRORS), tifffile.TiffFile(path) as tiff:
            for number, page in enumerate(islice(tiff.pages, MAX_PAGES), start=1):
                pages.append(_page(number, page.aspage()))
    finally:
        logger.disabled = is_disabled
    return pages


def _page(number: int, page: tifffile.TiffPage) -> Page:
    tags = page.tags
    bits, formats = _numbers(tags.valueof(258, 1)), _numbers(tags.valueof(339, 1))
    largest = _numbers(tags.valueof(281, ()))
    return Page(
        number=number,
        size=(int(page.imagewidth), int(page.imagelength)),
        bits=max(bits),
        is_unsigned=set(formats) <= {1, 4},
        max_value=max(largest) if largest else None,
        num_samples=int(tags.valueof(277, 1)),
        extra=tuple(_numbers(tags.valueof(338, ()))),
        photometric=int(tags.valueof(262, -1)),
        compression=int(tags.valueof(259, 1)),
        orientation=int(tags.valueof(274, 1)),
        is_planar=int(tags.valueof(284, 1)) == 2 and int(tags.valueof(277, 1)) > 1,
        is_tiled=322 in tags,
        is_picture=number == 1 or (322 in tags and bool(int(tags.valueof(254, 0)) & 1)),
    )


def _numbers(value: int | Sequence[int]) -> list[int]:
    return [int(value)] if isinstance(value, int | float) else [int(part) for part in value]


def check_pages(pages: Sequence[Page], uri: str) -> None:
    """Check the pages of a file that no vendor's reader knows.

    Args:
        pages: Pages of the file.
        uri: Name for messages.

    Raises:
        ValueError: the first page is not the largest, or a picture has a type of pixel that would
            be read wrongly, or is grey, or is not stored upright.
    """
    if not pages:
        return
    first, largest = pages[0], max(pages, key=lambda page: page.size[0] * page.size[1])
    if largest.size[0] * largest.size[1] > first.size[0] * first.size[1]:
        message = (
            f"{uri}: page {largest.number} of the TIFF ({_size(largest)}) is larger than its first "
            f"page ({_size(first)}), which would be read as the slide; write a TIFF that begins "
            "with the full picture, for example `vips tiffsave IN[page="
            f"{largest.number - 1}] OUT.tif --tile --pyramid`, and give its mpp in the manifest"
        )
        raise ValueError(message)
    for page in pages:
        if page.is_picture and is_level(first.size, page.size):
            check_orientation(page.orientation, _name(page, uri))
            _check_samples(page, _name(page, uri))
            _check_colours(page, pages, _name(page, uri))


def is_level(size0: tuple[int, int], size: tuple[int, int]) -> bool:
    """Return whether a picture has the sides of a smaller copy, up to rounding.

    Args:
        size0: (width, height) of the whole picture in px.
        size: (width, height) of the other picture in px.
    """
    return abs(size0[0] * size[1] - size0[1] * size[0]) <= ROUNDING_PX * sum(size0)


def check_orientation(orientation: int, name: str) -> None:
    """Check that a picture is stored upright.

    Readers differ in whether they turn such a picture, and OpenSlide turns each tile in its place.
    Coordinates of spots and nuclei would mean one thing here and another elsewhere.

    Raises:
        ValueError: it is not.
    """
    if orientation in ORIENTATIONS:
        message = (
            f"{name}: the orientation tag is {orientation} ({ORIENTATIONS[orientation]}); store "
            "the picture upright (for example `vips autorot IN OUT`), or set the tag to 1 if the "
            "picture is right as it is stored (for TIFF `tiffset -s 274 1 FILE`)"
        )
        raise ValueError(message)


def check_samples_for_pillow(pages: Sequence[Page], uri: str) -> None:
    """Check for samples that Pillow takes for others; for files that OpenSlide does not read.

    Pillow drops a fourth sample without a meaning, which OpenSlide takes for alpha. It reads planes
    of 16 bits as if they had 8.

    Raises:
        ValueError: the first page has such samples.
    """
    if not pages:
        return
    first = pages[0]
    if first.photometric == RGB and first.extra == (0,):
        message = (
            f"{uri}: a fourth sample of unknown meaning (ExtraSamples 0); write RGB alone, for "
            "example `vips extract_band IN OUT 0 --n 3`, or mark the sample as alpha"
        )
        raise ValueError(message)
    if first.is_planar and first.bits > 8:
        message = (
            f"{uri}: {first.bits} bits a channel in separate planes (PlanarConfiguration 2), which "
            f"Pillow reads wrongly; write the samples of a pixel side by side, or {TO_8_BITS}"
        )
        raise ValueError(message)


def check_tiles_upright(pages: Sequence[Page], uri: str) -> None:
    """Check that the tiled pages of a vendor's TIFF are stored upright.

    Raises:
        ValueError: one is not.
    """
    for page in pages:
        if page.is_tiled:
            check_orientation(page.orientation, _name(page, uri))


def _check_samples(page: Page, name: str) -> None:
    """Check that samples have 8 bits, or 16 bits that may be in full use."""
    reason = None
    if not page.is_unsigned:
        reason = f"samples of {page.bits} bits are signed or floating point numbers"
    elif page.bits not in (1, 2, 4, 8, 16):
        reason = f"{page.bits} bits a channel"
    elif page.bits == 16 and page.max_value is not None and page.max_value < 2**15:
        bits = page.max_value.bit_length()
        reason = f"{bits} bits a channel, stored in 16 (MaxSampleValue {page.max_value})"
    if reason is not None:
        message = f"{name}: {reason}; {TO_8_BITS}"
        raise ValueError(message)


TO_8_BITS = (
    "scale the picture to 8 bits a channel, for example `vips linear IN OUT F 0 --uchar` with "
    "F = 255 / largest value"
)


def _check_colours(page: Page, pages: Sequence[Page], name: str) -> None:
    if page.photometric in GREY:
        planes = sum(other.photometric in GREY and other.size == page.size for other in pages)
        reason = "a grey picture; H&E has colours"
        if page.num_samples >= 3:
            reason = f"{page.num_samples} samples a pixel are marked as grey (photometric)"
        elif planes > 1:
            reason = f"a grey picture; {planes} pages of its size may be its colours"
        message = (
            f"{name}: {reason}. Write it as interleaved RGB, for example with `raw2ometiff --rgb` "
            "or tifffile's photometric='rgb'"
        )
        raise ValueError(message)
    if page.photometric not in COLOURS:
        known = {int(item): item.name for item in tifffile.PHOTOMETRIC}
        kind = known.get(page.photometric, page.photometric)
        message = f"{name}: pixels of kind {kind} are not read; convert the picture to RGB"
        raise ValueError(message)


def _name(page: Page, uri: str) -> str:
    return uri if page.number == 1 else f"{uri}: page {page.number}"


def _size(page: Page) -> str:
    return f"{page.size[0]} x {page.size[1]} px"
