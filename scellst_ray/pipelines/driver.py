"""The driver's side of a run: log receipts, finish slides, take up what an earlier driver left."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import ray.exceptions

from scellst_ray import schemas, storage
from scellst_ray.cohort import SlideRow
from scellst_ray.compaction import finish_slide, unfinished_record
from scellst_ray.pipelines.tiles import CellsSpec, imported_name
from scellst_ray.runs import RunFolder

LOG_EVERY_S = 5.0
Report = Callable[["Progress"], None]
logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands, for whoever shows it."""

    num_slides: int
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_tiles: int = 0
    num_tiles_known: int = 0
    num_cells: int = 0
    num_cells_before: int = 0
    started: float = field(default_factory=time.monotonic)


_finish_slide = ray.remote(num_cpus=0, max_retries=3)(finish_slide)


class Driver:
    """What the driver keeps while receipts come in."""

    def __init__(
        self,
        run: RunFolder,
        progress: Progress,
        report: Report,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Start with nothing received; `check` raises if the run is no longer this driver's."""
        self.run, self.progress, self.report, self.check = run, progress, report, check
        self.receipts: dict[str, list[pa.Table]] = {}
        self.unlogged: list[pa.Table] = []
        self.logged_at = time.monotonic()
        self.finishing: dict[Any, str] = {}

    def resume(self, pending: list[SlideRow], spec: CellsSpec) -> list[dict[str, Any]]:
        """Take up the receipts of an earlier driver; return the slides that still need work.

        Each is a row as `plan_slide` takes it.
        """
        log = self.run.receipts()
        log = log.filter(pc.and_(pc.is_null(log["error"]), pc.greater_equal(log["tile_id"], 0)))
        rows = []
        for slide in pending:
            done = log.filter(pc.equal(log["slide_id"], slide.slide_id))
            # A receipt whose shard is gone is worth nothing.
            uris = storage.list_files(self.run.shards_uri(slide.slide_id)) if len(done) else []
            names = pa.array([uri.rsplit("/", 1)[-1] for uri in uris], pa.string())
            there = pc.is_in(done["shard"], value_set=names)
            done = done.filter(pc.or_(there, pc.equal(done["num_cells"], 0)))
            if len(done):
                self._add(slide.slide_id, done)
                self.progress.num_cells_before = self.progress.num_cells
            if slide.slide_id in self.receipts or not len(done):
                rows.append(
                    {
                        "slide_id": slide.slide_id,
                        "uri": slide.uri,
                        "mpp": slide.mpp,
                        "mpp_error": slide.mpp_error,
                        "done_tiles": done["tile_id"].to_pylist(),
                        **self._imported(slide, spec),
                    }
                )
        return rows

    def _imported(self, slide: SlideRow, spec: CellsSpec) -> dict[str, str | None]:
        """Return where a slide's imported nuclei are, and where they shall lie sorted by tile."""
        source = slide.columns.get("segmentation")
        if spec.segmenter != "imported" or source is None:
            return {"segmentation": None, "imported_uri": None}
        folder = self.run.shards_uri(slide.slide_id)
        return {
            "segmentation": source,
            "imported_uri": storage.join(folder, imported_name(source, slide.mpp, spec)),
        }

    def consume(self, dataset: ray.data.Dataset) -> None:
        """Run the pipeline to its end."""
        batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        try:
            for batch in batches:
                receipts: pa.Table = batch.select(schemas.RECEIPTS.names)  # type: ignore[union-attr]
                receipts = receipts.cast(schemas.RECEIPTS)
                self.unlogged.append(receipts)
                if time.monotonic() - self.logged_at > LOG_EVERY_S:
                    self._log()
                for slide_id in pc.unique(receipts["slide_id"]).to_pylist():
                    self._add(slide_id, receipts.filter(pc.equal(receipts["slide_id"], slide_id)))
                self._collect(timeout=0)
        finally:
            self._log()

    def finish(self) -> None:
        """Wait for the slides being finished."""
        while self.finishing:
            self._collect(timeout=1)

    def _log(self) -> None:
        self.check()
        if self.unlogged:
            self.run.log_receipts(pa.concat_tables(self.unlogged))
        self.unlogged, self.logged_at = [], time.monotonic()

    def _add(self, slide_id: str, receipts: pa.Table) -> None:
        """Take receipts of one slide; start finishing it when they are all there."""
        parts = self.receipts.setdefault(slide_id, [])
        num_tiles = receipts["num_tiles"][0].as_py()
        self.progress.num_tiles_known += 0 if parts else num_tiles
        parts.append(receipts)
        self.progress.num_tiles += len(receipts) if num_tiles else 0
        self.progress.num_cells += pc.sum(receipts["num_cells"]).as_py()
        if sum(len(part) for part in parts) >= max(1, num_tiles):
            # The tables are named in the log before they are used up.
            self._log()
            whole = pa.concat_tables(self.receipts.pop(slide_id))
            self.finishing[_finish_slide.remote(self.run, slide_id, whole)] = slide_id
        self.report(self.progress)

    def _collect(self, timeout: float) -> None:
        """Take the records of slides that have been finished meanwhile."""
        if not self.finishing:
            return
        refs = list(self.finishing)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout)
        for ref in ready:
            slide_id = self.finishing.pop(ref)
            try:
                record = ray.get(ref)
            except ray.exceptions.RayError as error:
                # Its shards and receipts stay: the next run finishes it.
                cause = getattr(error, "cause", error)
                record = unfinished_record(slide_id, cause)
                logger.error("slide %s could not be finished: %s", slide_id, cause)
            self.progress.records[slide_id] = record
        if ready:
            self.report(self.progress)
