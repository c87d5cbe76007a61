"""Metrics for Prometheus, through Ray: the work of workers and the progress of the driver.

Ray serves them on every node, under names that begin with ray_scellst_ray_. A worker counts
receipts: a receipt holds everything that is counted of a tile, so one call after the last stage is
enough. A tile that Ray repeats counts again, so only the records hold exact numbers.
"""

import time
from collections import Counter as TallyOf
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
from ray.util.metrics import Counter, Gauge

from scellst_ray.core import schemas
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.records import SlideRecord

PREFIX = "scellst_ray"
# Prometheus asks every few seconds at most.
SHOW_EVERY_S = 1.0
PRINTABLE = "".join(map(chr, range(32, 127))).replace("%", "")
STATUSES = ("done", "empty", "partial", "failed")


class Standing(Protocol):
    """The part of the driver's progress that is shown."""

    num_slides: int
    num_tiles: int
    num_tiles_known: int
    num_cells: int
    records: dict[str, SlideRecord]


def run_name(run: RunFolder) -> str:
    """Return the name of the run's folder, which distinguishes runs and holds no secrets."""
    return run.uri.rstrip("/").rsplit("/", 1)[-1].partition("?")[0]


def ascii_tag(text: str) -> str:
    """Return text as a tag: Ray takes ASCII alone, so all else is percent-encoded as in a URL."""
    return quote(text, safe=PRINTABLE, errors="surrogateescape")


def _tags(run: RunFolder) -> dict[str, str]:
    return {"run": ascii_tag(run_name(run)), "digest": run.digest}


class WorkerMetrics:
    """Counters of one worker that writes receipts.

    To raise them takes as long as a small tile, so that happens once a second. Receipts of the last
    second before a worker ends may be missing.
    """

    def __init__(self, run: RunFolder) -> None:
        """Start at 0."""
        self.waiting: list[pa.Table] = []
        self.raised_at = -SHOW_EVERY_S
        keys = tuple(_tags(run))

        def counter(name: str, about: str, *tags: str) -> Counter:
            made = Counter(f"{PREFIX}_{name}", about, tag_keys=(*keys, *tags))
            return made.set_default_tags(_tags(run))  # type: ignore[no-any-return]

        self.tiles = counter("tiles_done", "Tiles done, failed ones left out.")
        self.cells = counter("cells_found", "Cells found, seams not yet settled.")
        self.failures = counter("tiles_failed", "Tiles that failed, by stage.", "stage")
        self.seconds = counter("worker_seconds", "Seconds workers spent, by stage.", "stage")

    def count(self, receipts: pa.Table) -> None:
        """Count receipts of the last stage."""
        self.waiting.append(receipts)
        now = time.monotonic()
        if now - self.raised_at >= SHOW_EVERY_S:
            self.raised_at, waiting, self.waiting = now, self.waiting, []
            self._raise(pa.concat_tables(waiting))

    def _raise(self, receipts: pa.Table) -> None:
        """Raise the counters by receipts."""
        tiles = receipts.filter(pc.greater(receipts["num_tiles"], 0))
        failed = receipts.filter(pc.is_valid(receipts["error"]))
        num_done = len(tiles) - pc.sum(pc.is_valid(tiles["error"])).as_py() if len(tiles) else 0
        # A counter refuses to be raised by 0.
        if num_done:
            self.tiles.inc(num_done)
        if num_cells := pc.sum(receipts["num_cells"]).as_py():
            self.cells.inc(num_cells)
        for stage, number in TallyOf(failed["stage"].to_pylist()).items():
            self.failures.inc(number, {"stage": str(stage)})
        for stage in schemas.STAGES:
            seconds = pc.sum(receipts[f"seconds_{stage}"]).as_py()
            if seconds:
                self.seconds.inc(seconds, {"stage": stage})


class DriverMetrics:
    """Gauges of the driver."""

    def __init__(self, run: RunFolder) -> None:
        """Start with nothing shown."""
        keys = tuple(_tags(run))

        def gauge(name: str, about: str, *tags: str) -> Gauge:
            made = Gauge(f"{PREFIX}_{name}", about, tag_keys=(*keys, *tags))
            return made.set_default_tags(_tags(run))  # type: ignore[no-any-return]

        self.slides = gauge("slides", "Slides of the manifest, by status.", "status")
        self.tiles = gauge("run_tiles", "Tiles with a receipt; those of the run.")
        self.known = gauge("run_tiles_known", "Tiles of the slides planned so far.")
        self.cells = gauge("run_cells", "Cells of the tiles with a receipt.")
        self.shown_at = -SHOW_EVERY_S

    def show(self, progress: Standing) -> None:
        """Show the progress of the run, at most once a second."""
        now = time.monotonic()
        if now - self.shown_at < SHOW_EVERY_S and len(progress.records) < progress.num_slides:
            return
        self.shown_at = now
        # A copy: another thread may add records.
        counts = dict.fromkeys(STATUSES, 0)
        for record in list(progress.records.values()):
            counts[record["status"]] += 1
        waiting = {"unfinished": progress.num_slides - sum(counts.values())}
        for status, number in (counts | waiting).items():
            self.slides.set(number, {"status": status})
        self.tiles.set(progress.num_tiles)
        self.known.set(progress.num_tiles_known)
        self.cells.set(progress.num_cells)


def report_with_metrics(run: RunFolder, report: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a report that also shows a run's progress as metrics.

    Args:
        run: The run.
        report: Report to call with the progress, too.
    """
    metrics = DriverMetrics(run)

    def report_both(progress: Standing) -> None:
        metrics.show(progress)
        report(progress)

    return report_both
