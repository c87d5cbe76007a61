"""The stage that reads tiles: from boxes to pixels."""

import cv2

from scellst_ray.slides.reader import box_frame
from scellst_ray.slides.source import SourcedSlide, open_slide
from scellst_ray.stages.rows import TileRow
from scellst_ray.stages.tiles import CellsSpec, box_of, guarded, todo

Key = tuple[str, float, str | None]


class OpenSlides:
    """The slides that a worker has open: the last two, since opening a plain image decodes it."""

    def __init__(self) -> None:
        """Start without an open slide."""
        self._open: dict[Key, SourcedSlide] = {}

    def get(self, uri: str, mpp: float, source: str | None = None) -> SourcedSlide:
        """Return an open slide; open it if it is not open yet.

        Args:
            uri: The slide's file.
            mpp: um per level-0 px.
            source: Source with which the slide was planned; None: not checked.

        Raises:
            ChangedFileError: the file is another one than when the slide was planned.
        """
        key = (uri, mpp, source)
        if key not in self._open:
            while len(self._open) >= 2:
                self.drop(*next(iter(self._open)))
            self._open[key] = open_slide(uri, mpp, planned=source)
        return self._open[key]

    def drop(self, uri: str, mpp: float, source: str | None = None) -> None:
        """Close a slide. OpenSlide refuses all reads after one that failed."""
        if (uri, mpp, source) in self._open:
            self._open.pop((uri, mpp, source)).close()


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
            key = (row["uri"], row["mpp"], row.get("source"))
            with guarded(row, "read"):
                opened = self.slides.get(*key)
                image, frame = opened.slide.read(box_of(row, "read"), row["read_mpp"])
                opened.check()
                row["image"], row["frame"] = image, frame
            if row.get("error") is not None:
                self.slides.drop(*key)
        return rows
