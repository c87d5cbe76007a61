"""TILES: from a slide to the boxes of its tiles. Only a view of low magnification is read."""

import hashlib
import json
import logging

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core.geometry import Frame
from scellst_ray.nuclei.imported.table import REPORT_KEY, import_report
from scellst_ray.nuclei.imported.tiles import check_within, publish_by_tile, read_segmentation
from scellst_ray.runs.thumbnails import Origin, publish_thumbnail
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.source import ChangedFileError, open_slide
from scellst_ray.slides.tiling import (
    Tile,
    default_read_mpp,
    network_read_mpp,
    plan_tiles,
    tile_edges,
)
from scellst_ray.slides.tissue import TISSUE_MPP, tissue_mask
from scellst_ray.stages.rows import PendingSlide, TileRow
from scellst_ray.stages.slide_source import source_of
from scellst_ray.stages.tiles import CellsSpec, box_columns, guarded
from scellst_ray.storage.fingerprint import Fingerprint, fingerprint_of, look
from scellst_ray.storage.node_cache import hold

logger = logging.getLogger(__name__)


def plan_slide(row: PendingSlide, spec: CellsSpec) -> list[TileRow]:
    """Plan a slide's tiles.

    Args:
        row: The slide.
        spec: Settings of the computation.

    Returns:
        One row per tile that still needs work. A slide that cannot be opened, or has no tissue or
        no imported nucleus, is a single row with tile_id -1 and num_tiles 0.
    """
    nothing: TileRow = {
        "slide_id": row["slide_id"],
        "tile_id": -1,
        "num_tiles": 0,
        "uri": row["uri"],
    }
    rows: list[TileRow] = []
    with guarded(nothing, "plan"):
        if row["mpp_error"]:
            raise ValueError(row["mpp_error"])
        with open_slide(row["uri"], row["mpp"]) as opened:
            slide = opened.slide
            for note in check_slide(slide, row):
                logger.warning("%s", note)
            read_mpp = _read_mpp(slide, spec)
            nothing["mpp"], nothing["read_mpp"] = slide.mpp, read_mpp
            nothing["width0"], nothing["height0"] = slide.width0, slide.height0
            if spec.segmenter == "imported":
                mark, nothing["imported"], tiles = _plan_imported(slide, read_mpp, row, spec)
                image = _overview(slide)[0] if row.get("thumbnail_uri") else None
                nothing["source"] = source_of(row, spec, opened.fingerprint, mark)
            else:
                nothing["source"] = source_of(row, spec, opened.fingerprint, None)
                tiles, image = _tiles_of_tissue(slide, read_mpp, spec)
            opened.check()
        _keep_thumbnail(row.get("thumbnail_uri"), image, nothing)
        done = set(row["done_tiles"]) if row["source"] == nothing["source"] else set()
        for tile in tiles:
            if tile.tile_id not in done:
                boxes = box_columns(tile.core, tile.read)
                ids = (tile.tile_id, len(tiles))
                rows.append({**nothing, **boxes, "tile_id": ids[0], "num_tiles": ids[1]})
    rows = rows or [nothing]
    rows[-1]["seconds_plan"] = nothing["seconds_plan"]
    return rows


def check_slide(slide: Slide, row: PendingSlide) -> list[str]:
    """Check what only a look at the pixels, or the manifest's row, can tell about a slide.

    Returns:
        One line for each doubt that does not stop the slide.

    Raises:
        ValueError: the slide must not be used; the message says why.
    """
    notes = slide.check_resolution(confirmed=bool(row.get("mpp_confirmed")))
    slide.check_content()
    return notes


def _read_mpp(slide: Slide, spec: CellsSpec) -> float:
    if spec.segmenter == "cellvit":
        wanted = network_read_mpp(slide.mpp, slide.uri)
        return spec.read_mpp or wanted
    return spec.read_mpp or default_read_mpp(slide.mpp)


def _overview(slide: Slide) -> tuple[NDArray[np.uint8], Frame]:
    return slide.overview(max(TISSUE_MPP, slide.mpp))


