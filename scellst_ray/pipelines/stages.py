"""The stages of the pass over the pixels, on rows: one dict per tile, from tile to receipt.

Plain functions and callables without a cluster: pipelines/cells.py strings them together, fused in
one CPU actor or spread over CPU and GPU stages, and a plain loop over them gives the same tables.
A row that carries an error passes through untouched: an error is a value, never an exception that
stops the cohort.
"""

import uuid

import cv2
import numpy as np
import pyarrow as pa
import torch

from scellst_ray import schemas, storage
from scellst_ray.geometry import Box
from scellst_ray.models.encoder import Encoder, embed_crops, is_named, load_encoder
from scellst_ray.models.mil import MilHead, load_head, stored_hidden
from scellst_ray.nuclei import hematoxylin
from scellst_ray.nuclei.crops import crop_nuclei
from scellst_ray.pipelines.tiles import CellsSpec, Row, guarded
from scellst_ray.runs import RunFolder
from scellst_ray.slides.reader import Slide

MAX_CELLS_PER_TILE = 1 << 20
SEGMENTERS = {"hematoxylin": hematoxylin.segment}
# Raised whenever a segmenter's results change: part of every run's digest.
SEGMENTER_VERSIONS = {"hematoxylin": 1}


class OpenSlides:
    """The slides a worker has open: the last two, since opening a plain image decodes it."""

    def __init__(self) -> None:
        """Start with none open."""
        self._open: dict[tuple[str, float], Slide] = {}

    def get(self, uri: str, mpp: float) -> Slide:
        """Return an open slide, opening it if need be."""
        key = (uri, mpp)
        if key not in self._open:
            while len(self._open) >= 2:
                self._open.pop(next(iter(self._open))).close()
            self._open[key] = Slide(storage.local_copy(uri), uri, mpp)
        return self._open[key]

    def drop(self, uri: str, mpp: float) -> None:
        """Close a slide: OpenSlide refuses all further reads after one failed."""
        slide = self._open.pop((uri, mpp), None)
        if slide is not None:
            slide.close()


