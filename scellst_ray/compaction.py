"""From a slide's receipts to its tables and its record.

Streams: memory is one row group, one shard and a few numbers for each nucleus near a seam between
tiles, whatever the size of the slide. Rows come in the order of cell ids, what is the same nucleus
at a seam depends on the nuclei alone, and row groups are cut by number of rows alone, so the tables
are the same however the tiles were shared out, retried or resumed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scellst_ray import __version__, schemas, storage
from scellst_ray.domain_shift import SlideScore, limit_of_head
from scellst_ray.expression import HEAD_FILE
from scellst_ray.nuclei import seams
from scellst_ray.nuclei.imported_table import import_report
from scellst_ray.runs import RunFolder

ROW_GROUP = 16_384
GEO = {
    "version": "1.1.0",
    "primary_column": "polygon",
    # crs must be null: absent would mean longitude and latitude.
    "columns": {"polygon": {"encoding": "WKB", "crs": None, "geometry_types": ["Polygon"]}},
}


@dataclass(frozen=True)
class Written:
    """What a slide's tables hold; as it stands, that of a slide without cells."""

    tables: tuple[str, ...] = ()
    num_cells: int = 0
    num_doubled: int = 0
    num_adopted: int = 0
    domain_shift: dict[str, Any] | None = None


def finish_slide(run: RunFolder, slide_id: str, receipts: pa.Table) -> dict[str, Any]:
    """Write a slide's tables from its shards, then its record; return the record.

    Args:
        run: The run.
        slide_id: The slide.
        receipts: RECEIPTS of this slide, one per tile, all of them.
    """
    receipts = receipts.sort_by("tile_id")
    failed = receipts.filter(pc.is_valid(receipts["error"]))
    if len(failed):
        failures = schemas.conform(failed, schemas.FAILURES, "FAILURES", run.digest)
        storage.publish_table(run.failures_uri(slide_id), failures)
    elif storage.exists(run.failures_uri(slide_id)):
        storage.remove_tree(run.failures_uri(slide_id))
    written = _write_tables(run, slide_id, receipts)
    record = _record(slide_id, receipts, failed, written) | _imported(run, slide_id)
    storage.publish_json(run.record_uri(slide_id), record)
    if not len(failed):
        # A partial slide keeps its shards: a later run adds only the tiles that failed.
        storage.remove_tree(run.shards_uri(slide_id))
    return record


def _imported(run: RunFolder, slide_id: str) -> dict[str, Any]:
    """Return what became of the nuclei that came from a file; nothing if the slide has none."""
    uris = storage.list_files(run.shards_uri(slide_id))
    files = [uri for uri in uris if uri.rsplit("/", 1)[-1].startswith("imported-")]
    if not files:
        return {}
    report = import_report(storage.read_schema(files[-1]).empty_table())
    return {"imported": report}


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


def _record(
    slide_id: str, receipts: pa.Table, failed: pa.Table, written: Written
) -> dict[str, Any]:
    """Return the record; status done, empty (no tissue or no cell), partial or failed."""
    status = "done" if written.num_cells else "empty"
    if len(failed):
        status = "failed" if len(failed) == len(receipts) else "partial"
    last = receipts.slice(len(receipts) - 1, 1).to_pylist()[0]
    seconds = {s: pc.sum(receipts[f"seconds_{s}"]).as_py() or 0.0 for s in schemas.STAGES}
    record = {
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
        "scellst_ray": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if len(failed):
        first = failed.slice(0, 1).to_pylist()[0]
        record |= {key: first[key] for key in ("stage", "error_type", "error")}
    if status != "failed":
        record["tables"] = list(written.tables)
        record["seams"] = {"doubled": written.num_doubled, "adopted": written.num_adopted}
    if written.domain_shift is not None:
        record["domain_shift"] = written.domain_shift
    return record


def _write_tables(run: RunFolder, slide_id: str, receipts: pa.Table) -> Written:
    """Write CELLS, and EXPRESSION if the shards hold hidden vectors, each nucleus once."""
    shards = [name for name in receipts["shard"].to_pylist() if name]
    if not shards:
        return Written()

    def tiles(columns: list[str]) -> Iterator[pa.Table]:
        return _tiles_in_order(run, slide_id, receipts, columns)

    found = seams.resolve(lambda: _seam_cells(tiles(["cell_id", "seam", "polygon"])))
    shard = storage.read_schema(storage.join(run.shards_uri(slide_id), shards[0]))
    dim = shard.field("embedding").type.list_size if "embedding" in shard.names else None
    geo = {b"geo": json.dumps(GEO).encode()}
    schema = schemas.signed(schemas.cells_schema(dim), "CELLS", run.digest, geo)
    _write(run.cells_uri(slide_id), schema, _without(found.dropped, tiles(schema.names)))
    tables, shift = ["CELLS"], None
    if "hidden" in shard.names:
        schema = _expression_schema(run, shard)
        rows = _without(found.dropped, tiles(schema.names))
        shift = _write_expression(run, slide_id, schema, rows)
        tables.append("EXPRESSION")
    num_cells = pc.sum(receipts["num_cells"]).as_py() - len(found.dropped)
    return Written(tuple(tables), num_cells, found.num_doubled, found.num_adopted, shift)


def _expression_schema(run: RunFolder, shard: pa.Schema) -> pa.Schema:
    dim, with_distance = shard.field("hidden").type.list_size, "distance" in shard.names
    schema = schemas.expression_schema(dim, with_distance=with_distance)
    return schemas.signed(schema, "EXPRESSION", run.digest)


def _write_expression(
    run: RunFolder, slide_id: str, schema: pa.Schema, rows: Iterator[pa.Table]
) -> dict[str, Any] | None:
    """Write EXPRESSION; return how far the cells lie from those the run's head knows."""
    uri = run.expression_uri(slide_id)
    if "distance" not in schema.names:  # shards of an earlier release
        _write(uri, schema, rows)
        return None
    score = SlideScore()
    _write(uri, schema, score.seen(rows))
    return score.judged(limit_of_head(storage.join(run.uri, HEAD_FILE)))


def _seam_cells(tiles: Iterator[pa.Table]) -> Iterator[seams.SeamCells]:
    """Yield what is needed of the nuclei of each tile that other tiles may also have found."""
    for tile in tiles:
        near = tile.filter(pc.greater(tile["seam"], 0))
        if len(near):
            cell_id, seam, polygon = (near[n].to_numpy() for n in ("cell_id", "seam", "polygon"))
            yield seams.SeamCells(cell_id, seam, polygon)


def _without(dropped: NDArray[np.int64], tiles: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the cells of each tile whose ids are not among those dropped (ascending)."""
    for tile in tiles:
        cell_id = tile["cell_id"].to_numpy()
        start, end = np.searchsorted(dropped, [cell_id[0], cell_id[-1] + 1])
        yield tile.filter(pa.array(~np.isin(cell_id, dropped[start:end]))) if end > start else tile


def _tiles_in_order(
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

    storage.publish(uri, write)
