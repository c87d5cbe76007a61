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
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.exceptions

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.core.logs import log_fields
from scellst_ray.pipelines.finishing import CompleteSlide, RemoteFinisher
from scellst_ray.pipelines.incomplete import IncompleteSlides
from scellst_ray.pipelines.progress import Progress, Report
from scellst_ray.pipelines.ray_internals import total_resources
from scellst_ray.pipelines.resume import read_logged_work
from scellst_ray.pipelines.shard_uses import ShardUses
from scellst_ray.runs.compaction import unfinished_record
from scellst_ray.runs.folder import FINISHED, RunFolder, split_by_slide
from scellst_ray.runs.records import SlideRecord
from scellst_ray.slides.manifest import SlideRow
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
logger = logging.getLogger(__name__)


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
        # Both threads use the fields below, under the lock.
        self.incomplete = IncompleteSlides(progress)
        self.complete: set[str] = set()
        self.unlogged: list[pa.Table] = []
        self.unlogged_complete: list[CompleteSlide] = []
        self.waiting: deque[CompleteSlide] = deque()
        self.num_waiting = 0
        self.alone: set[str] = set()
        # Damaged shards of the slides that could not be finished because of them.
        self.damaged: dict[str, list[str]] = {}
        self.uses = ShardUses()
        self.imported = False
        self.lock = threading.Lock()
        self.logged_at = self.started = self.heard_at = time.monotonic()
        self.finishers: list[Any] = []
        self.finishing: dict[Any, tuple[Any, list[CompleteSlide]]] = {}

    def resume(
        self,
        pending: list[SlideRow],
        spec: CellsSpec,
        finished: Collection[str] = (),
        trusted: Collection[str] = (),
    ) -> list[PendingSlide]:
        """Read the receipts of an earlier driver; return the slides that still need work.

        Args:
            pending: The slides to finish. Shards of slides neither pending nor finished stay.
            spec: Settings of the computation.
            finished: slide_ids of all finished slides of this run.
            trusted: slide_ids whose receipts may count without a source, see resume.py.
        """
        self.imported = spec.segmenter == "imported"
        work = read_logged_work(self.run, pending, spec, finished, trusted)
        self.unlogged += work.adopted
        for slide_id, receipts in work.others.items():
            self._use(slide_id, receipts)
        for slide_id, receipts in work.receipts.items():
            self._add(slide_id, receipts)
        self.progress.num_cells_before = self.progress.num_cells
        self.report(self.progress)
        return [row for row in work.rows if row["slide_id"] not in self.complete]

    def _use(self, slide_id: str, receipts: pa.Table) -> None:
        self.uses.add(slide_id, receipts["shard"].drop_null().unique().to_pylist())

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

    def remove_damaged(self) -> list[str]:
        """Remove the damaged shards; return the slides that must be resumed for their tiles."""
        self.check()
        names = sorted({name for shards in self.damaged.values() for name in shards})
        for slide_id in sorted(self.damaged):
            text, extra = "slide %s: %s", log_fields(slide_id)
            error = self.progress.records[slide_id].get("error")
            logger.warning(text, slide_id, error, extra=extra)
        storage.remove_files([self.run.shard_uri(name) for name in names])
        return sorted(self.damaged)

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
        self._use(slide_id, receipts)
        complete = self.incomplete.add(slide_id, receipts)
        if complete is not None:
            self.complete.add(slide_id)
            self.unlogged_complete.append((slide_id, complete))

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
            receipts_of = dict(slides)
            for record in records:
                if damaged := record.get("damaged_shards"):
                    self.damaged[record["slide_id"]] = damaged
                    self.incomplete.forget(receipts_of[record["slide_id"]])
                elif record.get("stage") == "finish":
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
