"""The manifest: the table that lists the slides of a cohort, and its checks before a job starts."""

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from scellst_ray.core.geometry import check_mpp
from scellst_ray.core.resolution import CONFIRMED
from scellst_ray.storage.credentials import redact, secret_in
from scellst_ray.storage.retries import call_with_retries

if TYPE_CHECKING:
    import polars as pl

ALIASES = {"path": "uri", "wsi": "uri", "wsi_mpp": "mpp"}
PATH_COLUMNS = ("spots", "spot_positions", "segmentation", "xenium", "xenium_alignment")
YES, NO = ("yes", "y", "true", "t", "1", "1.0"), ("no", "n", "false", "f", "0", "0.0")
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
    frame = _read_frame(uri)
    for old, new in ALIASES.items():
        if old in frame.columns and new not in frame.columns:
            frame = frame.rename({old: new})
    missing = [name for name in ("slide_id", "uri", *required) if name not in frame.columns]
    if missing:
        hints = [get_close_matches(name, frame.columns, n=1) for name in missing]
        near = ", ".join(f"{hint[0]!r}" for hint in hints if hint)
        message = (
            f"{uri}: needed column(s) {', '.join(missing)} not found; the manifest has "
            f"{', '.join(frame.columns)}{f' (did you mean {near}?)' if near else ''}"
        )
        raise ValueError(message)
    if frame.is_empty():
        message = f"{uri}: the manifest has no rows; list at least one slide"
        raise ValueError(message)
    # Absolute paths mean the same in every process.
    fs, path = fsspec.core.url_to_fs(uri)
    base = (str(path) if isinstance(fs, LocalFileSystem) else uri).rsplit("/", 1)[0]
    rows = [_slide_row(values, base) for values in frame.iter_rows(named=True)]
    problems = _problems(rows)
    if problems:
        message = f"{uri}: " + "; ".join(problems)
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


def _read_frame(uri: str) -> "pl.DataFrame":
    """Read the manifest as a polars frame, CSV values as strings."""
    import polars as pl  # noqa: PLC0415 - workers import this module but read no manifest

    fs, path = fsspec.core.url_to_fs(uri)
    is_local = isinstance(fs, LocalFileSystem)
    if is_local and not fs.isfile(path):
        message = f"{uri}: no such manifest"
        raise FileNotFoundError(message)

    def read() -> bytes:
        return bytes(fs.cat_file(path))

    content = read() if is_local else call_with_retries(read, redact(uri))
    try:
        if uri.endswith((".parquet", ".pq")):
            return pl.read_parquet(content)
        # Read strings only: a slide_id of "007" must keep its zeros.
        frame = pl.read_csv(content, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        reason = str(error).partition("\n")[0]
        message = f"{uri}: cannot be read as a manifest ({reason}); expected CSV or Parquet"
        raise ValueError(message) from error
    # Spreadsheets write empty lines.
    return frame.filter(~pl.all_horizontal(pl.all().is_null()))


def _slide_row(values: dict[str, Any], base: str) -> SlideRow:
    """Turn one line of the manifest into a row; relative paths start at the folder `base`."""
    kept = {key: value for key, value in values.items() if value is not None and value != ""}
    slide_id, uri = str(kept.pop("slide_id", "")).strip(), str(kept.pop("uri", "")).strip()
    mpp, mpp_error = _parse_mpp(kept.pop("mpp", None), slide_id)
    confirmed, confirmed_error = _parse_confirmed(kept.pop(CONFIRMED, None), slide_id)
    kept |= {key: absolute(str(kept[key]), base) for key in PATH_COLUMNS if key in kept}
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
        return check_mpp(float(value), source), None
    except ValueError as error:
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


def _problems(rows: list[SlideRow]) -> list[str]:
    """Return the problems that make the whole manifest unusable."""
    problems = []
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        if not SLIDE_ID.fullmatch(row.slide_id) or ".." in row.slide_id:
            problems.append(
                f"row {number}: slide_id {row.slide_id!r} cannot name a file; use letters, digits, "
                "'_', '-', '+' and single dots"
            )
        if row.slide_id in seen:
            problems.append(f"row {number}: slide_id {row.slide_id!r} occurs twice; rename one")
        if not row.uri:
            problems.append(f"row {number}: slide {row.slide_id!r} has no uri; name its image")
        texts = (row.uri, *(text for text in row.columns.values() if isinstance(text, str)))
        problems += [f"row {number}: {reason}" for reason in map(secret_in, texts) if reason]
        seen.add(row.slide_id)
    return problems
