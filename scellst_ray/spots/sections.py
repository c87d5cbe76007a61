"""Find matrices of several sections by the marks that tell their barcodes apart.

All Visium slides have the same barcodes. Software that joins sections adds a mark to each: Space
Ranger's aggr counts suffixes (-1, -2), AnnData adds -0 and -1, others put the section's name in
front. A wrong pairing of marks gives a spot the counts of another section's spot.
"""

from collections import Counter
from collections.abc import Sequence

import polars as pl

from scellst_ray.spots.files import reason_of

# What lies before and after the part of a name that says which spot of the slide it is: DNA, a bin
# of Visium HD, or a segmented cell. Short DNA counts only where there is no long one, since names
# of sections may look like it.
BARCODES = (r"s_\d+um_\d+_\d+|cellid_\d+|[ACGTN]{12,}", r"[ACGTN]{4,}")
NAMES = [
    rf"^(?P<before>.*?)(?P<barcode>{barcode})(?P<after>(?:[-_.#:][\w.-]*)?)$"
    for barcode in BARCODES
]


def _split(names: Sequence[str]) -> pl.DataFrame:
    """Return the columns before, barcode and after of the names that hold a barcode."""
    given = pl.Series("name", names, dtype=pl.String)
    long, short = (given.str.extract_groups(pattern).struct.unnest() for pattern in NAMES)
    is_long = long["barcode"].is_not_null()
    return pl.concat([long.filter(is_long), short.filter(~is_long).drop_nulls("barcode")])


def section_marks(names: Sequence[str]) -> Counter[tuple[str, str]]:
    """Return how often each mark, as text before and after the barcode, occurs.

    The result is empty if the names are not of this kind: fewer than half of them hold a barcode,
    or marks are as many as spots.
    """
    return _count_marks(_split(names), len(names))


def _count_marks(parts: pl.DataFrame, num_names: int) -> Counter[tuple[str, str]]:
    counted = parts.group_by("before", "after").len()
    is_known = 2 * parts.height >= num_names and 2 * counted.height <= max(num_names, 2)
    if not is_known:
        return Counter()
    return Counter({(before, after): number for before, after, number in counted.iter_rows()})


def repeated_spots(names: Sequence[str]) -> Counter[tuple[str, str]]:
    """Return the marks of names (see section_marks) if one barcode occurs with several of them."""
    parts = _split(names)
    marks = _count_marks(parts, len(names))
    different = parts.unique()
    is_repeated = different["barcode"].n_unique() < different.height
    return marks if len(marks) > 1 and is_repeated else Counter()


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
