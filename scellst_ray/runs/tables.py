"""The tables of a slide, opened only if they are what its record says.

Page checksums are verified while a table is read. Before that its footer, size, number of rows,
run and slide are checked. So a file that is cut or changed is refused, and so is a whole file of
another slide, of another run, or of an earlier time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.documents import checked_record
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.records import SlideRecord

REMEDY = (
    "put a copy of it back, or remove records/{}.json and run the same command again, which does "
    "the slide again; `scellst-ray verify` lists all such files"
)


def table_uri(run: RunFolder, name: str, slide_id: str) -> str:
    """Return the URI of a slide's CELLS, EXPRESSION, PROFILES or FAILURES."""
    uris = {
        "CELLS": run.cells_uri,
        "EXPRESSION": run.expression_uri,
        "PROFILES": run.profiles_uri,
        "FAILURES": run.failures_uri,
    }
    return uris[name](slide_id)


def stamp_in(record: SlideRecord, name: str) -> storage.TableStamp | None:
    """Return the stamp of a table in its record; None from earlier releases."""
    found = record.get("files", {}).get(name)
    return None if found is None else storage.TableStamp.from_json(found)


@contextmanager
def open_table(
    run: RunFolder, record: SlideRecord, name: str, *, whole: bool = False
) -> Iterator[pq.ParquetFile]:
    """Open a table of a slide.

    Args:
        run: The run.
        record: The slide's record, which names the table.
        name: CELLS, EXPRESSION, PROFILES or FAILURES.
        whole: Whether all of it will be read: then the digest of a local file is verified first. A
            remote one would be fetched twice.

    Raises:
        DamagedFileError: the table is damaged, or is not the one that the record means; also while
            it is read.
        FileNotFoundError: the table is absent.
        ValueError: it is of a newer release.
    """
    slide_id = record["slide_id"]
    uri, stamp = table_uri(run, name, slide_id), stamp_in(record, name)
    try:
        if whole and stamp is not None:
            check_digest(uri, stamp)
        with storage.open_parquet(uri, stamp) as file:
            schemas.check(file.schema_arrow, name, uri)
            problem = foreign(run, record, name, file)
            if problem is not None:
                raise storage.DamagedFileError(uri, problem)
            yield file
    except FileNotFoundError as error:
        remedy = REMEDY.format(slide_id)
        message = f"{uri}: is absent, and the slide's record names it; {remedy}"
        raise FileNotFoundError(message) from error
    except storage.DamagedFileError as error:
        problem = _diagnose(run, record, name) or error.problem
        raise storage.DamagedFileError(uri, problem, REMEDY.format(slide_id)) from error


def _diagnose(run: RunFolder, record: SlideRecord, name: str) -> str | None:
    """Return whose table this is, if it is a whole one of another run or slide.

    Raises:
        ValueError: it is a whole file of another kind.
    """
    uri = table_uri(run, name, record["slide_id"])
    with suppress(storage.DamagedFileError, OSError), storage.open_parquet(uri) as file:
        schemas.check(file.schema_arrow, name, uri)
        return foreign(run, record, name, file)
    return None


def check_digest(uri: str, stamp: storage.TableStamp) -> None:
    """Read a whole file and compare its digest.

    Raises:
        DamagedFileError: it is another one.
        FileNotFoundError: the file is absent.
    """
    if storage.digest_of(uri) != stamp.sha256:
        raise storage.DamagedFileError(uri, "is not the file that was written: its digest differs")


def read_slide_table(
    run: RunFolder, slide_id: str, name: str, columns: Sequence[str], *, whole: bool = False
) -> pa.Table:
    """Read columns of a slide's table, in this order; arguments and errors as `open_table`."""
    try:
        record = checked_record(run.record_uri(slide_id), SlideRecord)
    except FileNotFoundError:  # without a record only slide and run can be checked
        record = cast("SlideRecord", {"slide_id": slide_id})
    with open_table(run, record, name, whole=whole) as file:
        missing = set(columns) - set(file.schema_arrow.names)
        if missing:
            message = f"columns {sorted(missing)} are missing; it has {file.schema_arrow.names}"
            raise ValueError(message)
        return read_rows(file, columns)


def foreign(run: RunFolder, record: SlideRecord, name: str, file: pq.ParquetFile) -> str | None:
    """Return why a whole table is not the one that a record means; None if it is."""
    digest = (file.schema_arrow.metadata or {}).get(b"scellst_ray.run_digest", b"").decode()
    if digest != run.digest:
        return f"belongs to run {digest}, not to {run.digest}; put this run's own file back"
    slide_ids = slide_ids_of(file)
    if slide_ids - {record["slide_id"]}:
        return f"holds slide {sorted(slide_ids)[0]!r}, not {record['slide_id']!r}"
    counts = {"FAILURES": record.get("num_failed_tiles"), "PROFILES": None}
    expected = counts.get(name, record.get("num_cells"))
    rows = file.metadata.num_rows
    if expected is not None and rows != expected:
        return f"holds {rows:,} rows, and the slide's record says {expected:,}"
    return None


def slide_ids_of(file: pq.ParquetFile) -> set[str]:
    """Return the least and greatest slide_id of a table, from its footer where that has them."""
    column = file.schema_arrow.names.index("slide_id")
    found: set[str] = set()
    for group in range(file.num_row_groups):
        statistics = file.metadata.row_group(group).column(column).statistics
        if statistics is not None and statistics.has_min_max:
            found |= {statistics.min, statistics.max}
        else:
            found |= set(file.read_row_group(group, ["slide_id"])["slide_id"].unique().to_pylist())
    return found


def read_rows(file: pq.ParquetFile, columns: Sequence[str]) -> pa.Table:
    """Read columns of an open table, in this order.

    Raises:
        pa.ArrowInvalid: not all rows can be read.
    """
    table = file.read(columns=list(columns)).select(list(columns))
    if len(table) != file.metadata.num_rows:
        message = f"{len(table)} of {file.metadata.num_rows} rows can be read"
        raise pa.ArrowInvalid(message)
    return table
