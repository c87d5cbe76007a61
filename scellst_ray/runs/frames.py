"""Frames of polars: from Arrow tables, and from the records of a run."""

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from scellst_ray.core import schemas
from scellst_ray.runs.records import SlideRecord

SLIDES = {
    "slide_id": pl.String,
    "status": pl.String,
    "num_cells": pl.Int64,
    "num_tiles": pl.Int64,
    "num_failed_tiles": pl.Int64,
    "mpp": pl.Float64,
    "read_mpp": pl.Float64,
    "width0": pl.Int64,
    "height0": pl.Int64,
    **{f"seconds_{stage}": pl.Float64 for stage in schemas.STAGES},
    "waited_s": pl.Float64,
    "stage": pl.String,
    "error_type": pl.String,
    "error": pl.String,
    "scellst_ray": pl.String,
    "finished": pl.String,
    # Distance of the slide's cells from those of the head's training; null if it is not known.
    "domain_shift_score": pl.Float64,
    "domain_shift_beyond": pl.Boolean,
}


def slides_frame(records: Mapping[str, SlideRecord]) -> pl.DataFrame:
    """Return one row per record, sorted by slide_id, with the columns of SLIDES.

    Args:
        records: Records by slide_id. A key that a record lacks is null in the table.
    """
    rows = []
    for slide_id in sorted(records):
        record = records[slide_id]
        values: dict[str, object] = {**record}
        values |= {f"seconds_{k}": v for k, v in record.get("seconds", {}).items()}
        values |= {f"domain_shift_{k}": v for k, v in record.get("domain_shift", {}).items()}
        rows.append({name: values.get(name) for name in SLIDES})
    return pl.DataFrame(rows, schema=SLIDES)


def frame_of(table: pa.Table) -> pl.DataFrame:
    """Return an Arrow table as a frame."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame
