"""TILES: from slides to boxes; no pixels beyond a low-power view, and no torch to wait for.

A row is a dict, one per tile, from plan to receipt. What goes wrong becomes a value in the row.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from scellst_ray import schemas, storage
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.tiling import default_read_mpp, plan_tiles
from scellst_ray.slides.tissue import TISSUE_MPP, tissue_mask

Row = dict[str, Any]
PLANNED = schemas.TILES.append(pa.field("seconds_plan", pa.float32()))


@dataclass(frozen=True)
class CellsSpec:
    """All that decides what the stages compute; sent to every worker.

    Attributes:
        segmenter: Name of the nucleus segmenter.
        read_mpp: um per px to read slides at; None: see `default_read_mpp`.
        core_px: Tile core in px read.
        halo_px: Halo in px read.
        encoder: Weights as `load_encoder` takes them, or a URI of a weights file.
        precision: 'float32' or 'bfloat16'.
        head_uri: The expression head, or None.
        store_embeddings: Whether CELLS get an embedding column.
        num_threads: CPU threads of torch and OpenCV in a worker.
    """

    segmenter: str
    read_mpp: float | None
    core_px: int
    halo_px: int
    encoder: str
    precision: str
    head_uri: str | None
    store_embeddings: bool
    num_threads: int = 1


@contextmanager
def guarded(row: Row, stage: str) -> Iterator[None]:
    """Time a stage of one tile, and turn what it raises into values of its row."""
    started = time.perf_counter()
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the one place where a tile's failure is caught
        notes = " ".join(getattr(error, "__notes__", ()))
        row |= {
            "stage": stage,
            "error_type": type(error).__name__,
            "error": f"{error} {notes}".strip() or type(error).__name__,
        }
    finally:
        row[f"seconds_{stage}"] = time.perf_counter() - started


def plan_slide(row: Mapping[str, Any], spec: CellsSpec) -> list[Row]:
    """Plan a slide's tiles.

    Args:
        row: slide_id, uri, mpp and mpp_error of the manifest, and done_tiles (ids not to redo).
        spec: What to compute.

    Returns:
        One row per tile still to do; a single row with tile_id -1 and num_tiles 0 if the slide
        cannot be opened or shows no tissue.
    """
    nothing: Row = {"slide_id": row["slide_id"], "tile_id": -1, "num_tiles": 0, "uri": row["uri"]}
    rows: list[Row] = []
    with guarded(nothing, "plan"):
        if row["mpp_error"]:
            raise ValueError(row["mpp_error"])
        with Slide(storage.local_copy(row["uri"]), row["uri"], row["mpp"]) as slide:
            read_mpp = spec.read_mpp or default_read_mpp(slide.mpp)
            image, frame = slide.overview(max(TISSUE_MPP, slide.mpp))
            mask = tissue_mask(image, max(TISSUE_MPP, slide.mpp))
            size0 = (slide.width0, slide.height0)
            about = {"mpp": slide.mpp, "width0": size0[0], "height0": size0[1]}
        nothing |= about | {"read_mpp": read_mpp}
        ratio = read_mpp / about["mpp"]
        tiles = plan_tiles(size0, ratio, mask, frame, spec.core_px, spec.halo_px)
        done = set(row["done_tiles"])
        for tile in tiles:
            if tile.tile_id not in done:
                boxes = {
                    f"{kind}_{name}": value
                    for kind, box in (("core", tile.core), ("read", tile.read))
                    for name, value in box._asdict().items()
                }
                rows.append(nothing | {"tile_id": tile.tile_id, "num_tiles": len(tiles)} | boxes)
    rows = rows or [nothing]
    rows[-1]["seconds_plan"] = nothing["seconds_plan"]
    return rows


class PlanTiles:
    """Slides to TILES, a slide at a time: what Ray Data maps over the manifest."""

    def __init__(self, spec: CellsSpec) -> None:
        """Plan for these settings."""
        self.spec = spec

    def __call__(self, batch: pa.Table) -> Iterable[pa.Table]:
        """Yield the tiles of each slide of a batch of `plan_slide` rows."""
        for row in batch.to_pylist():
            yield pa.Table.from_pylist(plan_slide(row, self.spec), schema=PLANNED)
