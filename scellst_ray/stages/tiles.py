"""Tiles as rows: what is computed of them, and what all stages do with a row.

A row is a dict, one per tile, from plan to receipt. What goes wrong becomes a value in the row.
Every worker imports this first, so nothing here takes long to load.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from scellst_ray.core import schemas
from scellst_ray.core.geometry import Box
from scellst_ray.core.logs import log_context
from scellst_ray.nuclei import seams
from scellst_ray.runs.crop_files import Colours

Row = dict[str, Any]
MAX_CELLS_PER_TILE = 1 << seams.TILE_BITS
OUT_OF_MEMORY = (
    "(more memory than the worker may have: check the file, or give workers more with memory_gb)"
)
PLANNED = schemas.TILES.append(pa.field("seconds_plan", pa.float32())).append(
    pa.field("queued_at", pa.float64())
)


@dataclass(frozen=True)
class CellsSpec:
    """All that decides what the stages compute; sent to every worker.

    Attributes:
        segmenter: 'hematoxylin', 'cellvit' or 'imported'.
        read_mpp: um per px to read slides at; None: as the segmenter likes it.
        core_px: Tile core in px read.
        halo_px: Halo in px read.
        encoder: Weights as `load_encoder` takes them, a URI of a weights file, 'tokens' or
            'types' (of the segmenting network), or 'none'.
        precision: 'float32', 'bfloat16' or 'float16', of all networks.
        head_uri: The expression head, or None.
        store_embeddings: Whether CELLS get an embedding column.
        num_threads: CPU threads of torch and OpenCV in a worker.
        type_names: Of the network's types, by number.
        weights: The segmenting network's checkpoint: a URI or a name of the catalogue, or None.
        weights_digest: What the network's weights must be; None: not checked.
        encoder_digest: What the encoder's weights must be; None: not checked.
        window_px: Neighbourhood for the network's edge maps in px read; None: the whole tile.
        colours: By slide_id, the mean and deviation that its crops are normalised with; None: the
            encoder's for all.
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

    @property
    def needs_crops(self) -> bool:
        """Tell whether embeddings are made from crops."""
        return self.encoder not in {"none", "tokens", "types"}

    @property
    def side_px(self) -> int:
        """Side of a whole tile in px read: core and halos."""
        return self.core_px + 2 * self.halo_px


@contextmanager
def guarded(row: Row, stage: str) -> Iterator[None]:
    """Time a stage of one tile, and turn what it raises into values of its row."""
    started = time.perf_counter()
    try:
        with log_context(row.get("slide_id"), row.get("tile_id"), stage):
            yield
    except Exception as error:  # noqa: BLE001 - the one place where a tile's failure is caught
        notes = " ".join(getattr(error, "__notes__", ()))
        kind = type(error).__name__
        if isinstance(error, MemoryError):  # numpy and pyarrow have kinds of their own
            kind, notes = "MemoryError", f"{notes} {OUT_OF_MEMORY}"
        row |= {"stage": stage, "error_type": kind, "error": f"{error} {notes}".strip() or kind}
    finally:
        row[f"seconds_{stage}"] = time.perf_counter() - started


BOX_NAMES = tuple(f"{kind}_{name}" for kind in ("core", "read") for name in Box._fields)


def box_columns(core: Box, read: Box) -> dict[str, int]:
    """Return a tile's boxes as columns of TILES."""
    return dict(zip(BOX_NAMES, (*core, *read), strict=True))


def todo(rows: list[Row]) -> list[Row]:
    """Return the rows that still stand for a tile without an error."""
    return [row for row in rows if row.get("error") is None and row["num_tiles"]]


def box_of(row: Row, kind: str) -> Box:
    """Return a row's 'core' or 'read' box, level-0 px."""
    return Box(*(row[f"{kind}_{name}"] for name in Box._fields))
