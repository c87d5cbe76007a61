"""Plans of slides before a run: their tiles, from headers and thumbnails, as the run plans them.

The module imports neither torch nor Ray, since every process that plans slides imports it.
"""

import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from scellst_ray import storage
from scellst_ray.core.isolated import ProcessDeath, map_isolated
from scellst_ray.preflight.checks import size_of
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.tissue import TISSUE_MPP, tissue_mask
from scellst_ray.stages.plan_slide import check_slide, plan_slide
from scellst_ray.stages.rows import Outcome, PendingSlide, TileRow, slide_row
from scellst_ray.stages.tiles import CellsSpec, guarded
from scellst_ray.storage.node_cache import hold


class SampledTile(TileRow):
    """A sampled tile.

    Attributes:
        key: Random number of the tile; tiles with the smallest keys are sampled.
        tissue_mm2: Area of the tissue in its core; None for imported nuclei.
    """

    key: int
    tissue_mm2: float | None


class Header(Outcome, total=False):
    """Header of a slide: size in level-0 px, um per level-0 px, and lines about doubts."""

    width0: int
    height0: int
    mpp: float
    notes: list[str]


@dataclass(frozen=True)
class SlidePlan:
    """Plan of one slide.

    Attributes:
        slide_id: The slide.
        num_tiles: Number of tiles; 0 without tissue.
        tissue_mm2: Area of the tissue; None for imported nuclei, which need no tissue.
        core_mm2: Area of the tiles' cores.
        read_mpx: Million px read, including halos.
        num_bytes: Size of the file; None if unknown.
        num_cells: Number of imported nuclei in the tiles; None if nuclei are still to be found.
        seconds: CPU seconds of opening the slide and finding its tissue. For a slide on object
            storage, wall seconds, which include the transfer.
        mpp: um per level-0 px.
        read_mpp: um per px read.
        width0: Width in level-0 px.
        height0: Height in level-0 px.
        error: Error of planning the slide; the run will give it a record with status failed.
        sample: Rows of some of its tiles, sorted by their random `key`.
    """

    slide_id: str
    num_tiles: int = 0
    tissue_mm2: float | None = None
    core_mm2: float = 0.0
    read_mpx: float = 0.0
    num_bytes: int | None = None
    num_cells: int | None = None
    seconds: float = 0.0
    mpp: float | None = None
    read_mpp: float | None = None
    width0: int | None = None
    height0: int | None = None
    error: str | None = None
    sample: tuple[SampledTile, ...] = field(default=(), repr=False)