class Segment:
    """Pixels to nuclei and their crops."""

    def __init__(self, spec: CellsSpec) -> None:
        """Prepare a worker."""
        cv2.setNumThreads(spec.num_threads)
        self.segment = SEGMENTERS[spec.segmenter]
        self.slides = OpenSlides()

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Add `cells` (a table without vectors) and `crops` (uint8 [N, 48, 48, 3]) to each row."""
        for row in rows:
            if row.get("error") is None and row["num_tiles"]:
                self._one(row)
        return rows

    def _one(self, row: Row) -> None:
        with guarded(row, "read"):
            slide = self.slides.get(row["uri"], row["mpp"])
            box = Box(*(row[f"read_{name}"] for name in Box._fields))
            image, frame = slide.read(box, row["read_mpp"])
        if row.get("error") is not None:
            self.slides.drop(row["uri"], row["mpp"])
            return
        px_per_um = (1 / (frame.ratio_x * row["mpp"]), 1 / (frame.ratio_y * row["mpp"]))
        with guarded(row, "segment"):
            nuclei = self.segment(image, row["read_mpp"])
            core = Box(*(row[f"core_{name}"] for name in Box._fields))
            nuclei = nuclei.take(np.flatnonzero(core.contains(frame.to_level0(nuclei.centroid_px))))
            if len(nuclei) > MAX_CELLS_PER_TILE:
                message = f"{len(nuclei)} nuclei in one tile; use smaller tiles (core_px)"
                raise ValueError(message)
            centroid_x0y0 = frame.to_level0(nuclei.centroid_px).astype(np.float32)
            um2_per_px = 1 / (px_per_um[0] * px_per_um[1])
            cells = {
                "slide_id": pa.repeat(row["slide_id"], len(nuclei)),
                "cell_id": (row["tile_id"] * MAX_CELLS_PER_TILE + np.arange(len(nuclei))),
                "x0": centroid_x0y0[:, 0],
                "y0": centroid_x0y0[:, 1],
                "area_um2": (nuclei.area_px * um2_per_px).astype(np.float32),
                "nucleus_type": pa.array(nuclei.nucleus_type.tolist(), pa.string()),
                "type_prob": pa.array(nuclei.type_prob, pa.float32(), from_pandas=True),
                "polygon": pa.array(nuclei.polygon_wkb(frame), pa.binary()),
            }
            table = pa.table(cells, schema=pa.schema(schemas.CELL_FIELDS))
        if row.get("error") is not None:
            return
        with guarded(row, "crop"):
            row["crops"] = crop_nuclei(image, nuclei.centroid_px, px_per_um)
            row["cells"] = table


class Embed:
    """Crops to embeddings, and embeddings to the head's hidden layer."""

    def __init__(self, spec: CellsSpec, device: str) -> None:
        """Load the networks; `device` is 'cpu' or 'cuda'."""
        torch.set_num_threads(spec.num_threads)
        self.spec, self.device = spec, device
        self.encoder: Encoder = load_encoder(local_weights(spec.encoder))
        self.encoder.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head: MilHead | None = None
        if spec.head_uri is not None:
            self.head = load_head(spec.head_uri)[0].to(device)

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Replace `crops` by vector columns of `cells`."""
        for row in rows:
            if row.get("error") is None and row["num_tiles"]:
                with guarded(row, "embed"):
                    row["cells"] = self._with_vectors(row["cells"], row.pop("crops"))
        return rows

    def _with_vectors(self, cells: pa.Table, crops: np.ndarray) -> pa.Table:
        embedding_ND = embed_crops(self.encoder, crops, self.device, self.spec.precision)
        if self.spec.store_embeddings:
            field = schemas.vector("embedding", embedding_ND.shape[1])
            cells = cells.append_column(field, vectors(embedding_ND))
        if self.head is not None:
            with torch.inference_mode():
                x_ND = torch.from_numpy(embedding_ND).to(self.device)
                hidden_NH = stored_hidden(self.head.hidden(x_ND)).cpu().numpy()
            field = schemas.vector("hidden", hidden_NH.shape[1])
            cells = cells.append_column(field, vectors(hidden_NH))
        return cells


class WriteShards:
    """Tiles to one shard per slide and task, and to receipts."""

    def __init__(self, run: RunFolder) -> None:
        """Write below `run`."""
        self.run = run

    def __call__(self, rows: list[Row]) -> pa.Table:
        """Publish the cells of these tiles; return RECEIPTS."""
        for slide_id in sorted({row["slide_id"] for row in rows}):
            self._one([r for r in rows if r["slide_id"] == slide_id and r.get("cells") is not None])
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
        rows = [row for row in rows if row.get("error") is None and len(row["cells"])]
        if not rows:
            return
        outcome: Row = {}
        name = f"{rows[0]['tile_id']}-{rows[-1]['tile_id']}-{uuid.uuid4().hex[:12]}.parquet"
        with guarded(outcome, "write"):
            table = pa.concat_tables([row["cells"] for row in rows])
            uri = storage.join(self.run.shards_uri(rows[0]["slide_id"]), name)
            storage.publish_table(uri, table)
        outcome["seconds_write"] /= len(rows)
        start = 0
        for row in rows:
            row.update(outcome)
            if row.get("error") is None:
                row.update(shard=name, shard_row=start)
            start += len(row["cells"])


def vectors(values: np.ndarray) -> pa.FixedSizeListArray:
    """Return a float16 array [N, D] as an Arrow column, without copying."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), pa.float16())
    field = pa.field("item", pa.float16())
    return pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(field, values.shape[1]))


def local_weights(weights: str) -> str:
    """Return weights as `load_encoder` takes them: a file of any storage as a local path."""
    return weights if is_named(weights) else str(storage.local_copy(weights))
