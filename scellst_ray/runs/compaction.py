"""Compaction: the receipts of a slide become its tables and its record.

A shard holds the cells of some tiles; a seam is the border between two tiles.

- Memory does not grow with the slide: one row group, one shard, and a few numbers for each nucleus
  near a seam.
- Rows are in the order of cell ids. Which nuclei at a seam are the same depends on the nuclei
  alone. Row groups are cut by number of rows alone. So the tables do not depend on how tiles were
  shared out, retried or resumed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.core.version import __version__
from scellst_ray.models.mil.stored_head import HEAD_FILE, LastLayer, read_last_layer
from scellst_ray.nuclei import seams
from scellst_ray.nuclei.imported.table import import_report
from scellst_ray.runs.boxes import COVERING, with_boxes
from scellst_ray.runs.documents import publish_document
from scellst_ray.runs.domain_shift import SlideScore, limit_of_head
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.profiles import Profiles, publish_profiles
from scellst_ray.runs.receipt_sources import only_source
from scellst_ray.runs.records import DomainShift, ImportReport, SlideRecord, SlideStatus
from scellst_ray.runs.shards import Shards, SlideCells

ROW_GROUP = 16_384
GEO = {
    "version": "1.1.0",
    "primary_column": "polygon",
    # crs must be null: without the key, readers take longitude and latitude.
    "columns": {
        "polygon": {
            "encoding": "WKB",
            "crs": None,
            "geometry_types": ["Polygon"],
            "covering": COVERING,
        }
    },
}


@dataclass(frozen=True)
class TableCounts:
    """Counts of a slide's tables; the defaults are those of a slide without cells.

    Attributes:
        tables: Names of the tables written.
        num_cells: Number of nuclei kept.
        num_doubled: Number of nuclei found by two tiles and kept once.
        num_adopted: Number of nuclei owned by no tile and kept.
        domain_shift: Distance from the cells of the head's training; None without a head.
        files: Stamps of the tables' files, by name of the table.
    """

    tables: tuple[str, ...] = ()
    num_cells: int = 0
    num_doubled: int = 0
    num_adopted: int = 0
    domain_shift: DomainShift | None = None
    files: dict[str, storage.StoredStamp] = field(default_factory=dict)


def finish_slide(
    run: RunFolder,
    slide_id: str,
    receipts: pa.Table,
    shards: Shards | None = None,
    *,
    imported: bool = False,
) -> SlideRecord:
    """Write a slide's tables from its shards, then its record; return the record.

    The shards stay: they may hold cells of other slides.

    Args:
        run: The run.
        slide_id: The slide.
        receipts: RECEIPTS of this slide, one for each of its tiles.
        shards: Reader of shards, shared if several slides are finished.
        imported: Whether the nuclei came from a file. The record then counts them.

    Raises:
        DamagedShardsError: shards are not what the receipts say. Nothing is written.
        ValueError: the receipts are of several files. Nothing is written.
    """
    source = only_source(slide_id, receipts)
    if (np.diff(receipts["tile_id"].to_numpy()) < 0).any():
        receipts = receipts.sort_by("tile_id")
    failed = receipts.filter(pc.is_valid(receipts["error"]))
    cells = SlideCells(shards or Shards(run), slide_id, receipts)
    cells.check()
    files = {}
    if len(failed):
        table = schemas.conform(failed, schemas.FAILURES, "FAILURES", run.digest)
        files["FAILURES"] = _write(run.failures_uri(slide_id), table.schema, iter([table]))
    elif storage.exists(run.failures_uri(slide_id)):
        storage.remove_tree(run.failures_uri(slide_id))
    try:
        written = _write_tables(run, slide_id, cells)
    except storage.DamagedFileError:
        # A shard is whole where its ids lie, and not elsewhere: find all such shards.
        cells.check(thoroughly=True)
        raise
    record = _record(slide_id, receipts, failed, written)
    record["files"] = files | written.files
    if source is not None:
        record["source"] = source
    report = _import_report(run, slide_id) if imported else None
    if report is not None:
        record["imported"] = report
    publish_document(run.record_uri(slide_id), record)
    if imported and not len(failed):
        storage.remove_tree(run.imported_uri(slide_id))
    return record


def _import_report(run: RunFolder, slide_id: str) -> ImportReport | None:
    """Return the report on a slide's imported nuclei; None if no file of them is left."""
    files = storage.list_files(run.imported_uri(slide_id))
    if not files:
        return None
    report = import_report(storage.read_schema(files[-1]).empty_table())
    return cast("ImportReport", report)


def unfinished_record(slide_id: str, error_type: str, error: str) -> SlideRecord:
    """Return the record, not published, of a slide whose tables could not be written."""
    return {
        "slide_id": slide_id,
        "status": "failed",
        "num_tiles": 0,
        "num_failed_tiles": 0,
        "num_cells": 0,
        "stage": "finish",
        "error_type": error_type,
        "error": error,
    }


