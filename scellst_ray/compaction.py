"""From a slide's receipts to its tables and its record.

Streams: memory is one row group and one shard, whatever the size of the slide. Rows come in the
order of cell ids and row groups are cut by number of rows alone, so the tables are the same
however the tiles were shared out, retried or resumed.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scellst_ray import __version__, schemas, storage
from scellst_ray.runs import RunFolder

ROW_GROUP = 16_384
GEO = {
    "version": "1.1.0",
    "primary_column": "polygon",
    # crs must be null: absent would mean longitude and latitude.
    "columns": {"polygon": {"encoding": "WKB", "crs": None, "geometry_types": ["Polygon"]}},
}


def finish_slide(run: RunFolder, slide_id: str, receipts: pa.Table) -> dict[str, Any]:
    """Write a slide's tables from its shards, then its record; return the record.

    Args:
        run: The run.
        slide_id: The slide.
        receipts: RECEIPTS of this slide, one per tile, all of them.
    """
    receipts = receipts.sort_by("tile_id")
    failed = receipts.filter(pc.is_valid(receipts["error"]))
    status = _status(receipts, failed)
    record = _record(slide_id, receipts, status, num_failed=len(failed))
    if len(failed):
        failures = schemas.conform(failed, schemas.FAILURES, "FAILURES", run.digest)
        storage.publish_table(run.failures_uri(slide_id), failures)
        first = failed.slice(0, 1).to_pylist()[0]
        record |= {key: first[key] for key in ("stage", "error_type", "error")}
    elif storage.exists(run.failures_uri(slide_id)):
        storage.remove_tree(run.failures_uri(slide_id))
    if status != "failed":
        record["tables"] = _write_tables(run, slide_id, receipts)
    storage.publish_json(run.record_uri(slide_id), record)
    if not len(failed):
        # A partial slide keeps its shards: a later run adds only the tiles that failed.
        storage.remove_tree(run.shards_uri(slide_id))
    return record


def unfinished_record(slide_id: str, error: BaseException) -> dict[str, Any]:
    """Return the record, not published, of a slide whose tables could not be written."""
    return {
        "slide_id": slide_id,
        "status": "failed",
        "num_tiles": 0,
        "num_failed_tiles": 0,
        "num_cells": 0,
        "stage": "finish",
        "error_type": type(error).__name__,
        "error": str(error),
    }


def _status(receipts: pa.Table, failed: pa.Table) -> str:
    """Return done, empty (no tissue or no cell), partial or failed."""
    if len(failed):
        return "failed" if len(failed) == len(receipts) else "partial"
    return "done" if pc.sum(receipts["num_cells"]).as_py() else "empty"


def _record(slide_id: str, receipts: pa.Table, status: str, num_failed: int) -> dict[str, Any]:
    first = receipts.slice(len(receipts) - 1, 1).to_pylist()[0]
    seconds = {s: pc.sum(receipts[f"seconds_{s}"]).as_py() or 0.0 for s in schemas.STAGES}
    return {
        "slide_id": slide_id,
        "status": status,
        "mpp": first["mpp"],
        "read_mpp": first["read_mpp"],
        "width0": first["width0"],
        "height0": first["height0"],
        "num_tiles": first["num_tiles"],
        "num_failed_tiles": num_failed,
        "num_cells": pc.sum(receipts["num_cells"]).as_py(),
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "scellst_ray": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _write_tables(run: RunFolder, slide_id: str, receipts: pa.Table) -> list[str]:
    """Write CELLS, and EXPRESSION if the shards hold hidden vectors; return the tables' names."""
    shards = [name for name in receipts["shard"].to_pylist() if name]
    if not shards:
        return []
    names = storage.read_schema(storage.join(run.shards_uri(slide_id), shards[0])).names
    dim = schemas.EMBEDDING_DIM if "embedding" in names else None
    geo = {b"geo": json.dumps(GEO).encode()}
    cells = schemas.signed(schemas.cells_schema(dim), "CELLS", run.digest, geo)
    _write(run.cells_uri(slide_id), cells, _cells_in_order(run, slide_id, receipts, cells.names))
    if "hidden" not in names:
        return ["CELLS"]
    hidden = schemas.signed(schemas.expression_schema(), "EXPRESSION", run.digest)
    rows = _cells_in_order(run, slide_id, receipts, hidden.names)
    _write(run.expression_uri(slide_id), hidden, rows)
    return ["CELLS", "EXPRESSION"]


def _cells_in_order(
    run: RunFolder, slide_id: str, receipts: pa.Table, columns: list[str]
) -> Iterator[pa.Table]:
    """Yield the cells of each tile, in tile order, holding one shard at a time."""
    open_name, shard = None, None
    for row in receipts.select(["shard", "shard_row", "num_cells"]).to_pylist():
        if not row["num_cells"]:
            continue
        if row["shard"] != open_name:
            open_name = row["shard"]
            shard = storage.read_table(storage.join(run.shards_uri(slide_id), open_name), columns)
        assert shard is not None
        yield shard.slice(row["shard_row"], row["num_cells"])


def _write(uri: str, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    """Publish tables as one Parquet file in row groups of a fixed number of rows."""

    def write(path: Path) -> None:
        names = [name for name in storage.DICTIONARY if name in schema.names]
        options = {"compression": storage.COMPRESSION, "use_dictionary": names}
        with pq.ParquetWriter(path, schema, **options) as writer:
            waiting: list[pa.Table] = []
            for table in tables:
                waiting.append(table.select(schema.names).cast(schema))
                while sum(len(part) for part in waiting) >= ROW_GROUP:
                    joined = pa.concat_tables(waiting)
                    writer.write_table(joined.slice(0, ROW_GROUP))
                    waiting = [joined.slice(ROW_GROUP)]
            if sum(len(part) for part in waiting):
                writer.write_table(pa.concat_tables(waiting))

    storage.publish(uri, write)
