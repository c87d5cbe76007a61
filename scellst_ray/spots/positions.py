"""Read tables of spot positions as instruments, pandas, R and spreadsheets write them.

Columns may be in any order, with a column of row names, quotes, a byte-order mark, commas,
semicolons or tabs between columns, and decimal commas.
"""

import csv
import io
import math
import re
from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scellst_ray.spots.files import reason_of, shown

YES = ("true", "t", "yes", "wahr", "vrai")
NO = ("false", "f", "no", "falsch", "faux")
EMPTY = ("", "na", "nan", "null", "none", "<na>", "n/a", "#n/a")
# A row of a sound table takes more than a byte even if it is compressed.
MAX_ROWS, ROWS_PER_BYTE = 1_000_000, 4
THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d*)?")


def read_position_text(content: bytes, names: Sequence[str], path: str) -> pl.DataFrame:
    """Parse a table of positions from text; the cells are strings without outer spaces.

    Args:
        content: Content of the file.
        names: Names of the columns. A file without header has them in this order.
        path: Name of the file in errors.

    Returns:
        Columns in the order of the file, more than `names` if the file has more.

    Raises:
        ValueError: The text is no table, or a row has another number of cells than the others.
    """
    rows, separator = _rows_of(content, path)
    header = rows[0]
    plain = [cell.lower() for cell in header]
    if any(name in plain for name in names):
        header = [name if name in names else cell for name, cell in zip(plain, header, strict=True)]
        rows = rows[1:]
    else:
        # pandas numbers the columns of a file without header: 0,1,2,3,4,5
        rows = rows[1:] if _is_numbering(header) else rows
        header = _positional(rows, names)
    width = max([len(header), *map(len, rows)])
    if width == len(header) + 1:
        header = ["", *header]  # R gives the column of row names no name
    ragged = next((number for number, row in enumerate(rows, 1) if len(row) != len(header)), None)
    if ragged is not None:
        message = (
            f"{path}: row {ragged} has {len(rows[ragged - 1])} cells, expected {len(header)}: "
            f"{shown(header)}. Copy the file again, or write it with every column in every row."
        )
        raise ValueError(message)
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(header)
    table = {
        name or f"column {number}": list(column)
        for number, (name, column) in enumerate(zip(header, columns, strict=True))
    }
    if names[0] not in table and header[0] in ("", "index", "unnamed: 0", "Unnamed: 0"):
        table = {names[0]: table.pop(header[0] or "column 0"), **table}
    decimal = separator != ","
    return pl.DataFrame(table, schema=dict.fromkeys(table, pl.String)).with_columns(
        pl.lit(decimal).alias("decimal comma")
    )


