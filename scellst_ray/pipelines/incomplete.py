"""Receipts of slides that lack some, joined until a slide is complete."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scellst_ray.core.logs import log_fields
from scellst_ray.pipelines.progress import Progress
from scellst_ray.runs.receipt_sources import SOURCE
from scellst_ray.runs.receipts_log import best_of_each_tile

# Tables of receipts of one slide are joined beyond this number: each takes ten kilobytes.
MAX_PARTS = 32
logger = logging.getLogger(__name__)


class IncompleteSlides:
    """The receipts of slides that lack some. All receipts of a slide are of one source.

    A slide's file may change during a run. The slide is then planned again, and the receipts of the
    file before no longer count.
    """

    def __init__(self, progress: Progress) -> None:
        """Start without receipts; counts of tiles and cells go to `progress`."""
        self.progress = progress
        self.parts: dict[str, list[pa.Table]] = {}
        self._source: dict[str, str | None] = {}
        self._replaced: dict[str, set[str | None]] = {}

    def add(self, slide_id: str, receipts: pa.Table) -> pa.Table | None:
        """Take receipts of one slide; return all of its receipts if it is complete now."""
        for source in receipts[SOURCE].unique().to_pylist():
            is_one = pc.equal(receipts[SOURCE], source) if source else pc.is_null(receipts[SOURCE])
            self._add_source(slide_id, source, receipts.filter(is_one))
        parts = self.parts.get(slide_id)
        if not parts:
            return None
        num, num_tiles = sum(map(len, parts)), parts[0]["num_tiles"][0].as_py()
        if len(parts) > MAX_PARTS or num >= max(1, num_tiles):
            joined = pa.concat_tables(parts).combine_chunks() if len(parts) > 1 else parts[0]
            parts[:] = [joined]
            if len(np.unique(joined["tile_id"].to_numpy())) < num:
                # A tile that came twice counts once.
                parts[:] = [best_of_each_tile(joined)]
                self._count(joined, -1)
                self._count(parts[0], 1)
        if len(parts[0]) < max(1, num_tiles):
            return None
        (complete,) = self.parts.pop(slide_id)
        return complete

    def _add_source(self, slide_id: str, source: str | None, receipts: pa.Table) -> None:
        """Take receipts of one source, in place of those of a source before it."""
        parts = self.parts.setdefault(slide_id, [])
        if not parts:
            self.progress.num_tiles_known += receipts["num_tiles"][0].as_py()
        elif self._source[slide_id] != source:
            replaced = self._replaced.setdefault(slide_id, set())
            # Tiles fail if they were planned for a file that is no longer there.
            if source in replaced or receipts["error"].null_count == 0:
                return
            replaced.add(self._source[slide_id])
            text, extra = "slide %s: its file changed, so its tiles are done again", slide_id
            logger.warning(text, slide_id, extra=log_fields(extra))
            for part in parts:
                self._count(part, -1)
            new, old = (table["num_tiles"][0].as_py() for table in (receipts, parts[0]))
            self.progress.num_tiles_known += new - old
            parts.clear()
        self._source[slide_id] = source
        parts.append(receipts)
        self._count(receipts, 1)

    def forget(self, receipts: pa.Table) -> None:
        """Take all receipts of a complete slide out of the counts: its tiles are done again."""
        self._count(receipts, -1)
        self.progress.num_tiles_known -= receipts["num_tiles"][0].as_py()

    def _count(self, receipts: pa.Table, sign: int) -> None:
        """Add receipts to the progress, or with sign -1 subtract them."""
        num_tiles, num_cells = (receipts[n].to_numpy() for n in ("num_tiles", "num_cells"))
        self.progress.num_tiles += sign * int(np.count_nonzero(num_tiles))
        self.progress.num_cells += sign * int(num_cells.sum())
