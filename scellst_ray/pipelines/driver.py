"""The driver's side of a run: logs receipts, finishes slides, continues what another driver began.

The caller's thread takes receipts. A second thread writes them to the log every few seconds. Then
it starts tasks that finish the slides whose receipts are complete in the log, several small slides
in one task. So neither a slow disk nor a slow slide delays the pipeline.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import ray.exceptions

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.core.logs import log_fields
from scellst_ray.pipelines.finishing import CompleteSlide, RemoteFinisher
from scellst_ray.pipelines.ray_internals import total_resources
from scellst_ray.pipelines.shard_uses import ShardUses
from scellst_ray.runs.compaction import unfinished_record
from scellst_ray.runs.folder import FINISHED, RunFolder, last_of_each_tile, split_by_slide
from scellst_ray.runs.records import SlideRecord
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.stages.plan_slide import imported_name
from scellst_ray.stages.rows import PendingSlide
from scellst_ray.stages.tiles import CellsSpec

# Seconds between files of the log, at the start and in long runs. If the driver dies, the next one
# repeats the tiles that are not in the log; in long runs fewer files are worth more.
LOG_EVERY_S = (5.0, 30.0)
LONG_RUN_S = 3600.0
TEND_EVERY_S = 0.2
# Warn when no receipt has arrived for 10 minutes. Either one tile is slow, or workers are waiting
# for lost nodes to return.
SILENT_S = 600.0
# Limits of one finishing task: small slides share its start, and large slides go to many nodes.
SLIDES_PER_TASK, CELLS_PER_TASK = 64, 200_000
# The pipeline waits while more receipts than this wait in memory for their slide to be finished.
MAX_WAITING_TILES = 200_000
# Tables of receipts of one slide are joined beyond this number: each takes ten kilobytes.
MAX_PARTS = 32
Report = Callable[["Progress"], None]
logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """The progress of a run: counts of tiles with a receipt, and records of finished slides.

    Attributes:
        num_tiles_known: Number of tiles of the slides planned so far.
        num_cells_before: The part of `num_cells` that an earlier driver found.
        started: Start of this driver, in seconds of the monotonic clock.
    """

    num_slides: int
    records: dict[str, SlideRecord] = field(default_factory=dict)
    num_tiles: int = 0
    num_tiles_known: int = 0
    num_cells: int = 0
    num_cells_before: int = 0
    started: float = field(default_factory=time.monotonic)


class Driver:
    """Driver of a run: it takes receipts and starts the tasks that finish slides."""

    def __init__(
        self,
        run: RunFolder,
        progress: Progress,
        report: Report,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Start without receipts; `check` raises if another driver has taken over the run."""
        self.run, self.progress, self.report, self.check = run, progress, report, check
        # Receipts of incomplete slides. Both threads use the fields below, under the lock.
        self.receipts: dict[str, list[pa.Table]] = {}
        self.complete: set[str] = set()
        self.unlogged: list[pa.Table] = []
        self.unlogged_complete: list[CompleteSlide] = []
        self.waiting: deque[CompleteSlide] = deque()
        self.num_waiting = 0
        self.alone: set[str] = set()
        self.uses = ShardUses()
        self.imported = False
        self.lock = threading.Lock()
        self.logged_at = self.started = self.heard_at = time.monotonic()
        self.finishers: list[Any] = []
        self.finishing: dict[Any, tuple[Any, list[CompleteSlide]]] = {}

    def resume(
        self, pending: list[SlideRow], spec: CellsSpec, finished: Collection[str] = ()
    ) -> list[PendingSlide]:
        """Read the receipts of an earlier driver; return the slides that still need work.

        Args:
            pending: The slides to finish. Shards of slides neither pending nor finished stay.
            spec: Settings of the computation.
            finished: slide_ids of all finished slides of this run.
        """
        self.imported = spec.segmenter == "imported"
        log = self.run.receipts(without=finished)
        log = log.filter(pc.and_(pc.is_null(log["error"]), pc.greater_equal(log["tile_id"], 0)))
        found = dict(split_by_slide(self._with_shards(log).sort_by("slide_id")))
        wanted = {slide.slide_id for slide in pending}
        for slide_id, receipts in found.items():
            if slide_id not in wanted:
                self._use(slide_id, receipts)
        rows: list[PendingSlide] = []
        for slide in pending:
            done = found.get(slide.slide_id, log.slice(0, 0))
            self._add(slide.slide_id, done)
            if slide.slide_id not in self.complete:
                segmentation, imported_uri = self._find_imported(slide, spec)
                rows.append(
                    {
                        "slide_id": slide.slide_id,
                        "uri": slide.uri,
                        "mpp": slide.mpp,
                        "mpp_error": slide.mpp_error,
                        "mpp_confirmed": slide.mpp_confirmed,
                        "done_tiles": done["tile_id"].to_pylist(),
                        "segmentation": segmentation,
                        "imported_uri": imported_uri,
                    }
                )
        self.progress.num_cells_before = self.progress.num_cells
        self.report(self.progress)
        return rows

    def _with_shards(self, receipts: pa.Table) -> pa.Table:
        """Return the receipts whose shard exists, and those of tiles without cells."""
        uris = storage.list_files(self.run.shards_uri)
        names = pa.array([uri.rsplit("/", 1)[-1] for uri in uris], pa.string())
        exists = pc.is_in(receipts["shard"], value_set=names)
        return receipts.filter(pc.or_(exists, pc.equal(receipts["num_cells"], 0)))

    def _use(self, slide_id: str, receipts: pa.Table) -> None:
        self.uses.add(slide_id, receipts["shard"].drop_null().unique().to_pylist())

    def _find_imported(self, slide: SlideRow, spec: CellsSpec) -> tuple[str | None, str | None]:
        """Return the file of a slide's imported nuclei, and the file for them sorted by tile."""
        source = slide.columns.get("segmentation")
        if spec.segmenter != "imported" or source is None:
            return None, None
        folder = self.run.imported_uri(slide.slide_id)
        return source, storage.join(folder, imported_name(source, slide.mpp, spec))

    def consume(self, dataset: ray.data.Dataset) -> None:
        """Run the pipeline to its end."""
        batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        ended = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            tending = pool.submit(self._tend_until, ended)
            try:
                for batch in batches:
                    receipts: pa.Table = batch.select(schemas.RECEIPTS.names)  # type: ignore[union-attr]
                    self._take(receipts.cast(schemas.RECEIPTS))
                    while self.num_waiting > MAX_WAITING_TILES and not tending.done():
                        time.sleep(TEND_EVERY_S)
                    if tending.done():  # the second thread ends early only if it failed
                        break
            finally:
                ended.set()
                tending.result()
                self._log()

    def finish(self) -> None:
        """Wait until all slides are finished; then remove the shards that are left."""
        self._log()
        while self.waiting or self.finishing:
            self._submit()
            self._collect(timeout=1)
        if not self.uses:
            # Left by workers and drivers that died before they reported them.
            _tidy(partial(storage.remove_tree, self.run.shards_uri))

    def _take(self, receipts: pa.Table) -> None:
        """Take receipts; drop repeated ones of a slide that is complete already."""
        self.heard_at = time.monotonic()
        with self.lock:
            for slide_id, part in split_by_slide(receipts):
                if slide_id in self.complete:
                    text, extra = "slide %s: %d receipts came twice", log_fields(slide_id)
                    logger.warning(text, slide_id, len(part), extra=extra)
                    continue
                self.unlogged.append(part)
                self._add(slide_id, part)
        self.report(self.progress)

    def _add(self, slide_id: str, receipts: pa.Table) -> None:
        """Take receipts of one slide; if all are present now, the slide can be finished."""
        if not len(receipts):
            return
        parts = self.receipts.setdefault(slide_id, [])
        num_tiles = receipts["num_tiles"][0].as_py()
        self.progress.num_tiles_known += 0 if parts else num_tiles
        parts.append(receipts)
        self._use(slide_id, receipts)
        self._count(receipts, 1)
        num = sum(map(len, parts))
        if len(parts) > MAX_PARTS or num >= max(1, num_tiles):
            joined = pa.concat_tables(parts).combine_chunks() if len(parts) > 1 else receipts
            parts[:] = [joined]
            if len(np.unique(joined["tile_id"].to_numpy())) < num:
                # A tile that came twice counts once.
                parts[:] = [last_of_each_tile(joined)]
                self._count(joined, -1)
                self._count(parts[0], 1)
        if len(parts[0]) >= max(1, num_tiles):
            self.complete.add(slide_id)
            self.unlogged_complete.append((slide_id, *self.receipts.pop(slide_id)))

    def _count(self, receipts: pa.Table, sign: int) -> None:
        """Add receipts to the progress, or with sign -1 subtract them."""
        num_tiles, num_cells = (receipts[n].to_numpy() for n in ("num_tiles", "num_cells"))
        self.progress.num_tiles += sign * int(np.count_nonzero(num_tiles))
        self.progress.num_cells += sign * int(num_cells.sum())

    def _tend_until(self, ended: threading.Event) -> None:
        """Log receipts and have slides finished, until the event is set."""
        at_first = total_resources()
        while not ended.wait(TEND_EVERY_S):
            now = time.monotonic()
            if now - self.heard_at > SILENT_S:
                self.heard_at = now
                _warn_of_silence(at_first)
            least, most = LOG_EVERY_S
            if now - self.logged_at > min(most, least * (1 + (now - self.started) / LONG_RUN_S)):
                self._log()
            self._submit()
            self._collect(timeout=0)

    def _log(self) -> None:
        """Write receipts to the log; complete slides may be finished afterwards."""
        self.check()
        with self.lock:
            tables, self.unlogged = self.unlogged, []
            slides, self.unlogged_complete = self.unlogged_complete, []
        if tables:
            self.run.log_receipts(pa.concat_tables(tables))
        self.logged_at = time.monotonic()
        # Shards are removed only after the log names them.
        self.waiting.extend(slides)
        self.num_waiting += sum(len(receipts) for _, receipts in slides)

    def _submit(self) -> None:
        """Start tasks that finish slides: one for four CPUs, at least two."""
        if not self.waiting:
            return
        cpus = total_resources().get("CPU", 1)
        most = max(2, int(cpus) // 4)
        while self.waiting and len(self.finishing) < most:
            share = math.ceil(len(self.waiting) / (most - len(self.finishing)))
            slides = self._next_slides(min(SLIDES_PER_TASK, share))
            # A table of many chunks takes far longer to send than one of a single chunk.
            receipts = pa.concat_tables([table for _, table in slides]).combine_chunks()
            finisher = self.finishers.pop() if self.finishers else RemoteFinisher.remote()
            task = finisher.finish.remote(self.run, receipts, self.imported)
            self.finishing[task] = finisher, slides

    def _next_slides(self, most: int) -> list[CompleteSlide]:
        """Return the slides that the next task finishes."""
        slides = [self.waiting.popleft()]
        num_cells = _num_cells(slides[0])
        while self.waiting and len(slides) < most and slides[0][0] not in self.alone:
            num_cells += _num_cells(self.waiting[0])
            if num_cells > CELLS_PER_TASK or self.waiting[0][0] in self.alone:
                break
            slides.append(self.waiting.popleft())
        return slides

    def _collect(self, timeout: float) -> None:
        """Take the records of slides that tasks have finished."""
        if not self.finishing:
            return
        refs = list(self.finishing)
        ready, _ = ray.wait(refs, num_returns=1 if timeout else len(refs), timeout=timeout)
        for ref in ready:
            finisher, slides = self.finishing.pop(ref)
            self.finishers.append(finisher)
            try:
                records = ray.get(ref)
            except ray.exceptions.RayError as error:
                if len(slides) > 1:
                    # One of them ended the process, so each is tried in a task of its own.
                    self.alone |= {slide_id for slide_id, _ in slides}
                    self.waiting.extendleft(slides)
                    continue
                records = [unfinished_record(slides[0][0], type(error).__name__, str(error))]
            self.num_waiting -= sum(len(receipts) for _, receipts in slides)
            self._remove_shards(records)
            for record in records:
                if record.get("stage") == "finish":
                    names = (record["slide_id"], record["error_type"], record["error"])
                    text, extra = "slide %s could not be finished: %s: %s", log_fields(names[0])
                    logger.error(text, *names, extra=extra)
                self.progress.records[record["slide_id"]] = record
        if ready:
            self.report(self.progress)

    def _remove_shards(self, records: list[SlideRecord]) -> None:
        """Remove the shards that only finished slides needed.

        The shards of a partial slide stay: a later run adds only the tiles that failed.
        """
        with self.lock:
            finished = [r["slide_id"] for r in records if r["status"] in FINISHED]
            useless = [name for slide_id in finished for name in self.uses.finished(slide_id)]
        _tidy(partial(storage.remove_files, [self.run.shard_uri(name) for name in useless]))


def _warn_of_silence(at_first: Mapping[str, float]) -> None:
    """Warn that no receipt has arrived, and say which part of the first cluster is left."""
    now = total_resources()
    kinds = [kind for kind in ("GPU", "CPU") if kind in at_first]
    left = ", ".join(f"{now.get(k, 0):g} of {at_first[k]:g} {k}s" for k in kinds)
    logger.warning(
        "no tile was finished for %g minutes; of the cluster at the beginning %s are left. Tiles "
        "of lost nodes wait until other nodes have room. You may stop the run: the same command "
        "continues it",
        SILENT_S / 60,
        left,
    )


def _tidy(remove: Callable[[], None]) -> None:
    """Remove files that nobody will read. A failure costs only disk space."""
    try:
        remove()
    except OSError as error:
        logger.warning("shards could not be removed (%s); remove them with `scellst-ray gc`", error)


def _num_cells(slide: CompleteSlide) -> int:
    return int(slide[1]["num_cells"].to_numpy().sum())
