"""Find matrices of several sections by the marks that tell their barcodes apart.

All Visium slides have the same barcodes. Software that joins sections adds a mark to each: Space
Ranger's aggr counts suffixes (-1, -2), AnnData adds -0 and -1, others put the section's name in
front. A wrong pairing of marks gives a spot the counts of another section's spot.
"""

import re
from collections import Counter
from collections.abc import Sequence

from scellst_ray.spots.files import reason_of

# What lies before and after the part of a name that says which spot of the slide it is: DNA, a bin
# of Visium HD, or a segmented cell. Short DNA counts only where there is no long one, since names
# of sections may look like it.
BARCODES = (r"s_\d+um_\d+_\d+|cellid_\d+|[ACGTN]{12,}", r"[ACGTN]{4,}")
NAMES = [
    re.compile(rf"(?P<before>.*?)(?P<barcode>{barcode})(?P<after>(?:[-_.#:][\w.-]*)?)")
    for barcode in BARCODES
]


def _split(name: str) -> re.Match[str] | None:
    """Return a name's match with the groups before, barcode and after; None without a barcode."""
    return NAMES[0].fullmatch(name) or NAMES[1].fullmatch(name)


def section_marks(names: Sequence[str]) -> Counter[tuple[str, str]]:
    """Return how often each mark, as text before and after the barcode, occurs.

    The result is empty if the names are not of this kind: fewer than half of them hold a barcode,
    or marks are as many as spots.
    """
    found = [_split(name) for name in names]
    marks = Counter((m["before"], m["after"]) for m in found if m)
    is_known = 2 * sum(marks.values()) >= len(names) and 2 * len(marks) <= max(len(names), 2)
    return marks if is_known else Counter()


def repeated_spots(names: Sequence[str]) -> Counter[tuple[str, str]]:
    """Return the marks of names (see section_marks) if one barcode occurs with several of them."""
    marks = section_marks(names)
    if len(marks) < 2:
        return Counter()
    barcodes: dict[str, tuple[str, str]] = {}
    for name in names:
        found = _split(name)
        if found is None:
            continue
        mark = (found["before"], found["after"])
        if barcodes.setdefault(found["barcode"], mark) != mark:
            return marks
    return Counter()


def check_one_section(
    count_names: Sequence[str], position_names: Sequence[str], source: str
) -> None:
    """Check that counts and positions carry the same marks.

    Args:
        count_names: Barcodes of the matrix.
        position_names: Barcodes of the position file.
        source: The folder to name in errors.

    Raises:
        ValueError: The matrix holds several sections and the positions fewer, or counts and
            positions have different marks. The message says how many spots have each mark.
    """
    counted, placed = section_marks(count_names), section_marks(position_names)
    if not counted or not placed or set(counted) <= set(placed):
        return
    if len(counted) > 1:
        message = (
            f"{source}: the matrix holds {len(counted)} sections ({describe_marks(counted)}), the "
            f"positions {len(placed)} ({describe_marks(placed)}). Barcodes repeat between "
            "sections, so spots could get another section's counts. Give each section its own "
            "matrix: the `outs` folder of its own run, not of aggr."
        )
        raise ValueError(message)
    message = (
        f"{source}: barcodes of the matrix are marked otherwise ({describe_marks(counted)}) than "
        f"those of the positions ({describe_marks(placed)}), so they may be of two sections. Give "
        "counts and positions of one run, or rename the barcodes of one file if both are of the "
        "same section."
    )
    raise ValueError(message)


def describe_marks(marks: Counter[tuple[str, str]]) -> str:
    """Return marks with their numbers of spots, such as "-1: 60 spots, -2: 60 spots"."""
    listed = [
        f"{reason_of('...'.join(part for part in mark if part)) or 'without mark'}: {number} spots"
        for mark, number in sorted(marks.items())[:5]
    ]
    return ", ".join(listed) + (", ..." if len(marks) > 5 else "")
