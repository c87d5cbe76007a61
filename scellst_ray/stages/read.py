"""The stage that reads tiles: from boxes to pixels."""

from contextlib import ExitStack

import cv2

from scellst_ray.slides.reader import Slide, box_frame
from scellst_ray.stages.rows import TileRow
from scellst_ray.stages.tiles import CellsSpec, box_of, guarded, todo
from scellst_ray.storage.node_cache import hold


class OpenSlides:
    """The slides that a worker has open: the last two, since opening a plain image decodes it."""

    def __init__(self) -> None:
        """Start without an open slide."""
        self._open: dict[tuple[str, float], tuple[Slide, ExitStack]] = {}

    def get(self, uri: str, mpp: float) -> Slide:
        """Return an open slide; open it if it is not open yet."""
        key = (uri, mpp)
        if key not in self._open:
            while len(self._open) >= 2:
                self.drop(*next(iter(self._open)))
            with ExitStack() as stack:
                held = stack.enter_context(hold(uri))
                slide = stack.enter_context(Slide(held.path, held.name, mpp))
                self._open[key] = slide, stack.pop_all()
        return self._open[key][0]

    def drop(self, uri: str, mpp: float) -> None:
        """Close a slide. OpenSlide refuses all reads after one that failed."""
        if (uri, mpp) in self._open:
            _, opened = self._open.pop((uri, mpp))
            opened.close()


class Read:
    """Stage that reads the pixels of tiles."""

    def __init__(self, spec: CellsSpec) -> None:
        """Prepare a worker."""
        cv2.setNumThreads(spec.num_threads)
        self.slides = OpenSlides()
        # Imported nuclei without embeddings need no pixels.
        self.no_pixels = spec.segmenter == "imported" and spec.encoder == "none"

    def __call__(self, rows: list[TileRow]) -> list[TileRow]:
        """Add `image` (RGB uint8 [H, W, 3]) and `frame` (where it lies) to each row."""
        for row in todo(rows):
            if self.no_pixels:
                row["frame"] = box_frame(box_of(row, "read"), row["read_mpp"] / row["mpp"])
                continue
            with guarded(row, "read"):
                slide = self.slides.get(row["uri"], row["mpp"])
                row["image"], row["frame"] = slide.read(box_of(row, "read"), row["read_mpp"])
            if row.get("error") is not None:
                self.slides.drop(row["uri"], row["mpp"])
        return rows
