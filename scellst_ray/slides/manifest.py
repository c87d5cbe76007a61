"""The manifest: the table that lists the slides of a cohort, and its checks before a job starts."""

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from scellst_ray.core.geometry import check_mpp
from scellst_ray.core.resolution import CONFIRMED
from scellst_ray.slides.text_tables import (
    MAX_BYTES,
    TextTable,
    number_text,
    present,
    read_text_table,
)
from scellst_ray.storage.credentials import redact, secret_in
from scellst_ray.storage.retries import call_with_retries

ALIASES = {"path": "uri", "wsi": "uri", "wsi_mpp": "mpp"}
PATH_COLUMNS = ("spots", "spot_positions", "segmentation", "xenium", "xenium_alignment")
YES, NO = ("yes", "y", "true", "t", "1", "1.0"), ("no", "n", "false", "f", "0", "0.0")
NUMBER_COLUMNS = ("spot_diameter_um",)
# A file name has at most 255 bytes; those of a slide have up to 26 more than its slide_id.
MAX_ID = 200
SLIDE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class SlideRow:
    """One slide of a manifest.

    Attributes:
        slide_id: Unique name that can serve as a file name.
        uri: Local path or fsspec URI of the image.
        mpp: Resolution in um per level-0 px if the manifest overrides the file, else None.
        mpp_error: Reason why the manifest's mpp cannot be used; None if it can.
        mpp_confirmed: Whether the resolution in use counts whatever else states another one.
        columns: All further columns as read, without missing values.
        folder: Folder of the manifest; empty if the row was not read from one.
    """

    slide_id: str
    uri: str
    mpp: float | None
    mpp_error: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    mpp_confirmed: bool = False
    folder: str = ""


def read_manifest(uri: str, required: tuple[str, ...] = ()) -> list[SlideRow]:
    """Read a manifest (CSV or Parquet) and return one row per slide, in the manifest's order.

    Required columns are `slide_id` and `uri` (aliases `path`, `wsi`). Optional columns are `mpp`
    (alias `wsi_mpp`), `mpp_confirmed` and `patient_id`; further columns are kept. A relative path
    starts at the manifest's folder. An unusable mpp becomes an error of that slide alone.

    Args:
        uri: Local path or fsspec URI of the manifest.
        required: Further columns that this job needs.

    Raises:
        FileNotFoundError: The manifest does not exist.
        ValueError: The manifest has no rows or lacks a column, a slide_id is repeated, empty or
            unsafe as a file name, or a uri is empty. The message lists all problems.
    """
    table = _read_table(uri)
    renamed = _aliases(table.columns)
    columns = [renamed.get(name, name) for name in table.columns]
    missing = [name for name in ("slide_id", "uri", *required) if name not in columns]
    if missing:
        hints = [get_close_matches(name, columns, n=1) for name in missing]
        near = ", ".join(f"{hint[0]!r}" for hint in hints if hint)
        message = (
            f"{redact(uri)}: needed column(s) {', '.join(missing)} not found; the manifest has "
            f"{', '.join(columns)}{f' (did you mean {near}?)' if near else ''}"
        )
        raise ValueError(message)
    if not table.rows:
        message = f"{redact(uri)}: the manifest has no rows; list at least one slide"
        raise ValueError(message)
    # Absolute paths mean the same in every process.
    fs, path = fsspec.core.url_to_fs(uri)
    base = (str(path) if isinstance(fs, LocalFileSystem) else uri).rsplit("/", 1)[0]
    rows = [
        _slide_row({renamed.get(name, name): value for name, value in row.items()}, base)
        for row in table.rows
    ]
    problems = _problems(rows, table.numbers)
    if problems:
        message = redact(f"{uri}: " + "; ".join(problems))
        raise ValueError(message)
    return rows