def _record(
    slide_id: str, receipts: pa.Table, failed: pa.Table, written: TableCounts
) -> SlideRecord:
    """Return the record. The status is empty if there is no tissue or no cell."""
    status: SlideStatus = "done" if written.num_cells else "empty"
    if len(failed):
        status = "failed" if len(failed) == len(receipts) else "partial"
    last = receipts.slice(len(receipts) - 1, 1).to_pylist()[0]
    seconds = {s: pc.sum(receipts[f"seconds_{s}"]).as_py() or 0.0 for s in schemas.STAGES}
    record: SlideRecord = {
        "slide_id": slide_id,
        "status": status,
        "mpp": last["mpp"],
        "read_mpp": last["read_mpp"],
        "width0": last["width0"],
        "height0": last["height0"],
        "num_tiles": last["num_tiles"],
        "num_failed_tiles": len(failed),
        "num_cells": written.num_cells,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "waited_s": round(pc.sum(receipts["waited_s"]).as_py() or 0.0, 3),
        "scellst_ray": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if len(failed):
        first = failed.slice(0, 1).to_pylist()[0]
        record["stage"] = first["stage"]
        record["error_type"] = first["error_type"]
        record["error"] = first["error"]
    if status != "failed":
        record["tables"] = list(written.tables)
        record["seams"] = {"doubled": written.num_doubled, "adopted": written.num_adopted}
    if written.domain_shift is not None:
        record["domain_shift"] = written.domain_shift
    return record


def _write_tables(run: RunFolder, slide_id: str, cells: SlideCells) -> TableCounts:
    """Write CELLS, each nucleus once, and EXPRESSION if the shards hold hidden factors."""
    if not cells.num_cells:
        return TableCounts()
    resolved = seams.resolve(lambda: _seam_cells(cells.read(["cell_id", "seam", "polygon"])))
    shard = cells.schema()
    dim = shard.field("embedding").type.list_size if "embedding" in shard.names else None
    geo = {b"geo": json.dumps(GEO).encode()}
    schema = schemas.sign_schema(schemas.cells_schema(dim), "CELLS", run.digest, geo)
    names = [name for name in schema.names if name != schemas.BBOX.name]
    found = _without(resolved.dropped, cells.read(names))
    files = {"CELLS": _write(run.cells_uri(slide_id), schema, map(with_boxes, found))}
    shift = None
    if "hidden" in shard.names:
        schema = _expression_schema(run, shard)
        rows = _without(resolved.dropped, cells.read([*schema.names, "nucleus_type"]))
        layer = _layer_of_run(run)
        profiles = None if layer is None else Profiles(layer)
        rows = rows if profiles is None else profiles.counting(rows)
        files["EXPRESSION"], shift = _write_expression(run, slide_id, schema, rows)
        if profiles is not None:
            table = profiles.table(slide_id, run.digest)
            files["PROFILES"] = publish_profiles(run.profiles_uri(slide_id), table)
    num_cells = cells.num_cells - len(resolved.dropped)
    counts = (num_cells, resolved.num_doubled, resolved.num_adopted)
    tables = tuple(name for name in files if name != "PROFILES")
    return TableCounts(tables, *counts, shift, files)


def _layer_of_run(run: RunFolder) -> LastLayer | None:
    """Return the last layer of the run's head, read once in a process; None without a head."""
    uri = storage.join(run.uri, HEAD_FILE)
    if not storage.exists(uri):
        return None
    sha256 = run.head_digest()
    return read_last_layer(uri) if sha256 is None else _read_once(uri, sha256)


# One SHA-256 means one content.
_read_once = lru_cache(maxsize=4)(read_last_layer)


def _expression_schema(run: RunFolder, shard: pa.Schema) -> pa.Schema:
    dim, with_distance = shard.field("hidden").type.list_size, "distance" in shard.names
    schema = schemas.expression_schema(dim, with_distance=with_distance)
    return schemas.sign_schema(schema, "EXPRESSION", run.digest)


def _write_expression(
    run: RunFolder, slide_id: str, schema: pa.Schema, rows: Iterator[pa.Table]
) -> tuple[storage.StoredStamp, DomainShift | None]:
    """Write EXPRESSION; return its stamp, and how far its cells lie from the head's training."""
    uri = run.expression_uri(slide_id)
    if "distance" not in schema.names:  # shards of an earlier release
        return _write(uri, schema, rows), None
    score = SlideScore()
    stamp = _write(uri, schema, score.counting(rows))
    limit = limit_of_head(storage.join(run.uri, HEAD_FILE), run.head_digest())
    return stamp, score.result(limit)


def _seam_cells(cells: Iterator[pa.Table]) -> Iterator[seams.SeamCells]:
    """Yield ids, seam bits and outlines of the nuclei that other tiles may also have found."""
    for part in cells:
        near = part.filter(pc.greater(part["seam"], 0))
        if len(near):
            cell_id, seam, polygon = (near[n].to_numpy() for n in ("cell_id", "seam", "polygon"))
            yield seams.SeamCells(cell_id, seam, polygon)


def _without(dropped: NDArray[np.int64], cells: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the cells of each part without those whose ids are in `dropped` (ascending)."""
    for part in cells:
        cell_id = part["cell_id"].to_numpy()
        start, end = np.searchsorted(dropped, [cell_id[0], cell_id[-1] + 1])
        yield part.filter(pa.array(~np.isin(cell_id, dropped[start:end]))) if end > start else part


def _write(uri: str, schema: pa.Schema, tables: Iterator[pa.Table]) -> storage.StoredStamp:
    """Publish tables as one Parquet file in row groups of a fixed number of rows."""

    def write(writer: pq.ParquetWriter) -> None:
        waiting, num_rows = [schema.empty_table()], 0
        for table in tables:
            waiting.append(table.select(schema.names).cast(schema))
            num_rows += len(table)
            while num_rows >= ROW_GROUP:
                joined = pa.concat_tables(waiting)
                writer.write_table(joined.slice(0, ROW_GROUP))
                waiting, num_rows = [joined.slice(ROW_GROUP)], num_rows - ROW_GROUP
        if num_rows:
            writer.write_table(pa.concat_tables(waiting))

    return storage.publish_stamped(uri, schema, write).as_json()
