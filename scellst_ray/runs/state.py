"""Where a run stands, from its folder alone: while a driver works on it, and after one died.

Which slides there are is in slides.json, what became of them in their records, how far the others
are and since when in the receipts log, and who works on it in lease.json. Nothing is written or
locked here. The log knows the time only by the names of its files, written a few seconds apart:
rates are those between files.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs import lease
from scellst_ray.runs.crop_files import index_uri
from scellst_ray.runs.folder import FINISHED, NUM_READERS, last_of_each_tile
from scellst_ray.runs.reading import Run, open_run
from scellst_ray.runs.records import LeaseInfo, SlideRecord

STATUSES = ("done", "empty", "partial", "failed", "running", "pending")
# Files of the log further apart than a tile may take: nobody worked in between.
PAUSE_S = 1800.0
# What a rate that is to tell the near future is taken over.
RECENT_S = 900.0
READ_TRIES = 3
WHY = ["stage", "error_type", "error"]
LOG_COLUMNS = ("slide_id", "tile_id", "num_tiles", "num_cells", *WHY)


@dataclass(frozen=True)
class Holder:
    """Who holds the lease of a run.

    Attributes:
        state: 'none'; 'alive'; 'silent': not renewed in time, on another host, whose clock may be
            wrong; 'dead'.
        lease: Content of lease.json; None if there is no lease.
    """

    state: Literal["none", "alive", "silent", "dead"]
    lease: LeaseInfo | None

    @property
    def may_work(self) -> bool:
        """Tell whether a driver may be working on the run."""
        return self.state in ("alive", "silent")


@dataclass(frozen=True)
class Rate:
    """How fast a run went.

    Attributes:
        seconds: Over which time; 0: not known.
        num_tiles: Tiles logged in it.
        num_cells: Their cells.
    """

    seconds: float = 0.0
    num_tiles: int = 0
    num_cells: int = 0

    @property
    def tiles_per_s(self) -> float | None:
        """Return tiles per second; None if not known."""
        return self.num_tiles / self.seconds if self.seconds > 0 else None

    @property
    def cells_per_s(self) -> float | None:
        """Return cells per second; None if not known."""
        return self.num_cells / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True)
class RunState:
    """A run at one moment.

    Attributes:
        run: Its folder and the records.
        now: When it was looked at, UTC.
        holder: Who works on it.
        slides: One row per slide ever given: `slide_id`, `status` (see STATUSES; running: some of
            its tiles are logged), `bytes`, `num_tiles` (null: not known yet), `tiles_done`,
            `tiles_failed`, `num_cells`, `seconds` (of workers, from the record), `stage`,
            `error_type`, `error`.
        failures: One row per failed tile of a slide that is not finished: `slide_id`, `tile_id`
            (-1 or null: the slide as a whole), `stage`, `error_type`, `error`.
        times: One row per file of the log: `logged` (UTC), `num_tiles`, `num_cells`; ascending.
    """

    run: Run
    now: datetime
    holder: Holder
    slides: pl.DataFrame
    failures: pl.DataFrame
    times: pl.DataFrame

    def counts(self) -> dict[str, int]:
        """Return how many slides there are of each status."""
        found = dict(self.slides["status"].value_counts().iter_rows())
        return {status: int(found.get(status, 0)) for status in STATUSES}

    def rate(self) -> Rate:
        """Return the rate of all drivers together, pauses between them left out."""
        gap_s = self.times["logged"].diff().dt.total_microseconds() / 1e6
        # What the first file after a pause tells of was begun at a time that nobody knows.
        worked = self.times.with_columns(gap_s=gap_s).filter(pl.col("gap_s") <= PAUSE_S)
        totals = (int(worked[name].sum()) for name in ("num_tiles", "num_cells"))
        return Rate(float(worked["gap_s"].sum()), *totals)

    def recent_rate(self) -> Rate:
        """Return the rate of the driver that works now, over its last quarter of an hour."""
        if not self.holder.may_work or self.holder.lease is None:
            return Rate()
        began = datetime.fromisoformat(self.holder.lease["acquired"])
        since = max(began, self.now - timedelta(seconds=RECENT_S))
        found = self.times.filter(pl.col("logged") > since)
        if found.is_empty():
            return Rate()
        # Until the last file, if that one's clock is ahead of ours.
        until = max([self.now, *found["logged"]])
        totals = (int(found[name].sum()) for name in ("num_tiles", "num_cells"))
        return Rate((until - since).total_seconds(), *totals)

    def tiles_left(self) -> float | None:
        """Return how many tiles slides without a record still have; those not yet planned by guess.

        They are taken to have as many tiles a byte (or a slide, where sizes are not known) as the
        others. None if no slide is planned yet.
        """
        waiting = self.slides.filter(pl.col("status").is_in(["running", "pending"]))
        planned = waiting.filter(pl.col("num_tiles").is_not_null())
        left = float((planned["num_tiles"] - planned["tiles_done"]).sum())
        unknown = waiting.filter(pl.col("num_tiles").is_null())
        if unknown.is_empty():
            return left
        known = self.slides.filter(pl.col("num_tiles").is_not_null())
        if known.is_empty():
            return None
        by_size = not self.slides["bytes"].null_count() and known["bytes"].sum() > 0
        sizes = [
            float(frame["bytes"].sum()) if by_size else len(frame) for frame in (unknown, known)
        ]
        return left + float(known["num_tiles"].sum()) * sizes[0] / sizes[1]

    def eta_s(self) -> float | None:
        """Return the seconds until the last tile is done; None if no driver works, or not known."""
        per_s, left = self.recent_rate().tiles_per_s, self.tiles_left()
        return None if not per_s or left is None else left / per_s


def read_state(
    uri: str,
    now: datetime | None = None,
    records: Mapping[str, SlideRecord] | None = None,
) -> RunState:
    """Look at a run.

    Args:
        uri: The run folder.
        now: The time to reckon from, UTC; by default the clock's.
        records: What is known of slides beyond their published records: why a slide could not be
            finished is known to its driver alone.

    Raises:
        FileNotFoundError: no run there.
        ValueError: written by a newer release.
    """
    # The log first: a slide whose record appears meanwhile is then merely counted by it.
    folder = storage.absolute(uri)
    log = read_log(folder)
    run = open_run(folder)
    run = replace(run, records=run.records | dict(records or {}))
    holder = read_holder(folder)
    last = last_of_each_tile(log)
    logged = _by_slide(last)
    slides = _slides(run, logged, may_run=holder.may_work)
    now = now or datetime.now(UTC)
    return RunState(run, now, holder, slides, _failures(last, logged, slides), _times(log))


def read_log(run_uri: str, columns: Sequence[str] = LOG_COLUMNS) -> pa.Table:
    """Read all receipts ever logged, oldest first, with `logged`, the UTC time of their file."""
    uris = storage.list_files(storage.join(run_uri, "receipts"))
    names = list(columns)

    def read(uri: str) -> pa.Table:
        return storage.read_table(uri, names).replace_schema_metadata()

    with ThreadPoolExecutor(NUM_READERS) as readers:
        tables = list(readers.map(read, uris))
    empty = schemas.RECEIPTS.empty_table().select(names)
    found = pa.concat_tables([empty.replace_schema_metadata(), *tables])
    times = pa.array([logged_at(uri) for uri in uris], pa.timestamp("us", "UTC"))
    of_file = np.repeat(np.arange(len(uris)), [len(table) for table in tables])
    return found.append_column("logged", times.take(pa.array(of_file, pa.int64())))


def logged_at(name: str) -> datetime | None:
    """Return when a file of the log was written, by its name; None if that does not tell."""
    stamp = name.rsplit("/", 1)[-1].partition("-")[0]
    try:
        return datetime.strptime(stamp, "%Y%m%dT%H%M%S%f").replace(tzinfo=UTC)
    except ValueError:
        return None


def read_holder(run_uri: str) -> Holder:
    """Return who holds the lease of a run, without taking or waiting for it."""
    for _ in range(READ_TRIES):
        try:
            found: LeaseInfo = storage.read_json(storage.join(run_uri, lease.NAME))
        except FileNotFoundError:
            return Holder("none", None)
        except ValueError:  # read while its holder wrote it
            continue
        if lease.is_over(found):
            return Holder("dead", found)
        expires = datetime.fromisoformat(found["expires"])
        return Holder("alive" if expires > datetime.now(UTC) else "silent", found)
    # The file holds the beginning of a lease: its holder was killed while it wrote.
    return Holder("none", None)


def _by_slide(last: pa.Table) -> pl.DataFrame:
    """Return what is logged of each slide, from the last receipts of its tiles."""
    # In Arrow, which holds a million receipts in a third of the memory of a frame.
    good = pc.and_(pc.is_null(last["error"]), pc.greater_equal(last["tile_id"], 0))
    columns = {
        "good": pc.cast(good, pa.int64()),
        "bad": pc.cast(pc.is_valid(last["error"]), pa.int64()),
        "cells": pc.if_else(good, last["num_cells"], 0),
    }
    table = pa.table({name: last[name] for name in ("slide_id", "tile_id", "num_tiles")} | columns)
    # A slide that could not be planned once, and was later, has tiles of both kinds.
    most = [(name, "max") for name in ("tile_id", "num_tiles")]
    totals = [(name, "sum") for name in columns]
    found = _frame(table.group_by("slide_id").aggregate([*most, *totals]))
    names = {f"{name}_sum": name for name in columns}
    return found.rename(names | {"tile_id_max": "last_tile", "num_tiles_max": "tiles_logged"})


def _slides(run: Run, logged: pl.DataFrame, *, may_run: bool) -> pl.DataFrame:
    """Return one row per slide, from what is logged of it and all else in the folder."""
    sources, crops = _sources(run), _failed_crops(run)
    ids = pl.concat([frame["slide_id"] for frame in (sources, run.slides, logged)]).unique().sort()
    joined = ids.to_frame()
    for frame in (sources, run.slides, logged, crops):
        joined = joined.join(frame, on="slide_id", how="left")
    recorded = pl.col("status").is_not_null()
    no_crops = pl.col("status").is_in(FINISHED) & pl.col("crops_error").is_not_null()
    num_failed = pl.when(recorded).then("num_failed_tiles").otherwise("bad").fill_null(0)
    known = pl.coalesce("num_tiles", "tiles_logged")
    num_done = pl.when(recorded).then(known.fill_null(0) - num_failed).otherwise("good")
    unrecorded = "running" if may_run else "pending"
    waiting = pl.when(pl.col("tiles_logged").is_null()).then(pl.lit("pending"))
    now = pl.when(recorded).then("status").otherwise(waiting.otherwise(pl.lit(unrecorded)))
    stages = [f"seconds_{stage}" for stage in schemas.STAGES]
    return joined.select(
        "slide_id",
        "bytes",
        *stages,
        status=pl.when(no_crops).then(pl.lit("partial")).otherwise(now),
        num_tiles=known,
        tiles_done=num_done.fill_null(0).clip(0),
        # A slide that could not be planned has a failure, but no tile.
        tiles_failed=pl.min_horizontal(num_failed, known.fill_null(0)),
        num_cells=pl.coalesce("num_cells", "cells").fill_null(0),
        seconds=pl.when(recorded).then(pl.sum_horizontal(stages)),
        **{name: pl.when(no_crops).then(f"crops_{name}").otherwise(name) for name in WHY},
    )


def _sources(run: Run) -> pl.DataFrame:
    sources = run.sources
    columns = {"slide_id": list(sources), "bytes": [s.get("bytes") for s in sources.values()]}
    return pl.DataFrame(columns, schema={"slide_id": pl.String, "bytes": pl.Int64})


def _failed_crops(run: Run) -> pl.DataFrame:
    """Return the slides whose crops could not be cut, which makes them partial, and why."""
    uri = index_uri(run.uri)
    failed: dict[str, str] = storage.read_json(uri)["failed"] if storage.exists(uri) else {}
    rows = [(slide_id, "crops", *text.partition(": ")[::2]) for slide_id, text in failed.items()]
    names = ["slide_id", *(f"crops_{name}" for name in WHY)]
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def _failures(last: pa.Table, logged: pl.DataFrame, slides: pl.DataFrame) -> pl.DataFrame:
    """Return one row per failed tile of slides that are not finished."""
    finished = slides.filter(pl.col("status").is_in(FINISHED))
    bad = _frame(last.filter(pc.is_valid(last["error"])).drop_columns("logged"))
    # A slide that could be planned in the end has tiles: that it once could not is past.
    planned = logged.filter(pl.col("last_tile") >= 0)
    stale = bad.filter(pl.col("tile_id") < 0).join(planned, on="slide_id", how="semi")
    failed = (
        bad.join(finished, on="slide_id", how="anti")
        .join(stale, on=["slide_id", "tile_id"], how="anti")
        .select("slide_id", "tile_id", *WHY)
    )
    # Those whose record tells of a failure, and the log does not.
    told = slides.filter(pl.col("status").is_in(["partial", "failed"])).join(
        failed, on="slide_id", how="anti"
    )
    whole = told.select("slide_id", pl.lit(None, pl.Int64).alias("tile_id"), *WHY)
    return pl.concat([failed, whole]).sort("slide_id", "tile_id")


def _times(log: pa.Table) -> pl.DataFrame:
    """Return what each file of the log tells of, oldest first."""
    told = _frame(log.select(["logged", "tile_id", "num_cells"])).filter(
        pl.col("logged").is_not_null() & (pl.col("tile_id") >= 0)
    )
    cells = pl.col("num_cells").sum()
    return told.group_by("logged").agg(num_tiles=pl.len(), num_cells=cells).sort("logged")


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame
