"""The settings that decide the results of a run, and the functions that all stages share.

An error in a tile becomes a value in its row (stages/rows.py). Every worker imports this file
first, so it loads quickly.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from scellst_ray.core import schemas
from scellst_ray.core.geometry import Box
from scellst_ray.core.logs import log_context, one_line
from scellst_ray.nuclei import seams
from scellst_ray.runs.crop_files import Colours
from scellst_ray.stages.rows import SECONDS_OF_STAGE, Outcome, TileBoxes, TileRow
from scellst_ray.storage.credentials import redact

MAX_CELLS_PER_TILE = 1 << seams.TILE_BITS
OUT_OF_MEMORY = (
    "(more memory than the worker may have: check the file, or give workers more with memory_gb)"
)
PLANNED = schemas.TILES.append(pa.field("seconds_plan", pa.float32())).append(
    pa.field("queued_at", pa.float64())
)


@dataclass(frozen=True)
class CellsSpec:
    """All settings that decide what the stages compute; sent to every worker.

    Attributes:
        segmenter: 'hematoxylin', 'cellvit' or 'imported'.
        read_mpp: um per px to read slides at; None: chosen for the segmenter and the slide.
        core_px: Tile core in px read.
        halo_px: Halo in px read.
        encoder: Weights as `load_encoder` takes them, a URI of a weights file, 'tokens' or
            'types' of the segmenting network, or 'none'.
        precision: Precision of all networks: 'float32', 'bfloat16' or 'float16'.
        head_uri: File of the expression head; None without one.
        store_embeddings: Whether CELLS get an embedding column.
        num_threads: CPU threads of torch and OpenCV in a worker.
        type_names: Nucleus types of the segmenting network, by number.
        weights: Checkpoint of the segmenting network, a URI or a name of the catalogue; or None.
        weights_digest: Digest that the segmenting network must have; None: not checked.
        encoder_digest: Digest that the encoder must have; None: not checked.
        window_px: Neighbourhood for the network's edge maps in px read; None: the whole tile.
        colours: Mean and deviation of RGB that normalise the crops of a slide, by slide_id; None:
            those of the encoder for all slides.
        head_digest: SHA-256 that the head's file must have; None: not checked.
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
    type_names: tuple[str, ...] = ()
    weights: str | None = None
    weights_digest: str | None = None
    encoder_digest: str | None = None
    window_px: int | None = None
    colours: dict[str, Colours] | None = None
    head_digest: str | None = None

    @property
    def needs_crops(self) -> bool:
        """Whether embeddings are made from crops."""
        return self.encoder not in {"none", "tokens", "types"}

    @property
    def side_px(self) -> int:
        """Side of a whole tile in px read: core and halos."""
        return self.core_px + 2 * self.halo_px


@contextmanager
def guarded(row: Outcome, stage: str) -> Iterator[None]:
    """Time a stage of one tile, and turn what it raises into values of its row.

    Log lines name the slide and the tile of the row, if it has these fields.
    """
    started = time.perf_counter()
    try:
        with log_context(*_slide_and_tile(row), stage):
            yield
    except Exception as error:  # noqa: BLE001 - the one place where a tile's failure is caught
        notes = " ".join(getattr(error, "__notes__", ()))
        kind = type(error).__name__
        if isinstance(error, MemoryError):  # numpy and pyarrow have kinds of their own
            kind, notes = "MemoryError", f"{notes} {OUT_OF_MEMORY}"
        text = one_line(redact(f"{error} {notes}".strip())) or kind
        row |= {"stage": stage, "error_type": kind, "error": text}
    finally:
        if stage in SECONDS_OF_STAGE:
            row[SECONDS_OF_STAGE[stage]] = time.perf_counter() - started


def _slide_and_tile(row: Mapping[str, object]) -> tuple[str | None, int | None]:
    slide_id, tile_id = row.get("slide_id"), row.get("tile_id")
    return (
        slide_id if isinstance(slide_id, str) else None,
        tile_id if isinstance(tile_id, int) else None,
    )


def box_columns(core: Box, read: Box) -> TileBoxes:
    """Return a tile's boxes as columns of TILES."""
    return {
        "core_x0": core.x0,
        "core_y0": core.y0,
        "core_w0": core.w0,
        "core_h0": core.h0,
        "read_x0": read.x0,
        "read_y0": read.y0,
        "read_w0": read.w0,
        "read_h0": read.h0,
    }


def todo(rows: list[TileRow]) -> list[TileRow]:
    """Return the rows that are a tile without an error."""
    return [row for row in rows if row.get("error") is None and row["num_tiles"]]


def box_of(row: TileBoxes, kind: Literal["core", "read"]) -> Box:
    """Return a row's 'core' or 'read' box, level-0 px."""
    if kind == "core":
        return Box(row["core_x0"], row["core_y0"], row["core_w0"], row["core_h0"])
    return Box(row["read_x0"], row["read_y0"], row["read_w0"], row["read_h0"])
