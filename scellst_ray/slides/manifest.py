"""The manifest: which slides make up a cohort, and what is wrong with it before anything starts."""

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from scellst_ray.core.geometry import check_mpp
from scellst_ray.storage.credentials import redacted, secret_in
from scellst_ray.storage.retries import retried

if TYPE_CHECKING:
    import polars as pl

ALIASES = {"path": "uri", "wsi": "uri", "wsi_mpp": "mpp"}
PATH_COLUMNS = ("spots", "spot_positions", "segmentation", "xenium", "xenium_alignment")
SLIDE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class SlideRow:
    """One slide of a manifest.

    Attributes:
        slide_id: Unique name, safe as a file name.
        uri: Local path or fsspec URI of the image.
        mpp: um per level-0 px if the manifest overrides the file, else None.
        mpp_error: Why the manifest's mpp cannot be used; None if it can.
        columns: All further columns, as read (missing values left out).
    """

    slide_id: str
    uri: str
    mpp: float | None
    mpp_error: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


def read_manifest(uri: str, required: tuple[str, ...] = ()) -> list[SlideRow]:
    """Read a manifest (CSV or Parquet) into one row per slide, in its own order.

    Columns: `slide_id`, `uri` (aliases `path`, `wsi`), optional `mpp` (alias `wsi_mpp`) and
    `patient_id`; further columns are kept. A relative path is taken relative to the manifest.
    An unusable mpp is kept as the slide's own error: it never costs the other slides anything.

    Args:
        uri: Local path or fsspec URI of the manifest.
        required: Further columns this job needs.

    Raises:
        ValueError: a column is missing, a slide_id is doubled, empty or unsafe as a file name, a
            uri is empty, or there is no row at all; all problems are listed at once.
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
            f"{uri}: needed column(s) {', '.join(missing)} not found; it has "
            f"{', '.join(frame.columns)}{f' (did you mean {near}?)' if near else ''}"
        )
        raise ValueError(message)
    if frame.is_empty():
        message = f"{uri}: the manifest has no rows; list at least one slide"
        raise ValueError(message)
    # Absolute, so that it means the same in every process and however the manifest was named.
    fs, path = fsspec.core.url_to_fs(uri)
    base = (str(path) if isinstance(fs, LocalFileSystem) else uri).rsplit("/", 1)[0]
    rows = [_slide_row(values, base) for values in frame.iter_rows(named=True)]
    problems = _problems(rows)
    if problems:
        message = f"{uri}: " + "; ".join(problems)
        raise ValueError(message)
    return rows


def select_slides(slides: list[SlideRow], slide_ids: list[str] | None) -> list[SlideRow]:
    """Return the slides of these ids, in the order of the manifest; all if None.

    Raises:
        ValueError: an id is not in the manifest.
    """
    if slide_ids is None:
        return slides
    there = [slide.slide_id for slide in slides]
    unknown = sorted(set(slide_ids) - set(there))
    if unknown:
        near = get_close_matches(unknown[0], there, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        message = f"slides: the manifest has no slide_id {', '.join(map(repr, unknown))}{hint}"
        raise ValueError(message)
    return [slide for slide in slides if slide.slide_id in set(slide_ids)]


def _read_frame(uri: str) -> "pl.DataFrame":
    import polars as pl  # noqa: PLC0415 - workers only know slides, and need not wait for it

    fs, path = fsspec.core.url_to_fs(uri)
    is_local = isinstance(fs, LocalFileSystem)
    if is_local and not fs.isfile(path):
        message = f"{uri}: no such manifest"
        raise FileNotFoundError(message)

    def read() -> bytes:
        return bytes(fs.cat_file(path))

    content = read() if is_local else retried(read, redacted(uri))
    try:
        if uri.endswith((".parquet", ".pq")):
            return pl.read_parquet(content)
        # Strings first: a slide_id of "007" must stay one.
        frame = pl.read_csv(content, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        reason = str(error).partition("\n")[0]
        message = f"{uri}: cannot be read as a manifest ({reason}); expected CSV or Parquet"
        raise ValueError(message) from error
    # Spreadsheets leave empty lines.
    return frame.filter(~pl.all_horizontal(pl.all().is_null()))


def _slide_row(values: dict[str, Any], base: str) -> SlideRow:
    kept = {key: value for key, value in values.items() if value is not None and value != ""}
    slide_id, uri = str(kept.pop("slide_id", "")).strip(), str(kept.pop("uri", "")).strip()
    mpp, mpp_error = _parse_mpp(kept.pop("mpp", None), slide_id)
    kept |= {key: absolute(str(kept[key]), base) for key in PATH_COLUMNS if key in kept}
    return SlideRow(slide_id, absolute(uri, base), mpp, mpp_error, kept)


def absolute(uri: str, base: str) -> str:
    """Return `uri` unless it is a relative path, which is then taken below the folder `base`."""
    if not uri or "://" in uri or PurePosixPath(uri).is_absolute():
        return uri
    return f"{base}/{uri}"


def _parse_mpp(value: Any, slide_id: str) -> tuple[float | None, str | None]:  # noqa: ANN401
    if value is None:
        return None, None
    source = f"slide {slide_id!r} in the manifest"
    try:
        return check_mpp(float(value), source), None
    except ValueError as error:
        text = str(error)
        return None, text if source in text else f"{source}: mpp {value!r} is not a number"


def _problems(rows: list[SlideRow]) -> list[str]:
    """List what makes a manifest unusable as a whole."""
    problems = []
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        if not SLIDE_ID.fullmatch(row.slide_id) or ".." in row.slide_id:
            problems.append(
                f"row {number}: slide_id {row.slide_id!r} cannot name a file; use letters, digits, "
                "'_', '-', '+' and single dots"
            )
        if row.slide_id in seen:
            problems.append(f"row {number}: slide_id {row.slide_id!r} is there twice; rename one")
        if not row.uri:
            problems.append(f"row {number}: slide {row.slide_id!r} has no uri")
        texts = (row.uri, *(text for text in row.columns.values() if isinstance(text, str)))
        problems += [f"row {number}: {reason}" for reason in map(secret_in, texts) if reason]
        seen.add(row.slide_id)
    return problems
