"""State of each slide of a run, from its record or, before that exists, from its receipts."""

from collections.abc import Mapping

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.crop_files import index_uri
from scellst_ray.runs.documents import read_document, warn_once
from scellst_ray.runs.folder import FINISHED
from scellst_ray.runs.frames import frame_of
from scellst_ray.runs.reading import Run
from scellst_ray.runs.records import CropIndex, SlideRecord

WHY = ("stage", "error_type", "error")
STAGE_SECONDS = tuple(f"seconds_{stage}" for stage in schemas.STAGES)
SLIDE_COLUMNS = {
    "slide_id": pl.String,
    "bytes": pl.Int64,
    **dict.fromkeys(STAGE_SECONDS, pl.Float64),
    "status": pl.String,
    **dict.fromkeys(("num_tiles", "tiles_done", "tiles_failed", "num_cells"), pl.Int64),
    "seconds": pl.Float64,
    **dict.fromkeys(WHY, pl.String),
}


def count_receipts(last: pa.Table) -> pl.DataFrame:
    """Return counts of each slide, from the last receipts of its tiles."""
    # In Arrow and numpy, which hold a million receipts in a third of the memory of a frame.
    slide_ids = last["slide_id"].combine_chunks().dictionary_encode()
    of_slide, num_slides = slide_ids.indices.to_numpy(), len(slide_ids.dictionary)
    tile_ids, num_cells = last["tile_id"].to_numpy(), last["num_cells"].to_numpy()
    is_good = last["error"].is_null().to_numpy() & (tile_ids >= 0)
    is_bad = last["error"].is_valid().to_numpy()

    def total(values: NDArray[np.generic]) -> NDArray[np.int64]:
        return np.bincount(of_slide, values, minlength=num_slides).astype(np.int64)

    def most(values: NDArray[np.integer]) -> NDArray[np.int64]:
        found = np.full(num_slides, -1, np.int64)
        np.maximum.at(found, of_slide, values)
        return found

    columns = {
        "slide_id": slide_ids.dictionary,
        "good": total(is_good),
        "bad": total(is_bad),
        "cells": total(np.where(is_good, num_cells, 0)),
        # A slide that failed to be planned and was planned later has receipts of both kinds.
        "last_tile": most(tile_ids),
        "tiles_logged": most(last["num_tiles"].to_numpy()),
    }
    return frame_of(pa.table(columns))


def list_slides(run: Run, logged: pl.DataFrame, *, may_run: bool) -> pl.DataFrame:
    """Return one row per slide, from the log and from all other files of the folder."""
    sources, failed_crops = run.sources, _failed_crops(run)
    of_slide = {row["slide_id"]: row for row in logged.iter_rows(named=True)}
    rows = []
    for slide_id in sorted({*sources, *run.records, *of_slide}):
        source, record = sources.get(slide_id), run.records.get(slide_id)
        counts = of_slide.get(slide_id)
        row = _from_log(counts, may_run=may_run) if record is None else _from_record(record, counts)
        if slide_id in failed_crops and row["status"] in FINISHED:
            row |= {"status": "partial"} | failed_crops[slide_id]
        size = None if source is None else source.get("bytes")
        rows.append({"slide_id": slide_id, "bytes": size} | row)
    return pl.DataFrame(rows, schema=SLIDE_COLUMNS)


def _from_log(counts: Mapping[str, int] | None, *, may_run: bool) -> dict[str, object]:
    """Return a slide without a record, from the counts of its receipts."""
    if counts is None:
        return {"status": "pending", "tiles_done": 0, "tiles_failed": 0, "num_cells": 0}
    return {
        "status": "running" if may_run else "pending",
        "num_tiles": counts["tiles_logged"],
        "tiles_done": counts["good"],
        # A slide that could not be planned has a failure, but no tile.
        "tiles_failed": min(counts["bad"], counts["tiles_logged"]),
        "num_cells": counts["cells"],
    }


def _from_record(record: SlideRecord, counts: Mapping[str, int] | None) -> dict[str, object]:
    """Return a slide with a record; a record that lacks a count must not cost the whole status."""
    logged = None if counts is None else counts["tiles_logged"]
    num_tiles: int | None = record.get("num_tiles", logged)
    num_failed = record.get("num_failed_tiles", 0)
    seconds = record.get("seconds", {})
    by_stage = {f"seconds_{stage}": value for stage, value in seconds.items()}
    return {
        "status": record["status"],
        **{name: by_stage.get(name) for name in STAGE_SECONDS},
        "num_tiles": num_tiles,
        "tiles_done": max((num_tiles or 0) - num_failed, 0),
        "tiles_failed": min(num_failed, num_tiles or 0),
        "num_cells": record.get("num_cells", 0 if counts is None else counts["cells"]),
        "seconds": sum(by_stage.get(name) or 0.0 for name in STAGE_SECONDS),
        **{name: record.get(name) for name in WHY},
    }


def _failed_crops(run: Run) -> dict[str, dict[str, str]]:
    """Return why the crops of slides could not be cut. It makes these slides partial."""
    uri = index_uri(run.uri)
    failed: dict[str, str] = {}
    if storage.exists(uri):
        try:
            failed = read_document(uri, CropIndex, needed=["failed"])["failed"]
        except storage.DamagedFileError as error:
            warn_once(f"{error}; the next `scellst-ray extract` with crops writes it again")
    return {
        slide_id: dict(zip(WHY, ("crops", *text.partition(": ")[::2]), strict=True))
        for slide_id, text in failed.items()
    }
