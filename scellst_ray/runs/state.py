"""State of a run, read from its folder alone, while a driver works on it or after.

- `slides.json` lists the slides.
- Records state the outcome of each slide.
- The receipts log shows the progress of unfinished slides.
- `lease.json` names the driver that works on the run.

Nothing is written or locked here. The log knows times only by the names of its files, which are
written a few seconds apart. So rates hold between two files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from scellst_ray import storage
from scellst_ray.runs import lease
from scellst_ray.runs.documents import parse_lease
from scellst_ray.runs.folder import (
    FINISHED,
    LEASE_FILE,
    RECEIPTS,
)
from scellst_ray.runs.frames import frame_of
from scellst_ray.runs.reading import Run, open_run
from scellst_ray.runs.receipts_log import best_of_each_tile, read_log_files
from scellst_ray.runs.records import LeaseInfo, SlideRecord
from scellst_ray.runs.slide_states import WHY, count_receipts, list_slides

STATUSES = ("done", "empty", "partial", "failed", "running", "pending")
# Longest time between two files of the log that counts as work. After a longer one the run paused.
PAUSE_S = 1800.0
# Time over which the recent rate is taken; it predicts the near future.
RECENT_S = 900.0
READ_TRIES = 3
LOG_COLUMNS = ("slide_id", "tile_id", "num_tiles", "num_cells", *WHY)


@dataclass(frozen=True)
class Holder:
    """Holder of the lease of a run.

    Attributes:
        state: 'none', 'alive', 'dead', or 'silent': the lease was not renewed in time, but its
            holder is on another host, whose clock may be wrong.
        lease: Content of lease.json; None if there is no lease.
    """

    state: Literal["none", "alive", "silent", "dead"]
    lease: LeaseInfo | None

    @property
    def may_work(self) -> bool:
        """Return whether a driver may be working on the run."""
        return self.state in ("alive", "silent")


@dataclass(frozen=True)
class Rate:
    """Speed of a run over some time.

    Attributes:
        seconds: Length of that time; 0 if it is not known.
        num_tiles: Number of tiles logged in it.
        num_cells: Number of cells of these tiles.
    """

    seconds: float = 0.0
    num_tiles: int = 0
    num_cells: int = 0

    @property
    def tiles_per_s(self) -> float | None:
        """Return tiles per second; None if the time is not known."""
        return self.num_tiles / self.seconds if self.seconds > 0 else None

    @property
    def cells_per_s(self) -> float | None:
        """Return cells per second; None if the time is not known."""
        return self.num_cells / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True)
class RunState:
    """A run at one moment.

    Attributes:
        run: Its folder and records.
        now: UTC time at which the folder was read.
        holder: Holder of the lease.
        slides: One row per slide that commands were given. Columns: `slide_id`, `status`, `bytes`,
            `num_tiles` (null: not known yet), `tiles_done`, `tiles_failed`, `num_cells`,
            `seconds` (worker seconds, from the record), `stage`, `error_type`, `error`. The status
            is one of STATUSES. A slide is running if a driver works and has logged its tiles.
        failures: One row per failed tile of a slide that is not finished. Columns: `slide_id`,
            `tile_id` (-1 or null: the whole slide), `stage`, `error_type`, `error`.
        times: One row per file of the log, by time. Columns: `logged` (UTC), `num_tiles`,
            `num_cells`.
    """

    run: Run
    now: datetime
    holder: Holder
    slides: pl.DataFrame
    failures: pl.DataFrame
    times: pl.DataFrame

    def counts(self) -> dict[str, int]:
        """Return the number of slides of each status."""
        num_slides = dict(self.slides["status"].value_counts().iter_rows())
        return {status: int(num_slides.get(status, 0)) for status in STATUSES}

    def rate(self) -> Rate:
        """Return the rate of all drivers together, without the pauses between them."""
        gap_s = self.times["logged"].diff().dt.total_microseconds() / 1e6
        # The first file after a pause does not count: nothing says when its tiles were begun.
        worked = self.times.with_columns(gap_s=gap_s).filter(pl.col("gap_s") <= PAUSE_S)
        totals = (int(worked[name].sum()) for name in ("num_tiles", "num_cells"))
        return Rate(float(worked["gap_s"].sum()), *totals)

    def recent_rate(self) -> Rate:
        """Return the rate of the driver that works now, over its last 15 minutes."""
        if not self.holder.may_work or self.holder.lease is None:
            return Rate()
        began = datetime.fromisoformat(self.holder.lease["acquired"])
        since = max(began, self.now - timedelta(seconds=RECENT_S))
        found = self.times.filter(pl.col("logged") > since)
        if found.is_empty():
            return Rate()
        # If the clock that named the last file is ahead of ours, its time is the end.
        until = max([self.now, *found["logged"]])
        totals = (int(found[name].sum()) for name in ("num_tiles", "num_cells"))
        return Rate((until - since).total_seconds(), *totals)

    def tiles_left(self) -> float | None:
        """Return the number of tiles left in slides without a record; None if none is planned.

        The number of an unplanned slide is a guess. It assumes as many tiles a byte as planned
        slides have, or as many tiles a slide if sizes are not known.
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
        """Return a guess of the seconds until the last tile is done; None without a driver."""
        per_s, left = self.recent_rate().tiles_per_s, self.tiles_left()
        return None if not per_s or left is None else left / per_s


