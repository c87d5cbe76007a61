"""The tiles of every slide, before a run: headers and thumbnails only, by the run's own planning.

Imports no torch, and nothing of Ray: it runs in processes of its own, one a CPU.
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
from scellst_ray.stages.plan_slide import imported_name, plan_slide
from scellst_ray.stages.rows import Outcome, PendingSlide, TileRow
from scellst_ray.stages.tiles import CellsSpec, guarded
from scellst_ray.storage.node_cache import hold


class SampledTile(TileRow):
    """A tile of the sample.

    Attributes:
        key: Random number of the tile; the sample has the least keys.
        tissue_mm2: Area of the tissue in its core; None for imported nuclei.
    """

    key: int
    tissue_mm2: float | None


class Header(Outcome, total=False):
    """What a slide's header says: size in level-0 px, and um per level-0 px."""

    width0: int
    height0: int
    mpp: float


@dataclass(frozen=True)
class SlidePlan:
    """What a run will find to do on a slide.

    Attributes:
        slide_id: The slide.
        num_tiles: Rows of TILES it will have; 0 without tissue.
        tissue_mm2: Area of the tissue found; None for imported nuclei, where none is looked for.
        core_mm2: Area of the tiles' cores.
        read_mpx: Million px read, halos included.
        num_bytes: Of the file; None if unknown.
        num_cells: Of imported nuclei in its tiles; None where they are still to be found.
        seconds: CPU seconds of opening it and finding its tissue; with what it takes to come
            here, if it is on object storage.
        mpp: um per level-0 px.
        read_mpp: um per px read.
        width0: In level-0 px.
        height0: In level-0 px.
        error: Why it cannot be planned; it will be a failed record of the run.
        sample: Rows of some of its tiles, each with a random `key`, least keys first.
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
        slides: The manifest.
        spec: What the run computes.
        keep: Tiles of the whole cohort to sample.
        processes: That open slides at a time; None: one a CPU.
        timeout_s: Seconds a slide may take.
        report: Called with the number of slides planned so far.

    Returns:
        A plan for each; together their samples have at most `keep` tiles, every tile of the
        cohort being as likely as any other.
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


def slide_row(slide: SlideRow) -> PendingSlide:
    """Return a slide as `plan_slide` takes it, nothing of it done."""
    return {
        "slide_id": slide.slide_id,
        "uri": slide.uri,
        "mpp": slide.mpp,
        "mpp_error": slide.mpp_error,
        "done_tiles": [],
        "segmentation": slide.columns.get("segmentation"),
        "imported_uri": None,
    }


def plan_one(row: PendingSlide, spec: CellsSpec, keep: int = 0) -> SlidePlan:
    """Plan one slide, and sample its tiles: at most `keep`, each with its `tissue_mm2`."""
    started = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        if spec.segmenter == "imported" and row["segmentation"] is not None:
            name = imported_name(row["segmentation"], row["mpp"], spec)
            row = {**row, "imported_uri": storage.join(folder, name)}
        tiles = plan_slide(row, spec)
        num_cells = _imported_cells(row, tiles)
    wall_s, cpu_s = time.perf_counter() - started[0], time.process_time() - started[1]
    first = tiles[0]
    if first.get("error") is not None:
        return SlidePlan(row["slide_id"], error=f"{first['error_type']}: {first['error']}")
    tiles[-1].pop("seconds_plan")  # told as `seconds`; a receipt of the sample must not have it
    there: list[SampledTile] = [
        {
            **tile,
            "key": zlib.crc32(f"{tile['slide_id']}/{tile['tile_id']}".encode()),
            "tissue_mm2": None,
        }
        for tile in tiles
        if tile["num_tiles"]
    ]
    sample = tuple(sorted(there, key=_key)[:keep])
    outcome = Outcome()
    num_bytes, tissue_mm2 = None, None
    with guarded(outcome, "tissue"):
        num_bytes = size_of(row["uri"])
        if spec.segmenter != "imported":
            tissue_mm2 = _tissue_mm2(row, sample)
    return SlidePlan(
        row["slide_id"],
        len(there),
        tissue_mm2,
        sum(tile["core_w0"] * tile["core_h0"] for tile in there) * first["mpp"] ** 2 / 1e6,
        sum(read_mpx(tile) for tile in there),
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
    """Return what a slide's header says, or the error of opening it."""
    told: Header = {}
    with guarded(told, "open"):
        if row["mpp_error"]:
            raise ValueError(row["mpp_error"])
        with hold(row["uri"]) as held, Slide(held.path, held.name, row["mpp"]) as slide:
            told |= {"width0": slide.width0, "height0": slide.height0, "mpp": slide.mpp}
    return told


def read_mpx(tile: TileRow) -> float:
    """Return how many million px a tile reads."""
    scale = float(tile["mpp"] / tile["read_mpp"])
    return float(tile["read_w0"] * tile["read_h0"]) * scale**2 / 1e6


def _key(tile: SampledTile) -> tuple[int, str, int]:
    return tile["key"], tile["slide_id"], tile["tile_id"]


def _imported_cells(row: PendingSlide, tiles: list[TileRow]) -> int | None:
    if row["imported_uri"] is None or tiles[0].get("error") is not None:
        return None
    return len(storage.read_table(row["imported_uri"], ["tile_id"]))


def _tissue_mm2(row: PendingSlide, sample: tuple[SampledTile, ...]) -> float:
    """Return the area of a slide's tissue, as its planning sees it, and put it into the tiles."""
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
    """Yield the sampled tiles, those of a slide together, in the order of the slides."""
    for plan in plans:
        yield from plan.sample
