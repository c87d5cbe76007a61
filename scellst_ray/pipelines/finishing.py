"""Finishing slides: receipts and shards to tables and records, in processes of their own."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray

from scellst_ray import storage
from scellst_ray.core.logs import log_context
from scellst_ray.runs.compaction import finish_slide, unfinished_record
from scellst_ray.runs.folder import RunFolder, split_by_slide
from scellst_ray.runs.records import SlideRecord
from scellst_ray.runs.shards import DamagedShardsError, Shards
from scellst_ray.stages.rows import Outcome
from scellst_ray.stages.tiles import guarded

# On a local disk more threads only wait for Python's lock. A request to a store is mostly waiting.
THREADS_HERE, THREADS_REMOTE = 2, 16
CompleteSlide = tuple[str, pa.Table]


def finish_slides(run: RunFolder, receipts: pa.Table, *, imported: bool) -> list[SlideRecord]:
    """Finish slides; return their records. The record of a slide that failed is not published.

    Args:
        run: The run.
        receipts: RECEIPTS of complete slides, one slide after another.
        imported: Whether the nuclei are imported, as `finish_slide` takes it.
    """
    shards = Shards(run)

    def finish(slide: CompleteSlide) -> SlideRecord:
        slide_id, of_slide = slide
        outcome = Outcome()
        damaged: list[str] = []
        with log_context(slide_id), guarded(outcome, "finish"):
            try:
                record = finish_slide(run, slide_id, of_slide, shards, imported=imported)
            except DamagedShardsError as found:
                damaged = list(found.problems)
                raise
        error = outcome.get("error")
        if error is not None:
            # Shards and receipts of the slide stay: the next run finishes it.
            record = unfinished_record(slide_id, str(outcome["error_type"]), error)
            if damaged:
                record["damaged_shards"] = damaged
        return record

    threads = THREADS_HERE if storage.is_local(run.uri) else THREADS_REMOTE
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(finish, split_by_slide(receipts)))


class Finisher:
    """A process that finishes slides. Ray would start a process for each task without a CPU."""

    def finish(self, run: RunFolder, receipts: pa.Table, imported: bool) -> list[SlideRecord]:  # noqa: FBT001 - by position through Ray
        """Call `finish_slides`."""
        return finish_slides(run, receipts, imported=imported)


# Without a CPU slot, on any node: the workers hold all slots.
_remote: Any = ray.remote(
    num_cpus=0, max_restarts=-1, max_task_retries=3, scheduling_strategy="SPREAD"
)
RemoteFinisher = _remote(Finisher)
