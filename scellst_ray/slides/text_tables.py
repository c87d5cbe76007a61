"""Tables as spreadsheets, R, pandas and databases write them: CSV and its variants as text.

A file may have a byte order mark, UTF-16, commas, semicolons or tabs, a column of row names, and
texts for missing values.
"""

import csv
import gzip
import io
import re
import zlib
from dataclasses import dataclass
from typing import Any

# A manifest of a million slides has 200 MB.
MAX_BYTES = 2**29
# Texts that R, pandas, SQL and spreadsheets write for a missing value, in small letters. Those of
# pandas.read_csv, and "-".
MISSING = frozenset(
    [
        *("", "na", "n/a", "#n/a", "#na", "#n/a n/a", "nan", "-nan", "none", "null", "<na>", "nat"),
        *("-", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"),
    ]
)
KINDS = {
    b"PK\x03\x04": "an Excel workbook or another zip file; save the sheet as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; save the sheet as CSV (UTF-8)",
    b"\x1f\x8b": "a gzip file within a gzip file; unpack it",
}
DECIMAL_COMMA = re.compile(r"\s*[+-]?\d+,\d+\s*")


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Attributes:
        columns: Names of the columns, each once.
        rows: By column name, text without blanks around it; None for a missing value.
        numbers: Number of each row in the file, counted from 1 without the header, blank rows
            included.
    """

    columns: list[str]
    rows: list[dict[str, str | None]]
    numbers: list[int]


def present(value: Any) -> Any:  # noqa: ANN401 - of any type
    """Return a cell of a table, text without blanks around it; None for a missing value."""
    if isinstance(value, str):
        value = value.strip()
        return None if value.lower() in MISSING else value
    return None if value is None or value != value else value  # noqa: PLR0124 - NaN


def number_text(value: Any) -> Any:  # noqa: ANN401 - of any type
    """Return text of a number with a point for a decimal comma; all else as it is."""
    is_comma = isinstance(value, str) and DECIMAL_COMMA.fullmatch(value)
    return value.replace(",", ".") if is_comma else value


def read_text_table(content: bytes) -> TextTable:
    """Read a table with a header from the bytes of a file.

    Raises:
        ValueError: it is no such table. The message is a reason without the file's name.
    """
    lines = [[cell.strip() for cell in line] for line in _lines(_decode(content))]
    # Spreadsheets write empty lines, and Excel a line that names the separator.
    header = next((number for number, line in enumerate(lines) if _is_header(line)), None)
    if header is None:
        message = "it is empty; expected a line of column names"
        raise ValueError(message)
    names, rows = lines[header], lines[header + 1 :]
    if _has_row_names(names, [row for row in rows if any(row)]):
        names = ["", *names]
    _refuse_names(names)
    table = TextTable([name for name in names if name], [], [])
    for number, row in enumerate(rows, start=1):
        if any(row[len(names) :]):
            message = (
                f"row {number} has {len(row)} values and the header has {len(names)} names; put "
                'values that contain the separator between "'
            )
            raise ValueError(message)
        cells = {name: present(cell) for name, cell in zip(names, row, strict=False) if name}
        if any(cell is not None for cell in cells.values()):
            table.rows.append(dict.fromkeys(table.columns) | cells)
            table.numbers.append(number)
    return table


def _is_header(line: list[str]) -> bool:
    return any(line) and not line[0].lower().startswith("sep=")


def _has_row_names(names: list[str], rows: list[list[str]]) -> bool:
    """Return whether rows begin with 1, 2, ... and the header has no name for it, as in R."""
    numbers = [str(number) for number in range(1, len(rows) + 1)]
    is_longer = all(len(row) == len(names) + 1 for row in rows)
    return is_longer and [row[0] for row in rows] == numbers


def _refuse_names(names: list[str]) -> None:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        message = f"column(s) {', '.join(twice[:5])} occur twice; remove or rename one"
        raise ValueError(message)


def _decode(content: bytes) -> str:
    """Return the text of a file, unpacked if it is gzip: UTF-8 or UTF-16."""
    if content.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(io.BytesIO(content)) as stream:
                content = stream.read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            message = f"it is a damaged gzip file ({error})"
            raise ValueError(message) from error
    if len(content) > MAX_BYTES:
        message = f"it has more than {MAX_BYTES:,} bytes; is it a table?"
        raise ValueError(message)
    for mark, kind in KINDS.items():
        if content.startswith(mark):
            message = f"it is {kind}"
            raise ValueError(message)
    encoding = "utf-8-sig"
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif content[1:2] == b"\0" and content[3:4] == b"\0":
        encoding = "utf-16-le"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        message = f"byte {error.start} is no text in {error.encoding.upper()}; save it as UTF-8"
        raise ValueError(message) from error
    if "\0" in text:
        message = "it holds bytes of value 0; is it a table of text?"
        raise ValueError(message)
    return text


def _lines(text: str) -> list[list[str]]:
    """Return the cells of all lines, by the separator that occurs most often in the header."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    if header.lower().startswith("sep="):
        separator = header[4:5] or ","
    else:
        bare = re.sub(r'"[^"]*"', "", header)
        separator = max(",;\t", key=bare.count)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        message = f'{error}; check the quotes (")'
        raise ValueError(message) from error
