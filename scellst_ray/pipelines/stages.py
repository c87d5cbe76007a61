"""The stages of the pass over the pixels that need no network: read, find nuclei, write.

Plain callables on rows, one dict per tile, from tile to receipt; the networks between them are in
pipelines/networks.py. pipelines/receipts.py strings them together, fused in one CPU actor or
spread over CPU and GPU actors, and a plain loop over them gives the same tables. A row that
carries an error passes through untouched: an error is a value, never an exception that stops the
cohort. No torch here, so that CPU actors beside a GPU need not load it.
"""

import uuid
from contextlib import ExitStack

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scellst_ray import schemas, storage
from scellst_ray.geometry import Box, Frame
from scellst_ray.node_cache import hold
from scellst_ray.nuclei import hematoxylin, seams
from scellst_ray.nuclei.crops import crop_nuclei
from scellst_ray.nuclei.hv_maps import nuclei_from_packed
from scellst_ray.nuclei.imported import nuclei_in_frame, read_tile
from scellst_ray.nuclei.instances import Nuclei
from scellst_ray.pipelines.tiles import CellsSpec, Row, guarded
from scellst_ray.runs import RunFolder
from scellst_ray.slides.reader import Slide, box_frame

MAX_CELLS_PER_TILE = 1 << seams.TILE_BITS
# Raised whenever a segmenter's results change: part of every run's digest.
SEGMENTER_VERSIONS = {"hematoxylin": 2, "cellvit": 1, "imported": 1}
# How far outside its core a tile still offers nuclei that no tile may own: see nuclei/seams.py.
MARGIN_UM = 2.0


def todo(rows: list[Row]) -> list[Row]:
    """Return the rows that still stand for a tile without an error."""
    return [row for row in rows if row.get("error") is None and row["num_tiles"]]


def box_of(row: Row, kind: str) -> Box:
    """Return a row's 'core' or 'read' box, level-0 px."""
    return Box(*(row[f"{kind}_{name}"] for name in Box._fields))


class OpenSlides:
    """The slides a worker has open: the last two, since opening a plain image decodes it."""

    def __init__(self) -> None:
        """Start with none open."""
        self._open: dict[tuple[str, float], tuple[Slide, ExitStack]] = {}

    def get(self, uri: str, mpp: float) -> Slide:
        """Return an open slide, opening it if need be."""
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
        """Close a slide: OpenSlide refuses all further reads after one failed."""
        if (uri, mpp) in self._open:
            _, opened = self._open.pop((uri, mpp))
            opened.close()


class Read:
    """Tiles to pixels."""

    def __init__(self, spec: CellsSpec) -> None:
        """Prepare a worker."""
        cv2.setNumThreads(spec.num_threads)
        self.slides = OpenSlides()
        # Nuclei that are given and not embedded need no pixels.
        self.no_pixels = spec.segmenter == "imported" and spec.encoder == "none"

    def __call__(self, rows: list[Row]) -> list[Row]:
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


class FindNuclei:
    """Pixels, and a network's maps where there was one, to nuclei and their crops."""

    def __init__(self, spec: CellsSpec) -> None:
        """Prepare a worker."""
        cv2.setNumThreads(spec.num_threads)
        self.spec = spec

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Replace the pixels by `cells` (a table without vectors) and what embeds them.

        That is `crops`, uint8 [N, 48, 48, 3], or for tokens `boxes`, px of the tile, int [N, 4];
        for types nothing more.
        """
        for row in todo(rows):
            self._one(row)
            for name in ("image", "maps", "frame"):
                row.pop(name, None)
        return rows

    def _one(self, row: Row) -> None:
        frame: Frame = row["frame"]
        with guarded(row, "segment"):
            nuclei = self._nuclei(row)
            if self.spec.segmenter == "imported":
                seam = np.zeros(len(nuclei), np.uint8)
            else:
                nuclei, seam = _offered(nuclei, row, self._margin_um(row))
            if len(nuclei) > MAX_CELLS_PER_TILE:
                message = f"{len(nuclei)} nuclei in one tile; use smaller tiles (core_px)"
                raise ValueError(message)
            table = _cells(nuclei, seam, row)
        if row.get("error") is not None:
            return
        with guarded(row, "crop"):
            if self.spec.encoder == "tokens":
                row["boxes"] = nuclei.boxes_px()
            elif self.spec.needs_crops:
                px_per_um = (1 / (frame.ratio_x * row["mpp"]), 1 / (frame.ratio_y * row["mpp"]))
                row["crops"] = crop_nuclei(row["image"], nuclei.centroid_px, px_per_um)
            row["cells"] = table

    def _margin_um(self, row: Row) -> float:
        """Return how far outside its core a tile offers nuclei; their crops must lie in it."""
        if not self.spec.needs_crops:
            return MARGIN_UM
        halo_um = self.spec.halo_px * float(row["read_mpp"])
        return max(0.0, min(MARGIN_UM, halo_um - schemas.CROP_UM / 2))

    def _nuclei(self, row: Row) -> Nuclei:
        """Return the tile's nuclei in px of its image, those in the halo included."""
        if self.spec.segmenter == "cellvit":
            return nuclei_from_packed(row["maps"], self.spec.type_names)
        if self.spec.segmenter == "imported":
            return nuclei_in_frame(read_tile(row["imported"], row["tile_id"]), row["frame"])
        return hematoxylin.segment(row["image"], row["read_mpp"])