def plan_slides(
    slides: list[SlideRow],
    spec: CellsSpec,
    keep: int = 0,
    processes: int | None = None,
    timeout_s: float | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> list[SlidePlan]:
    """Plan all slides of a cohort, in the order given.

    Args:
        slides: Rows of the manifest.
        spec: Results to compute in the run.
        keep: Number of tiles of the whole cohort to sample.
        processes: Number of processes that open slides; None: one per CPU.
        timeout_s: Largest number of seconds for a slide; None: no limit.
        report: Called with the number of slides planned so far.

    Returns:
        One plan per slide. Together their samples have at most `keep` tiles, and every tile of the
        cohort has the same chance to be among them.
    """
    planned: dict[str, SlidePlan] = {}
    kept: list[SampledTile] = []
    rows = (slide_row(slide) for slide in slides)
    one = partial(plan_one, spec=spec, keep=keep)
    for row, plan in map_isolated(one, rows, processes, timeout_s):
        if isinstance(plan, ProcessDeath):
            error = f"ProcessDied: {row['uri']}: {plan.reason}"
            planned[row["slide_id"]] = SlidePlan(row["slide_id"], error=error)
        else:
            kept = sorted([*kept, *plan.sample], key=_key)[:keep]
            planned[row["slide_id"]] = replace(plan, sample=())
        report(len(planned))
    chosen: dict[str, list[SampledTile]] = {}
    for tile in kept:
        chosen.setdefault(tile["slide_id"], []).append(tile)
    ordered = (planned[slide.slide_id] for slide in slides)
    return [replace(plan, sample=tuple(chosen.get(plan.slide_id, ()))) for plan in ordered]


def plan_one(row: PendingSlide, spec: CellsSpec, keep: int = 0) -> SlidePlan:
    """Plan one slide, with a sample of at most `keep` tiles."""
    started = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        if spec.segmenter == "imported" and row["segmentation"] is not None:
            row = {**row, "imported_uri": folder}
        tiles = plan_slide(row, spec)
        num_cells = _imported_cells(tiles[0])
    wall_s, cpu_s = time.perf_counter() - started[0], time.process_time() - started[1]
    first = tiles[0]
    if first.get("error") is not None:
        return SlidePlan(row["slide_id"], error=f"{first['error_type']}: {first['error']}")
    tiles[-1].pop("seconds_plan")  # kept as SlidePlan.seconds; receipts of the sample lack it
    planned: list[SampledTile] = [
        {
            **tile,
            "key": zlib.crc32(f"{tile['slide_id']}/{tile['tile_id']}".encode()),
            "tissue_mm2": None,
        }
        for tile in tiles
        if tile["num_tiles"]
    ]
    sample = tuple(sorted(planned, key=_key)[:keep])
    outcome = Outcome()
    num_bytes, tissue_mm2 = None, None
    with guarded(outcome, "tissue"):
        num_bytes = size_of(row["uri"])
        if spec.segmenter != "imported":
            tissue_mm2 = _tissue_mm2(row, sample)
    return SlidePlan(
        row["slide_id"],
        len(planned),
        tissue_mm2,
        sum(tile["core_w0"] * tile["core_h0"] for tile in planned) * first["mpp"] ** 2 / 1e6,
        sum(read_mpx(tile) for tile in planned),
        num_bytes,
        num_cells,
        cpu_s if storage.is_local(row["uri"]) else wall_s,
        mpp=first["mpp"],
        read_mpp=first["read_mpp"],
        width0=first["width0"],
        height0=first["height0"],
        sample=sample,
    )


def header_of(row: PendingSlide) -> Header:
    """Return the header of a slide, or the error of opening it."""
    header: Header = {}
    with guarded(header, "open"):
        if row["mpp_error"]:
            raise ValueError(row["mpp_error"])
        with hold(row["uri"]) as held, Slide(held.path, held.name, row["mpp"]) as slide:
            header["notes"] = check_slide(slide, row)
            header |= {"width0": slide.width0, "height0": slide.height0, "mpp": slide.mpp}
    return header


def read_mpx(tile: TileRow) -> float:
    """Return the million px that a tile reads."""
    scale = float(tile["mpp"] / tile["read_mpp"])
    return float(tile["read_w0"] * tile["read_h0"]) * scale**2 / 1e6


def _key(tile: SampledTile) -> tuple[int, str, int]:
    return tile["key"], tile["slide_id"], tile["tile_id"]


def _imported_cells(tile: TileRow) -> int | None:
    if tile.get("imported") is None or tile.get("error") is not None:
        return None
    return len(storage.read_table(tile["imported"], ["tile_id"]))


def _tissue_mm2(row: PendingSlide, sample: tuple[SampledTile, ...]) -> float:
    """Return the area of a slide's tissue, and set `tissue_mm2` of the sampled tiles."""
    with hold(row["uri"]) as held, Slide(held.path, held.name, row["mpp"]) as slide:
        mpp = max(TISSUE_MPP, slide.mpp)
        image, frame = slide.overview(mpp)
    mask, px_mm2 = tissue_mask(image, mpp), mpp**2 / 1e6
    for tile in sample:
        start = np.array([[tile["core_x0"], tile["core_y0"]]], np.float64)
        ends = start + np.array([tile["core_w0"], tile["core_h0"]])
        corners = np.rint(frame.from_level0(np.concatenate([start, ends]))).astype(int)
        (left, top), (right, bottom) = corners
        tile["tissue_mm2"] = float(mask[top:bottom, left:right].sum()) * px_mm2
    return float(mask.sum()) * px_mm2


def by_slide(plans: list[SlidePlan]) -> Iterator[SampledTile]:
    """Yield the sampled tiles slide by slide, in the order of the plans."""
    for plan in plans:
        yield from plan.sample
