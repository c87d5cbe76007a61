"""The stage that finds nuclei: from pixels, or a network's maps, to nuclei and their crops."""

from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scellst_ray.core import schemas
from scellst_ray.nuclei import hematoxylin, seams
from scellst_ray.nuclei.crops import crop_nuclei
from scellst_ray.nuclei.hv_maps import nuclei_from_packed
from scellst_ray.nuclei.imported.tiles import nuclei_in_frame, read_tile
from scellst_ray.nuclei.instances import Nuclei
from scellst_ray.stages.rows import TileRow
from scellst_ray.stages.tiles import MAX_CELLS_PER_TILE, CellsSpec, box_of, guarded, todo

if TYPE_CHECKING:
    from scellst_ray.core.geometry import Frame

# A tile offers nuclei up to this distance outside its core, in um: see nuclei/seams.py.
MARGIN_UM = 2.0
# What no later stage needs.
USED_UP: tuple[Literal["image", "maps", "frame"], ...] = ("image", "maps", "frame")


class FindNuclei:
    """Stage that finds nuclei in pixels or in a network's maps, and cuts their crops."""

    def __init__(self, spec: CellsSpec) -> None:
        """Prepare a worker."""
        cv2.setNumThreads(spec.num_threads)
        self.spec = spec

    def __call__(self, rows: list[TileRow]) -> list[TileRow]:
        """Replace the pixels by `cells`, a table without vectors, and by the input of the encoder.

        An encoder of crops gets `crops`, uint8 [N, 48, 48, 3]. Encoder `tokens` gets `boxes`, int
        [N, 4] in px of the tile. Encoder `types` needs nothing more.
        """
        for row in todo(rows):
            self._one(row)
            for name in USED_UP:
                row.pop(name, None)
        return rows

    def _one(self, row: TileRow) -> None:
        frame: Frame = row["frame"]
        with guarded(row, "segment"):
            nuclei = self._nuclei(row)
            if self.spec.segmenter == "imported":
                seam = np.zeros(len(nuclei), np.uint8)
            else:
                nuclei, seam = _select_nuclei(nuclei, row, self._margin_um(row))
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

    def _margin_um(self, row: TileRow) -> float:
        """Return the um outside its core up to which a tile offers nuclei.

        The crop of a nucleus must lie in the tile.
        """
        if not self.spec.needs_crops:
            return MARGIN_UM
        halo_um = self.spec.halo_px * float(row["read_mpp"])
        return max(0.0, min(MARGIN_UM, halo_um - schemas.CROP_UM / 2))

    def _nuclei(self, row: TileRow) -> Nuclei:
        """Return the tile's nuclei in px of its image, including those in the halo."""
        if self.spec.segmenter == "cellvit":
            return nuclei_from_packed(row["maps"], self.spec.type_names)
        if self.spec.segmenter == "imported":
            return nuclei_in_frame(read_tile(row["imported"], row["tile_id"]), row["frame"])
        return hematoxylin.segment(row["image"], row["read_mpp"])


def _select_nuclei(
    nuclei: Nuclei, row: TileRow, margin_um: float
) -> tuple[Nuclei, NDArray[np.uint8]]:
    """Return the nuclei that this tile offers, and their bits for the settling of seams."""
    frame: Frame = row["frame"]
    boxes = nuclei.boxes_px().astype(np.float64)
    corners = [frame.to_level0(boxes[:, :2]), frame.to_level0(boxes[:, 2:])]
    index, seam = seams.select_offered(
        frame.to_level0(nuclei.centroid_px),
        np.concatenate(corners, axis=1),
        box_of(row, "core"),
        box_of(row, "read"),
        margin0=margin_um / row["mpp"],
        px0=max(frame.ratio_x, frame.ratio_y),
    )
    return nuclei.take(index), seam


def _cells(nuclei: Nuclei, seam: NDArray[np.uint8], row: TileRow) -> pa.Table:
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