def read_state(
    uri: str,
    now: datetime | None = None,
    records: Mapping[str, SlideRecord] | None = None,
) -> RunState:
    """Read the state of a run.

    Args:
        uri: The run folder.
        now: UTC time that counts as now; by default the clock's.
        records: Records that replace published ones. Only the driver knows why a slide could not
            be finished.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: a newer release wrote the run.
    """
    # The log first: a slide that is finished after this line then counts by its record.
    folder = storage.absolute(uri)
    log = read_log(folder)
    run = open_run(folder)
    run = replace(run, records=run.records | dict(records or {}))
    holder = read_holder(folder)
    last = best_of_each_tile(log)
    logged = count_receipts(last)
    slides = list_slides(run, logged, may_run=holder.may_work)
    now = now or datetime.now(UTC)
    return RunState(run, now, holder, slides, _failures(last, logged, slides), _times(log))


def read_log(run_uri: str, columns: Sequence[str] = LOG_COLUMNS) -> pa.Table:
    """Read all receipts of the log, oldest first; `logged` is the UTC time of their file."""
    return read_log_files(storage.join(run_uri, RECEIPTS), columns, None).receipts


def read_holder(run_uri: str) -> Holder:
    """Return the holder of a run's lease, without taking the lease or waiting for it."""
    for _ in range(READ_TRIES):
        try:
            uri = storage.join(run_uri, LEASE_FILE)
            found = parse_lease(storage.read_bytes(uri), uri)
        except FileNotFoundError:
            return Holder("none", None)
        except storage.DamagedFileError:  # the file was read while its holder wrote it
            continue
        if lease.is_over(found):
            return Holder("dead", found)
        expires = datetime.fromisoformat(found["expires"])
        return Holder("alive" if expires > datetime.now(UTC) else "silent", found)
    # The file holds the beginning of a lease: its holder was killed while it wrote.
    return Holder("none", None)


def _failures(last: pa.Table, logged: pl.DataFrame, slides: pl.DataFrame) -> pl.DataFrame:
    """Return one row per failed tile of slides that are not finished."""
    finished = slides.filter(pl.col("status").is_in(FINISHED))
    failed_tiles = frame_of(last.filter(pc.is_valid(last["error"])).drop_columns("logged"))
    # A slide that was planned in the end has tiles: its earlier failure no longer counts.
    planned = logged.filter(pl.col("last_tile") >= 0)
    stale = failed_tiles.filter(pl.col("tile_id") < 0).join(planned, on="slide_id", how="semi")
    failed = (
        failed_tiles.join(finished, on="slide_id", how="anti")
        .join(stale, on=["slide_id", "tile_id"], how="anti")
        .select("slide_id", "tile_id", *WHY)
    )
    # Slides whose record has a failure that the log does not have.
    unlogged = slides.filter(pl.col("status").is_in(["partial", "failed"])).join(
        failed, on="slide_id", how="anti"
    )
    whole = unlogged.select("slide_id", pl.lit(None, pl.Int64).alias("tile_id"), *WHY)
    return pl.concat([failed, whole]).sort("slide_id", "tile_id")


def _times(log: pa.Table) -> pl.DataFrame:
    """Return one row per file of the log, oldest first: its time, tiles and cells."""
    receipts = frame_of(log.select(["logged", "tile_id", "num_cells"])).filter(
        pl.col("logged").is_not_null() & (pl.col("tile_id") >= 0)
    )
    cells = pl.col("num_cells").sum()
    return receipts.group_by("logged").agg(num_tiles=pl.len(), num_cells=cells).sort("logged")
