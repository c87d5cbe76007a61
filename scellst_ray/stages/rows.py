"""The rows that travel through a run, field by field: slides, and tiles from plan to receipt.

A row is a dict. Stages add fields to it and take fields out, so most fields of a tile are optional.
FORMAT.md explains TILES and RECEIPTS; core/schemas.py holds their Arrow schemas.
"""

from typing import Literal, Required, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scellst_ray.core.geometry import Frame
from scellst_ray.slides.manifest import SlideRow

Seconds = Literal[
    "seconds_plan",
    "seconds_read",
    "seconds_network",
    "seconds_segment",
    "seconds_crop",
    "seconds_embed",
    "seconds_write",
    "seconds_open",
]
# Where the seconds of a stage are noted. Only preflight uses `open`, the opening of a slide.
SECONDS_OF_STAGE: dict[str, Seconds] = {
    "plan": "seconds_plan",
    "read": "seconds_read",
    "network": "seconds_network",
    "segment": "seconds_segment",
    "crop": "seconds_crop",
    "embed": "seconds_embed",
    "write": "seconds_write",
    "open": "seconds_open",
}


class Outcome(TypedDict, total=False):
    """The outcome of work, as `guarded` writes it into a row.

    Attributes:
        stage: The stage that failed; absent or None if none did.
        error_type: The exception's class.
        error: The exception's message.
        seconds_plan: Seconds that planning the slide took.
        seconds_read: Seconds that reading the pixels took.
        seconds_network: Seconds that the segmenting network took.
        seconds_segment: Seconds that finding nuclei took.
        seconds_crop: Seconds that cutting crops of nuclei took.
        seconds_embed: Seconds that encoder and head took.
        seconds_write: Seconds that writing the shard took.
        seconds_open: Seconds that opening the slide took.
    """

    stage: str | None
    error_type: str | None
    error: str | None
    seconds_plan: float
    seconds_read: float
    seconds_network: float
    seconds_segment: float
    seconds_crop: float
    seconds_embed: float
    seconds_write: float
    seconds_open: float


class AttemptedRow(Outcome):
    """A row whose failures are counted: that of a tile, or of a slide as its tile -1.

    Attributes:
        slide_id: The slide.
        tile_id: The tile; -1 for a slide as a whole.
    """

    slide_id: str
    tile_id: int


class PendingSlide(TypedDict):
    """A slide that still needs work, as `plan_slide` takes it.

    Attributes:
        slide_id: The slide.
        uri: Its file.
        mpp: um per level-0 px, as the manifest says; None: the file says it.
        mpp_error: Problem of the manifest's mpp; None without one.
        mpp_confirmed: Whether the resolution in use counts whatever else states another one.
        done_tiles: tile_ids that need not be done again.
        segmentation: File of imported nuclei; None without one.
        imported_uri: Folder for the imported nuclei, sorted by tile; None without imported nuclei.
        source: Source of the slide that `done_tiles` are of; if its files are others now, no tile
            is done. None: no tile is done.
        thumbnail_uri: File for a picture of the slide; None if no run keeps it.
    """

    slide_id: str
    uri: str
    mpp: float | None
    mpp_error: str | None
    mpp_confirmed: bool
    done_tiles: list[int]
    segmentation: str | None
    imported_uri: str | None
    source: str | None
    thumbnail_uri: str | None


def slide_row(slide: SlideRow) -> PendingSlide:
    """Return the row of a slide for `plan_slide`, with no tile done."""
    return {
        "slide_id": slide.slide_id,
        "uri": slide.uri,
        "mpp": slide.mpp,
        "mpp_error": slide.mpp_error,
        "mpp_confirmed": slide.mpp_confirmed,
        "done_tiles": [],
        "segmentation": slide.columns.get("segmentation"),
        "imported_uri": None,
        "source": None,
        "thumbnail_uri": None,
    }


class AttemptedSlide(PendingSlide, Outcome):
    """A slide while it is planned: an AttemptedRow, too.

    Attributes:
        tile_id: -1.
    """

    tile_id: int


class CropSlide(TypedDict):
    """A slide whose crops are to be made.

    Attributes:
        slide_id: The slide.
        uri: Its file.
        mpp: um per level-0 px.
        read_mpp: um per px at which its cells were found.
        source: Source in its record; None in records of earlier releases.
    """

    slide_id: str
    uri: str
    mpp: float
    read_mpp: float
    source: str | None


class AttemptedCropSlide(CropSlide, Outcome):
    """A slide while its crops are made: an AttemptedRow, too.

    Attributes:
        tile_id: -1.
    """

    tile_id: int


class TileBoxes(TypedDict, total=False):
    """A tile's core, and the box that is read for it: left, top, width and height in level-0 px."""

    core_x0: int
    core_y0: int
    core_w0: int
    core_h0: int
    read_x0: int
    read_y0: int
    read_w0: int
    read_h0: int


class TileRow(AttemptedRow, TileBoxes, total=False):
    """A tile on its way from plan to receipt.

    A slide without tiles is one row, with tile_id -1 and num_tiles 0. It has no boxes, and neither
    mpp nor size if the slide could not be opened.

    Attributes:
        num_tiles: Tiles of the slide; 0 if it has none.
        uri: The slide's file.
        mpp: um per level-0 px.
        read_mpp: um per px read.
        width0: Width of the slide in level-0 px.
        height0: Height of the slide in level-0 px.
        imported: File of the slide's imported nuclei, sorted by tile.
        source: What the tile is read from, see stages/slide_source.py.
        queued_at: Time at which the row left for another process, in seconds of the Unix epoch.
        waited_s: Seconds that the row has lain between processes, by their clocks.
        frame: Place of the pixels read on the slide.
        image: Pixels, RGB uint8 [H, W, 3].
        maps: Packed maps of the segmenting network, uint32 [H, W].
        tokens: Tokens of the segmenting network, float16 [H / 16, W / 16, D].
        boxes: Bounding boxes of the nuclei in px of the tile, int [N, 4].
        crops: Crops of the nuclei, uint8 [N, 48, 48, 3].
        cells: Nuclei as rows of a shard.
        num_cells: Nuclei written.
        shard: File of the shard that holds them.
        shard_row: Their first row in the shard.
    """

    num_tiles: Required[int]
    uri: Required[str]
    mpp: float
    read_mpp: float
    width0: int
    height0: int
    imported: str
    source: str
    queued_at: float
    waited_s: float
    frame: Frame
    image: NDArray[np.uint8]
    maps: NDArray[np.uint32]
    tokens: NDArray[np.float16]
    boxes: NDArray[np.integer]
    crops: NDArray[np.uint8]
    cells: pa.Table
    num_cells: int
    shard: str
    shard_row: int
