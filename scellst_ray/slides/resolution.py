"""Statements of a file about its resolution: tags, headers of scanners, and OME-XML.

OME-XML names PhysicalSizeX and PhysicalSizeY with a unit (OME data model 2016-06, default um).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast
from xml.etree.ElementTree import Element, ParseError, XMLPullParser

from scellst_ray.core.geometry import MAX_MPP, MIN_MPP
from scellst_ray.core.resolution import CONFIRMED

UM_AT_1X = 10.0
# Factors by which a resolution may differ from that of the objective: without a word, and at most.
USUAL, FINEST, COARSEST = 1.3, 2.5, 1.5
# Width and height of a pixel may differ by this factor.
SQUARE = 1.02
# The replacement character stands for a micro sign in another encoding.
UM_PER_UNIT = {
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "micrometer": 1.0,
    "micron": 1.0,
    "\ufffdm": 1.0,
    "m": 1e6,
    "dm": 1e5,
    "cm": 1e4,
    "mm": 1e3,
    "nm": 1e-3,
    "pm": 1e-6,
    "Å": 1e-4,
    "in": 25_400.0,
    "inch": 25_400.0,
    "ft": 304_800.0,
}
# Units of the TIFF tag ResolutionUnit.
UM_PER_TIFF_UNIT = {2: 25_400.0, 3: 10_000.0}
# A description of the whole slide has some kB; thousands of planes have some MB.
MAX_XML_CHARACTERS = 2**24
XML_PART = 2**16


@dataclass(frozen=True)
class FileResolution:
    """All that a file states about its resolution.

    Attributes:
        stated: um per level-0 px by the name of the statement, the most trusted first.
        error: Reason why a statement cannot be used; None without one.
        objective: Magnification of the scanner's objective, such as 40; None if not stated.
    """

    stated: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    objective: float | None = None

    @property
    def mpp(self) -> float | None:
        """The first plausible statement, else the first one, else None."""
        plausible = [mpp for mpp in self.stated.values() if MIN_MPP <= mpp <= MAX_MPP]
        return next(iter([*plausible, *self.stated.values()]), None)


def collect_statements(
    sizes: dict[str, tuple[float, float] | None], objective: float | None = None
) -> FileResolution:
    """Return the resolution of a file from the sizes of a pixel that it states.

    Args:
        sizes: (width, height) of a pixel in um by the name of the statement; None: not stated.
        objective: Magnification of the objective; None: not stated.
    """
    stated, error = {}, None
    for name, size in sizes.items():
        if size is None or not all(math.isfinite(um) and um > 0 for um in size):
            continue
        if max(size) > SQUARE * min(size):
            error = error or (
                f"pixels are not square: mpp {size[0]:g} by {size[1]:g}; resample the image, or "
                "give one mpp (um per level-0 px) in the manifest's mpp column"
            )
        else:
            stated[name] = size[0]
    return FileResolution(stated, error, objective)


def check_objective(
    objective: float | None, mpp: float, *, confirmed: bool, source: str
) -> list[str]:
    """Compare a resolution that a user gives with the scanner's objective.

    A pixel is about 10 um wide at 1x. Cameras with small pixels halve that; none doubles it.

    Args:
        objective: Magnification that the file states; None: not stated.
        mpp: um per level-0 px that the user gives.
        confirmed: Whether the user confirms it.
        source: Name of the slide, for messages.

    Returns:
        One line if the two hardly fit, else nothing.

    Raises:
        ValueError: the two do not fit, and `confirmed` is false.
    """
    if objective is None or objective <= 0:
        return []
    nominal = UM_AT_1X / objective
    if nominal / USUAL <= mpp <= nominal * USUAL:
        return []
    line = (
        f"{source}: {mpp:.4g} um/px in use, but about {nominal:.4g} um/px by the objective of "
        f"{objective:g}x"
    )
    if confirmed or nominal / FINEST <= mpp <= nominal * COARSEST:
        return [line]
    message = (
        f"{line}. Give the true value in the manifest's mpp column (um per level-0 px), and 'yes' "
        f"in its column {CONFIRMED} if the objective is wrong"
    )
    raise ValueError(message)


def ome_pixel_size(description: str, size0: tuple[int, int]) -> tuple[float, float] | None:
    """Return the size of a pixel in um as OME-XML states it.

    Text that is no OME-XML, is malformed, or has a document type (whose entities may expand without
    end) states nothing. So does a unit that is no length.

    Args:
        description: Text of the TIFF tag ImageDescription.
        size0: (width, height) of level 0, by which the picture is found among several.
    """
    if "<OME" not in description[:4096] and ":OME" not in description[:4096]:
        return None
    if len(description) > MAX_XML_CHARACTERS or "<!DOCTYPE" in description:
        return None
    try:
        for pixels in _pixels_elements(description):
            if (pixels.get("SizeX"), pixels.get("SizeY")) == tuple(map(str, size0)):
                return _size_um(pixels, "X"), _size_um(pixels, "Y")
    except (ParseError, ValueError):
        return None
    return None


def _pixels_elements(text: str) -> Iterator[Element]:
    """Yield the elements `Pixels` of OME-XML, reading no further than is asked for."""
    parser: XMLPullParser[Element] = XMLPullParser(events=("start",))
    for start in range(0, len(text), XML_PART):
        parser.feed(text[start : start + XML_PART])
        events = cast("Iterator[tuple[str, Element]]", parser.read_events())
        for _, element in events:
            if element.tag.rpartition("}")[2] == "Pixels":
                yield element


def _size_um(pixels: Element, axis: str) -> float:
    """Return one side of a pixel in um.

    Raises:
        ValueError: the side is not stated, is no number, or its unit is no length.
    """
    unit = pixels.get(f"PhysicalSize{axis}Unit", "µm")
    value = float(pixels.get(f"PhysicalSize{axis}", "nan"))
    if unit not in UM_PER_UNIT or not math.isfinite(value):
        message = f"{value} {unit} is no length"
        raise ValueError(message)
    return value * UM_PER_UNIT[unit]