def _offered(nuclei: Nuclei, row: Row, margin_um: float) -> tuple[Nuclei, NDArray[np.uint8]]:
    """Return the nuclei this tile offers, and what compaction must know of them at seams."""
    frame: Frame = row["frame"]
    boxes = nuclei.boxes_px().astype(np.float64)
    corners = [frame.to_level0(boxes[:, :2]), frame.to_level0(boxes[:, 2:])]
    index, seam = seams.offered(
        frame.to_level0(nuclei.centroid_px),
        np.concatenate(corners, axis=1),
        box_of(row, "core"),
        box_of(row, "read"),
        margin0=margin_um / row["mpp"],
        px0=max(frame.ratio_x, frame.ratio_y),
    )
    return nuclei.take(index), seam


def _cells(nuclei: Nuclei, seam: NDArray[np.uint8], row: Row) -> pa.Table:
    """Return nuclei as rows of a shard, without vectors."""
    frame: Frame = row["frame"]
    centroid_x0y0 = frame.to_level0(nuclei.centroid_px).astype(np.float32)
    um2_per_px = frame.area_ratio * row["mpp"] ** 2
    columns = {
        "slide_id": pa.repeat(row["slide_id"], len(nuclei)),
        "cell_id": (row["tile_id"] * MAX_CELLS_PER_TILE + np.arange(len(nuclei))),
        "x0": centroid_x0y0[:, 0],
        "y0": centroid_x0y0[:, 1],
        "area_um2": (nuclei.area_px * um2_per_px).astype(np.float32),
        "nucleus_type": pa.array(nuclei.nucleus_type.tolist(), pa.string()),
        "type_prob": pa.array(nuclei.type_prob, pa.float32(), from_pandas=True),
        "polygon": pa.array(nuclei.polygon_wkb(frame), pa.binary()),
        "seam": seam,
    }
    return pa.table(columns, schema=pa.schema(schemas.SHARD_FIELDS))


class WriteShards:
    """Tiles to one shard per slide and task, and to receipts."""

    def __init__(self, run: RunFolder) -> None:
        """Write below `run`."""
        self.run = run

    def __call__(self, rows: list[Row]) -> pa.Table:
        """Publish the cells of these tiles; return RECEIPTS."""
        by_slide: dict[str, list[Row]] = {}
        for row in rows:
            by_slide.setdefault(row["slide_id"], []).append(row)
        for of_slide in by_slide.values():
            self._one(of_slide)
        for row in rows:
            failed = row.get("error") is not None
            cells = None if failed else row.get("cells")
            row["num_cells"] = 0 if cells is None else len(cells)
        columns = {
            field.name: pa.array([row.get(field.name) for row in rows], field.type)
            for field in schemas.RECEIPTS
        }
        return pa.table(columns, schema=schemas.RECEIPTS)

    def _one(self, rows: list[Row]) -> None:
        """Write one slide's tiles; if that fails, all of them failed."""
        rows = [
            row
            for row in rows
            if row.get("error") is None and row.get("cells") is not None and len(row["cells"])
        ]
        if not rows:
            return
        outcome: Row = {}
        name = f"{rows[0]['tile_id']}-{rows[-1]['tile_id']}-{uuid.uuid4().hex[:12]}.parquet"
        with guarded(outcome, "write"):
            # One chunk is written in two thirds of the time of one a tile.
            table = pa.concat_tables([row["cells"] for row in rows]).combine_chunks()
            uri = storage.join(self.run.shards_uri(rows[0]["slide_id"]), name)
            storage.publish_table(uri, table)
        outcome["seconds_write"] /= len(rows)
        start = 0
        for row in rows:
            row.update(outcome)
            if row.get("error") is None:
                row.update(shard=name, shard_row=start)
            start += len(row["cells"])
