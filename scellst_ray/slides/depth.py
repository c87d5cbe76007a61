"""Tell images of more than 8 bits a channel, which Pillow decodes to 8 without a word."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from scellst_ray.slides.tiff_pages import Page

MAX_8_BITS = 255
# The marker of sizes in JPEG 2000 stands behind boxes of some 100 bytes. So many bytes after its
# start lies the depth of the first channel: bits less 1, and a sign in the top bit.
SIZES_MARKER, DEPTH_AT, HEADER_BYTES = b"\xff\x51", 40, 2**16


def has_deep_samples(image: Image.Image, path: Path, pages: Sequence[Page]) -> bool:
    """Return whether a plain image has more than 8 bits a channel.

    Args:
        image: The image, opened and not decoded.
        path: Its local file.
        pages: Its pages, if it is a TIFF.
    """
    if pages:
        return pages[0].bits > 8
    if image.format == "JPEG2000":
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
        at = head.find(SIZES_MARKER)
        return 0 <= at < len(head) - DEPTH_AT and head[at + DEPTH_AT] & 0x7F >= 8
    tiles = getattr(image, "tile", [])
    details = tiles[0][3] if tiles else ""
    if image.format == "PPM":
        largest = details[-1] if isinstance(details, tuple) else 0
        return isinstance(largest, int) and largest > MAX_8_BITS
    return ";16" in str(details)
