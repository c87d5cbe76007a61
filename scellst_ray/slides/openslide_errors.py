"""Errors of OpenSlide in words: what it lacks is told from what is damaged."""

import re

from scellst_ray.slides.tiff_pages import CONVERSION, compression_name

SYNTAXES = {
    "1.2.840.10008.1.2.5": "RLE",
    "1.2.840.10008.1.2.1.99": "deflated",
    "1.2.840.10008.1.2.4.57": "lossless JPEG",
    "1.2.840.10008.1.2.4.70": "lossless JPEG",
    "1.2.840.10008.1.2.4.80": "JPEG-LS",
    "1.2.840.10008.1.2.4.81": "JPEG-LS",
    "1.2.840.10008.1.2.4.110": "JPEG XL",
    "1.2.840.10008.1.2.4.111": "JPEG XL",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.4.201": "high-throughput JPEG 2000",
    "1.2.840.10008.1.2.4.202": "high-throughput JPEG 2000",
    "1.2.840.10008.1.2.4.203": "high-throughput JPEG 2000",
}
LACKS = ("nsupported", "not supported", "can not handle", "not configured")


def why_not_opened(error: str, uri: str) -> str:
    """Return a message about an error of OpenSlide on opening a file.

    Args:
        error: What OpenSlide says.
        uri: Name for messages.
    """
    compression = re.search(r"compression:? (\d+)", error)
    if compression:
        name = compression_name(int(compression[1]))
        return f"{uri}: compressed as {name}, which OpenSlide does not read; {CONVERSION}"
    syntax = re.search(r"transfer syntax (?:UID )?([\d.]+)", error)
    if syntax:
        name = SYNTAXES.get(syntax[1], "unknown")
        return (
            f"{uri}: DICOM compressed as {name} ({syntax[1]}), which OpenSlide does not read; "
            "store its frames as JPEG (for example `gdcmconv --jpeg IN OUT`), or convert the slide "
            "to a TIFF"
        )
    if any(word in error for word in LACKS):
        return f"{uri}: OpenSlide does not read this kind of file ({error}); {CONVERSION}"
    return f"{uri}: OpenSlide cannot open it ({error}); the file may be cut off or damaged"