def _keep_thumbnail(uri: str | None, image: NDArray[np.uint8] | None, planned: TileRow) -> None:
    """Keep a view of the whole slide for reports. Without it they lack a picture, nothing else."""
    if uri is None or image is None:
        return
    ratio = max(TISSUE_MPP / planned["mpp"], 1.0)
    about: Origin = {"slide_id": planned["slide_id"], "source": planned["source"], "ratio": ratio}
    try:
        publish_thumbnail(uri, image, about)
    except OSError as error:
        logger.warning("slide %s: its thumbnail was not kept: %s", planned["slide_id"], error)


def _tiles_of_tissue(
    slide: Slide, read_mpp: float, spec: CellsSpec
) -> tuple[list[Tile], NDArray[np.uint8]]:
    """Return the tiles that touch tissue, and the view in which it was found."""
    image, frame = _overview(slide)
    mask = tissue_mask(image, max(TISSUE_MPP, slide.mpp))
    if not mask.any():
        slide.check_overview(image)
    size0, ratio = (slide.width0, slide.height0), read_mpp / slide.mpp
    return plan_tiles(size0, ratio, mask, frame, spec.core_px, spec.halo_px), image


def _plan_imported(
    slide: Slide, read_mpp: float, row: PendingSlide, spec: CellsSpec
) -> tuple[Fingerprint, str, list[Tile]]:
    """Sort a slide's imported nuclei by tile.

    Returns:
        Fingerprint of their file, the file sorted by tile, and the tiles that have nuclei. The
        slide's tissue is not looked for: the segmentation decided which nuclei count.

    Raises:
        ValueError: the manifest names no file of imported nuclei, or it cannot be used.
        OSError: the file cannot be read.
    """
    segmentation, folder = row["segmentation"], row["imported_uri"]
    if not segmentation or folder is None:
        message = f"slide {row['slide_id']!r}: the manifest names no file in column segmentation"
        raise ValueError(message)
    size0, ratio = (slide.width0, slide.height0), read_mpp / slide.mpp
    with hold(segmentation) as held:
        mark = held.mark or fingerprint_of(look(held.path))
        by_tile = storage.join(folder, _imported_name(mark, row["mpp"], spec))
        if not storage.exists(by_tile):
            table = read_segmentation(held.path, held.name)
            table = check_within(table, *size0, held.name, slide.mpp)
            if held.mark is None and fingerprint_of(look(held.path)) != mark:
                message = f"{held.name}: the file changed while it was read; run the same command"
                raise ChangedFileError(message + " again")
            edges_x, edges_y = map(np.array, tile_edges(size0, ratio, spec.core_px))
            publish_by_tile(_note_fingerprint(table, mark), edges_x, edges_y, by_tile)
    for uri in storage.list_files(folder):
        if uri != by_tile:  # made of another file, or for other tiles
            storage.remove_tree(uri)
    wanted = set(storage.read_table(by_tile, ["tile_id"])["tile_id"].to_pylist())
    everywhere, frame = np.ones((1, 1), np.bool_), Frame(0.0, 0.0, *map(float, size0))
    tiles = plan_tiles(size0, ratio, everywhere, frame, spec.core_px, spec.halo_px)
    return mark, by_tile, [tile for tile in tiles if tile.tile_id in wanted]


def _note_fingerprint(table: pa.Table, mark: Fingerprint) -> pa.Table:
    """Add the fingerprint of the file to the report of imported nuclei, for the slide's record."""
    report = json.dumps(import_report(table) | {"fingerprint": str(mark)})
    return table.replace_schema_metadata({REPORT_KEY: report.encode()})


def _imported_name(mark: Fingerprint, mpp: float | None, spec: CellsSpec) -> str:
    """Return the file name of a slide's imported nuclei sorted by tile.

    The name is a hash of file, resolution and tile size: if any changes, the table is made again.
    """
    made_of = (str(mark), mpp, spec.read_mpp, spec.core_px)
    return f"{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.parquet"
