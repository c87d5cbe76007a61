"""The driver's side of a run: log receipts, finish slides, take up what an earlier driver left.

Receipts come in on the caller's thread. A second one writes them to the log every few seconds,
and has those slides finished that are whole in the log: many at a time where they are small, by as
many tasks as the cluster has cores to spare. So a slow disk, and a slow slide, hold nobody up.
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

# A dead driver's successor redoes what came in meanwhile; in long runs fewer files are worth more.
LOG_EVERY_S = (5.0, 30.0)
LONG_RUN_S = 3600.0
TEND_EVERY_S = 0.2
# Said after so long without a receipt: a tile may take that, or the run waits for lost nodes.
SILENT_S = 600.0
# What one finishing task takes, at most: small slides share its start, large ones their nodes.
SLIDES_PER_TASK, CELLS_PER_TASK = 64, 200_000
# Receipts of slides to be finished, in memory: beyond it the pipeline waits.
MAX_WAITING_TILES = 200_000
# Tables of receipts of one slide, before they are joined: each takes ten kilobytes of its own.
MAX_PARTS = 32
Report = Callable[["Progress"], None]
logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands, for whoever shows it."""

    num_slides: int
    records: dict[str, SlideRecord] = field(default_factory=dict)
    num_tiles: int = 0
    num_tiles_known: int = 0
    num_cells: int = 0
    num_cells_before: int = 0
    started: float = field(default_factory=time.monotonic)


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
        # Of slides that are not whole; both threads work on what is below, with the lock.
        self.receipts: dict[str, list[pa.Table]] = {}
        self.whole: set[str] = set()
        self.unlogged: list[pa.Table] = []
        self.unlogged_whole: list[CompleteSlide] = []
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
        """Take up the receipts of an earlier driver; return the slides that still need work.

        Args:
            pending: The slides to finish.
            spec: What is computed.
            finished: All slides of this run that are. Those that are neither keep their shards.

        Returns:
            Rows as `plan_slide` takes them.
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
            if slide.slide_id not in self.whole:
                segmentation, imported_uri = self._imported(slide, spec)
                rows.append(
                    {
                        "slide_id": slide.slide_id,
                        "uri": slide.uri,
                        "mpp": slide.mpp,
                        "mpp_error": slide.mpp_error,
                        "done_tiles": done["tile_id"].to_pylist(),
                        "segmentation": segmentation,
                        "imported_uri": imported_uri,
                    }
                )
        self.progress.num_cells_before = self.progress.num_cells
        self.report(self.progress)
        return rows

    def _with_shards(self, receipts: pa.Table) -> pa.Table:
        """Return those receipts whose shard is there: others are worth nothing."""
        uris = storage.list_files(self.run.shards_uri)
        names = pa.array([uri.rsplit("/", 1)[-1] for uri in uris], pa.string())
        there = pc.is_in(receipts["shard"], value_set=names)
        return receipts.filter(pc.or_(there, pc.equal(receipts["num_cells"], 0)))

    def _use(self, slide_id: str, receipts: pa.Table) -> None:
        self.uses.add(slide_id, receipts["shard"].drop_null().unique().to_pylist())

    def _imported(self, slide: SlideRow, spec: CellsSpec) -> tuple[str | None, str | None]:
        """Return where a slide's imported nuclei are, and where they shall lie sorted by tile."""
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
                    if tending.done():  # it ends early only if it failed
                        break
            finally:
                ended.set()
                tending.result()
                self._log()

    def finish(self) -> None:
        """Wait for the slides being finished; remove what then is left of all shards."""
        self._log()
        while self.waiting or self.finishing:
            self._submit()
            self._collect(timeout=1)
        if not self.uses:
            # Of workers and drivers that died before they could tell of them.
            _tidy(partial(storage.remove_tree, self.run.shards_uri))

    def _take(self, receipts: pa.Table) -> None:
        """Take receipts as they come; what comes late of a slide that is whole is dropped."""
        self.heard_at = time.monotonic()
        with self.lock:
            for slide_id, part in split_by_slide(receipts):
                if slide_id in self.whole:
                    told = (slide_id, len(part))
                    logger.warning(
                        "slide %s: %d receipts came twice", *told, extra=log_fields(slide_id)
                    )
                    continue
                self.unlogged.append(part)
                self._add(slide_id, part)
        self.report(self.progress)

    def _add(self, slide_id: str, receipts: pa.Table) -> None:
        """Take receipts of one slide; if they are all there now, it can be finished."""
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
                # A tile that came twice is one tile.
                parts[:] = [last_of_each_tile(joined)]
                self._count(joined, -1)
                self._count(parts[0], 1)
        if len(parts[0]) >= max(1, num_tiles):
            self.whole.add(slide_id)
            self.unlogged_whole.append((slide_id, *self.receipts.pop(slide_id)))

    def _count(self, receipts: pa.Table, sign: int) -> None:
        """Add receipts to what is shown, or take them back."""
        num_tiles, num_cells = (receipts[n].to_numpy() for n in ("num_tiles", "num_cells"))
        self.progress.num_tiles += sign * int(np.count_nonzero(num_tiles))
        self.progress.num_cells += sign * int(num_cells.sum())

    def _tend_until(self, ended: threading.Event) -> None:
        """Log receipts and have slides finished, until there is no more to come."""
        at_first = total_resources()
        while not ended.wait(TEND_EVERY_S):
            now = time.monotonic()
            if now - self.heard_at > SILENT_S:
                self.heard_at = now
                _say_silent(at_first)
            least, most = LOG_EVERY_S
            if now - self.logged_at > min(most, least * (1 + (now - self.started) / LONG_RUN_S)):
                self._log()
            self._submit()
            self._collect(timeout=0)

    def _log(self) -> None:
        """Write the log; slides that are whole in it may be finished from then on."""
        self.check()
        with self.lock:
            tables, self.unlogged = self.unlogged, []
            whole, self.unlogged_whole = self.unlogged_whole, []
        if tables:
            self.run.log_receipts(pa.concat_tables(tables))
        self.logged_at = time.monotonic()
        # The tables are named in the log before they are used up.
        self.waiting.extend(whole)
        self.num_waiting += sum(len(receipts) for _, receipts in whole)

    def _submit(self) -> None:
        """Start tasks that finish slides, a few at a time."""
        if not self.waiting:
            return
        cpus = total_resources().get("CPU", 1)
        most = max(2, int(cpus) // 4)
        while self.waiting and len(self.finishing) < most:
            share = math.ceil(len(self.waiting) / (most - len(self.finishing)))
            slides = self._next_slides(min(SLIDES_PER_TASK, share))
            # In one piece: a table of many takes far longer to send.
            receipts = pa.concat_tables([table for _, table in slides]).combine_chunks()
            finisher = self.finishers.pop() if self.finishers else RemoteFinisher.remote()
            task = finisher.finish.remote(self.run, receipts, self.imported)
            self.finishing[task] = finisher, slides

    def _next_slides(self, most: int) -> list[CompleteSlide]:
        """Return the next slides that one task shall finish."""
        slides = [self.waiting.popleft()]
        num_cells = _num_cells(slides[0])
        while self.waiting and len(slides) < most and slides[0][0] not in self.alone:
            num_cells += _num_cells(self.waiting[0])
            if num_cells > CELLS_PER_TASK or self.waiting[0][0] in self.alone:
                break
            slides.append(self.waiting.popleft())
        return slides

    def _collect(self, timeout: float) -> None:
        """Take the records of slides that have been finished meanwhile."""
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
                    # One of them ended the process: each by itself, then.
                    self.alone |= {slide_id for slide_id, _ in slides}
                    self.waiting.extendleft(slides)
                    continue
                records = [unfinished_record(slides[0][0], type(error).__name__, str(error))]
            self.num_waiting -= sum(len(receipts) for _, receipts in slides)
            self._remove_shards(records)
            for record in records:
                if record.get("stage") == "finish":
                    told = (record["slide_id"], record["error_type"], record["error"])
                    text, extra = "slide %s could not be finished: %s: %s", log_fields(told[0])
                    logger.error(text, *told, extra=extra)
                self.progress.records[record["slide_id"]] = record
        if ready:
            self.report(self.progress)

    def _remove_shards(self, records: list[SlideRecord]) -> None:
        """Remove the shards that were needed only by slides that are finished now.

        A partial slide keeps its own: a later run adds only the tiles that failed.
        """
        with self.lock:
            finished = [r["slide_id"] for r in records if r["status"] in FINISHED]
            useless = [name for slide_id in finished for name in self.uses.finished(slide_id)]
        _tidy(partial(storage.remove_files, [self.run.shard_uri(name) for name in useless]))


def _say_silent(at_first: Mapping[str, float]) -> None:
    """Say that nothing comes in, and what there is of the cluster that the run began with."""
    now = total_resources()
    kinds = [kind for kind in ("GPU", "CPU") if kind in at_first]
    left = ", ".join(f"{now.get(k, 0):g} of {at_first[k]:g} {k}s" for k in kinds)
    logger.warning(
        "no tile was finished for %g minutes; of the cluster at the beginning %s are there. What "
        "lost nodes had begun waits until there is room for it; a run that is ended goes on with "
        "the same command",
        SILENT_S / 60,
        left,
    )


def _tidy(remove: Callable[[], None]) -> None:
    """Remove what nothing will read. If it stays it takes room and no more."""
    try:
        remove()
    except OSError as error:
        logger.warning("shards are left, for `scellst-ray gc` to remove: %s", error)


def _num_cells(whole: CompleteSlide) -> int:
    return int(whole[1]["num_cells"].to_numpy().sum())