def select_slides(slides: list[SlideRow], slide_ids: list[str] | None) -> list[SlideRow]:
    """Return the slides with these ids, in the order of the manifest; all slides if None.

    Raises:
        ValueError: An id is not in the manifest.
    """
    if slide_ids is None:
        return slides
    known_ids = [slide.slide_id for slide in slides]
    unknown = sorted(set(slide_ids) - set(known_ids))
    if unknown:
        near = get_close_matches(unknown[0], known_ids, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        message = f"slides: the manifest has no slide_id {', '.join(map(repr, unknown))}{hint}"
        raise ValueError(message)
    return [slide for slide in slides if slide.slide_id in set(slide_ids)]


def _aliases(columns: list[str]) -> dict[str, str]:
    """Return new names of columns by old ones; of two aliases the first wins."""
    renamed: dict[str, str] = {}
    for old, new in ALIASES.items():
        if old in columns and new not in (*columns, *renamed.values()):
            renamed[old] = new
    return renamed


def _read_table(uri: str) -> TextTable:
    """Read the rows of a manifest: those of CSV are text, those of Parquet have values."""
    fs, path = fsspec.core.url_to_fs(uri)
    is_local = isinstance(fs, LocalFileSystem)
    if is_local and not fs.isfile(path):
        message = f"{redact(uri)}: no such manifest"
        raise FileNotFoundError(message)

    def read() -> bytes:
        # A slide that is given for a manifest may have any size.
        return bytes(fs.cat_file(path, end=MAX_BYTES + 1 if is_local else None))

    content = read() if is_local else call_with_retries(read, redact(uri))
    try:
        if uri.endswith((".parquet", ".pq")) or content.startswith(b"PAR1"):
            return _read_parquet(content)
        return read_text_table(content)
    except ValueError as error:
        message = f"{redact(uri)}: cannot be read as a manifest: {error}; expected CSV or Parquet"
        raise ValueError(message) from error


def _read_parquet(content: bytes) -> TextTable:
    """Read a Parquet table, without the index of pandas.

    Raises:
        ValueError: it is damaged.
    """
    # By pyarrow: on a damaged page polars ends in a panic, which is no error.
    try:
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            table = file.read(use_threads=False)
        names = [name for name in table.column_names if not name.startswith("__index_level_")]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            message = f"column(s) {', '.join(twice[:5])} occur twice; remove or rename one"
            raise ValueError(message)
        found = table.select(names).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(str(error).partition("\n")[0]) from error
    rows = [{name: present(value) for name, value in row.items()} for row in found]
    kept = [number for number, row in enumerate(rows) if any(v is not None for v in row.values())]
    return TextTable(names, [rows[number] for number in kept], [number + 1 for number in kept])


def _slide_row(values: dict[str, Any], base: str) -> SlideRow:
    """Turn one line of the manifest into a row; relative paths start at the folder `base`."""
    kept = {key: value for key, value in values.items() if value is not None}
    slide_id, uri = str(kept.pop("slide_id", "")), str(kept.pop("uri", ""))
    mpp, mpp_error = _parse_mpp(kept.pop("mpp", None), slide_id)
    confirmed, confirmed_error = _parse_confirmed(kept.pop(CONFIRMED, None), slide_id)
    kept |= {key: absolute(str(kept[key]), base) for key in PATH_COLUMNS if key in kept}
    kept |= {key: number_text(kept[key]) for key in NUMBER_COLUMNS if key in kept}
    mpp_error = mpp_error or confirmed_error
    return SlideRow(slide_id, absolute(uri, base), mpp, mpp_error, kept, confirmed, base)


def absolute(uri: str, base: str) -> str:
    """Return `uri`, or `base`/`uri` if `uri` is a relative path."""
    if not uri or "://" in uri or PurePosixPath(uri).is_absolute():
        return uri
    return f"{base}/{uri}"


def _parse_mpp(value: Any, slide_id: str) -> tuple[float | None, str | None]:  # noqa: ANN401
    """Return the mpp of a manifest cell and the reason why it cannot be used; None for absent."""
    if value is None:
        return None, None
    source = f"slide {slide_id!r} in the manifest"
    try:
        if isinstance(value, bool):
            raise TypeError
        return check_mpp(float(number_text(value)), source), None
    except (TypeError, ValueError) as error:
        text = str(error)
        return None, text if source in text else f"{source}: mpp {value!r} is not a number"


def _parse_confirmed(
    value: Any,  # noqa: ANN401
    slide_id: str,
) -> tuple[bool, str | None]:
    """Return whether a cell confirms the slide's mpp, and the reason why it cannot be used."""
    text = "" if value is None else str(value).strip().lower()
    if text in ("", *NO):
        return False, None
    source = f"slide {slide_id!r} in the manifest"
    if text not in YES:
        return False, f"{source}: {CONFIRMED} {value!r} is neither 'yes' nor 'no'"
    return True, None


def _problems(rows: list[SlideRow], numbers: list[int]) -> list[str]:
    """Return the problems that make the whole manifest unusable."""
    problems = []
    seen: dict[str, str] = {}
    for number, row in zip(numbers, rows, strict=True):
        if not row.slide_id:
            problems.append(
                f"row {number}: slide_id '' is empty, or a text for missing values such as NA; "
                "give the slide a name"
            )
            continue
        if not SLIDE_ID.fullmatch(row.slide_id) or ".." in row.slide_id:
            problems.append(
                f"row {number}: slide_id {row.slide_id!r} cannot name a file; use letters, digits, "
                "'_', '-', '+' and single dots"
            )
        if len(row.slide_id) > MAX_ID:
            problems.append(
                f"row {number}: slide_id {row.slide_id[:40]}... has {len(row.slide_id):,} "
                f"characters; files are named after it, so give at most {MAX_ID}"
            )
        other = seen.get(row.slide_id.lower())
        if other == row.slide_id:
            problems.append(f"row {number}: slide_id {row.slide_id!r} occurs twice; rename one")
        elif other is not None:
            problems.append(
                f"row {number}: slide_id {row.slide_id!r} differs from {other!r} only in case, and "
                "some file systems take both for one name; rename one"
            )
        if not row.uri:
            problems.append(f"row {number}: slide {row.slide_id!r} has no uri; name its image")
        texts = (row.uri, *(text for text in row.columns.values() if isinstance(text, str)))
        problems += [f"row {number}: {reason}" for reason in map(secret_in, texts) if reason]
        seen[row.slide_id.lower()] = row.slide_id
    return problems