def _rows_of(content: bytes, path: str) -> tuple[list[list[str]], str]:
    """Return the cells of all rows that are not empty, and the separator."""
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
        first = text.lstrip().partition("\n")[0]
        separator = max(",;\t", key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        rows = [[cell.strip() for cell in row] for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        message = (
            f"{path}: not a table ({reason_of(error)}). Copy it again from Space Ranger's output."
        )
        raise ValueError(message) from error
    rows = [row for row in rows if any(row)]
    if not rows:
        message = f"{path}: not a table (it is empty). Copy it again from Space Ranger's output."
        raise ValueError(message)
    # Spreadsheets may write empty columns at the end.
    while len(rows[0]) > 1 and not any(row[-1] for row in rows) and _same_width(rows):
        rows = [row[:-1] for row in rows]
    return rows, separator


def _same_width(rows: list[list[str]]) -> bool:
    return len({len(row) for row in rows}) == 1


def _is_numbering(header: list[str]) -> bool:
    """Return whether cells are 0, 1, 2, ... as pandas names columns, the first perhaps empty."""
    numbers = [str(number) for number in range(len(header))]
    return len(header) > 1 and (header == numbers or header == ["", *numbers[:-1]])


def _positional(rows: list[list[str]], names: Sequence[str]) -> list[str]:
    """Return names for the columns of rows without header."""
    width = len(rows[0]) if rows else 0
    if width == len(names) + 1 and all(row[0].isdecimal() for row in rows):
        return ["", *names]  # pandas' index
    return list(names) if width == len(names) else [f"column {number}" for number in range(width)]


def read_position_parquet(content: bytes, names: Sequence[str], path: str) -> pl.DataFrame:
    """Read a table of positions from Parquet; the cells are strings.

    Arguments and errors are those of `read_position_text`.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(content))
        if file.metadata.num_rows > MAX_ROWS + ROWS_PER_BYTE * len(content):
            message = f"it declares {file.metadata.num_rows} rows in {len(content)} bytes"
            raise ValueError(message)
        stored = file.schema_arrow.names
        index = [name for name in stored if name.startswith("__index_level_")]
        wanted = [name for name in names if name in stored]
        if names[0] not in stored:
            wanted += index[:1]
        table = file.read(columns=wanted) if wanted else pa.table({})
        frame = pl.DataFrame(
            {name: pl.Series(table[name].cast(pa.string())) for name in table.column_names}
        )
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        message = f"{path}: not a Parquet file ({reason_of(error)}). Copy it again."
        raise ValueError(message) from error
    if names[0] not in frame.columns and index:
        frame = frame.rename({index[0]: names[0]})
    return frame.with_columns(pl.all().fill_null("").str.strip_chars()).with_columns(
        pl.lit(value=False).alias("decimal comma")
    )


def marks_of(table: pl.DataFrame, name: str, path: str) -> NDArray[np.bool_]:
    """Return which rows a column marks with 1, 1.0 or true, in any usual spelling.

    An empty cell (NA, NaN) marks no row.

    Raises:
        ValueError: A cell is neither yes nor no.
    """
    decimal = bool(table["decimal comma"].any())
    # Tables of Visium HD have millions of rows.
    mark_of = {
        cell: _mark(cell, name, path, decimal=decimal) for cell in table[name].unique().to_list()
    }
    return np.fromiter(map(mark_of.__getitem__, table[name]), np.bool_, table.height)


def _mark(cell: str, name: str, path: str, *, decimal: bool) -> bool:
    word = cell.lower()
    if word in YES:
        return True
    if word in NO or word in EMPTY:
        return False
    number = _number(cell, decimal=decimal)
    if number in (0.0, 1.0):
        return number == 1.0
    message = (
        f"{path}: {name} is {shown(cell)}, which is not a number 0 or 1, and not true or false. "
        "Mark "
        "the spots under tissue with 1."
    )
    raise ValueError(message)


def numbers_of(table: pl.DataFrame, name: str, path: str) -> NDArray[np.float64]:
    """Return a column of numbers; NaN for empty cells (NA, NaN).

    Raises:
        ValueError: A cell is not a number.
    """
    decimal = bool(table["decimal comma"].any())
    cells = table[name]
    plain = cells.cast(pl.Float64, strict=False)
    numbers = plain.fill_null(math.nan).to_numpy().copy()
    for row in np.flatnonzero(plain.is_null().to_numpy()):
        cell = cells[int(row)]
        number = math.nan if cell.lower() in EMPTY else _number(cell, decimal=decimal)
        if number is None:
            message = (
                f"{path}: a position is not a number ({name} of row {row + 1} is "
                f"{shown(cell)}). Give "
                "level-0 px in every row."
            )
            raise ValueError(message)
        numbers[row] = number
    return numbers


def _number(cell: str, *, decimal: bool) -> float | None:
    """Return the number in a cell; None if it holds none.

    Args:
        cell: Text of the cell.
        decimal: Whether a comma separates the fraction, else thousands.
    """
    if decimal and cell.count(",") == 1:
        cell = cell.replace(".", "").replace(",", ".")
    elif not decimal and THOUSANDS.fullmatch(cell):
        cell = cell.replace(",", "")
    try:
        return float(cell) if "_" not in cell else None
    except ValueError:
        return None
