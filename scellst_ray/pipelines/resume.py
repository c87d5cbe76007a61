"""What an earlier driver left in the receipts log, and what of it still counts."""

import logging
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from scellst_ray import storage
from scellst_ray.runs.documents import NUM_READERS
from scellst_ray.runs.folder import RunFolder, split_by_slide
from scellst_ray.runs.receipt_sources import of_source
from scellst_ray.runs.receipts_log import best_of_each_tile
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.stages.rows import PendingSlide, slide_row
from scellst_ray.stages.slide_source import present_source
from scellst_ray.stages.tiles import CellsSpec

# Number of slides that a log line names.
NAMED_SLIDES = 10
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoggedWork:
    """The receipts of an earlier driver that still count.

    Attributes:
        rows: The slides to finish, with the tiles that are done.
        receipts: Receipts of these slides by slide_id; none if the slide is begun from the start.
        adopted: Receipts that are not logged as they are here: they had no source.
        others: Receipts of slides that are not to be finished now, by slide_id.
    """

    rows: list[PendingSlide]
    receipts: dict[str, pa.Table]
    adopted: list[pa.Table]
    others: dict[str, pa.Table]


def pending_slide(slide: SlideRow, spec: CellsSpec, run: RunFolder) -> PendingSlide:
    """Return a slide as `plan_slide` takes it, without a tile that is done."""
    row = slide_row(slide)
    row["thumbnail_uri"] = run.thumbnail_uri(slide.slide_id)
    if spec.segmenter != "imported":
        row["segmentation"] = None
    elif row["segmentation"] is not None:
        row["imported_uri"] = run.imported_uri(slide.slide_id)
    return row


def read_logged_work(
    run: RunFolder,
    pending: Sequence[SlideRow],
    spec: CellsSpec,
    finished: Collection[str],
    trusted: Collection[str],
) -> LoggedWork:
    """Return the receipts of the log that still count.

    Args:
        run: The run.
        pending: The slides to finish.
        spec: Settings of the computation.
        finished: slide_ids of all finished slides of this run; their receipts are left out.
        trusted: slide_ids whose receipts may count without a source, as earlier releases wrote
            them: the manifest names the same files as it did then.
    """
    log = run.all_receipts(without=finished)
    log = log.filter(pc.and_(pc.is_null(log["error"]), pc.greater_equal(log["tile_id"], 0)))
    found = dict(split_by_slide(_with_shards(run, log).sort_by("slide_id")))
    work = LoggedWork([pending_slide(slide, spec, run) for slide in pending], {}, [], found)
    begun = [row for row in work.rows if row["slide_id"] in found]
    # Only these files are looked at, since each one takes a request or some reads.
    with ThreadPoolExecutor(NUM_READERS) as readers:
        sources = list(readers.map(lambda row: present_source(row, spec), begun))
    renewed = []
    for row, source in zip(begun, sources, strict=True):
        slide_id = row["slide_id"]
        before = found.pop(slide_id)
        receipts = best_of_each_tile(of_source(before, source, trusted=slide_id in trusted))
        if len(receipts):
            work.receipts[slide_id] = receipts
            row["source"], row["done_tiles"] = source, receipts["tile_id"].to_pylist()
            logged = best_of_each_tile(of_source(before, source, trusted=False))
            if len(logged) < len(receipts):
                work.adopted.append(receipts)
        else:
            renewed.append(slide_id)
    if renewed:
        logger.warning(
            "%d slide(s) are done from the start, since their file, or what the manifest says of "
            "them, is not what it was when their first tiles were done: %s%s",
            len(renewed),
            ", ".join(renewed[:NAMED_SLIDES]),
            " ..." if len(renewed) > NAMED_SLIDES else "",
        )
    return work


def _with_shards(run: RunFolder, receipts: pa.Table) -> pa.Table:
    """Return the receipts whose shard exists, and those of tiles without cells.

    Of a tile that was done several times, the shard of one receipt may be gone.
    """
    uris = storage.list_files(run.shards_uri)
    names = pa.array([uri.rsplit("/", 1)[-1] for uri in uris], pa.string())
    exists = pc.is_in(receipts["shard"], value_set=names)
    return receipts.filter(pc.or_(exists, pc.equal(receipts["num_cells"], 0)))
