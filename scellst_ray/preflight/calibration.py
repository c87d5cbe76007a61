"""Rates of a short sample: some tiles of the cohort through the stages of the run, here and now."""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scellst_ray import storage
from scellst_ray.preflight.costs import UNITS
from scellst_ray.preflight.rates import split_segment
from scellst_ray.preflight.slide_plans import SampledTile, read_mpx
from scellst_ray.runs.folder import RunFolder
from scellst_ray.stages.find import MARGIN_UM
from scellst_ray.stages.make import NETWORKS, make_stage, stage_groups
from scellst_ray.stages.read import Read
from scellst_ray.stages.rows import Outcome, TileRow
from scellst_ray.stages.tiles import CellsSpec, guarded

WORKER = "from scellst_ray.pipelines import find, networks, read, receipts, write"
# What the command does before its workers start. A cluster it would join is there already.
COMMAND = """
import os, scellst_ray.commands.table
from scellst_ray.pipelines.session import ray_session
if "RAY_ADDRESS" in os.environ:
    print("there", flush=True)
else:
    with ray_session():
        print("there", flush=True)
"""


@dataclass(frozen=True)
class Sample:
    """What a sample told.

    Attributes:
        rates: As in `plan_costs.DEFAULTS`, those it tells of.
        densities: Cells of a mm2 of tissue of the slides it is of.
        num_tiles: That were worked on without an error.
        errors: Those of the others.
        share: Of a CPU that this process got while it computed; seconds are scaled to a whole one.
    """

    rates: dict[str, float]
    densities: dict[str, float]
    num_tiles: int
    errors: list[str]
    share: float


def calibrate(
    tiles: Iterable[SampledTile], spec: CellsSpec, tiles_per_task: int, *, on_gpu: bool
) -> Sample:
    """Measure the stages on a sample of tiles; the first task is done twice and counted once.

    Other work on this machine must not count. What computes waits for nothing but a CPU, so its
    CPU seconds for each second tell the share of one that was had; all seconds are scaled by it.

    Args:
        tiles: Rows of TILES, those of a slide together, as `plan_slides` samples them.
        spec: What the run computes.
        tiles_per_task: Tiles to take at a time, as the run does.
        on_gpu: Whether networks run on this machine's GPU.

    Raises:
        ValueError: there is no tile, or all failed.
    """
    of_slide = {key: list(rows) for key, rows in groupby(tiles, lambda row: str(row["slide_id"]))}
    if not of_slide:
        message = "no slide of this cohort has a tile to measure; plan without calibrate"
        raise ValueError(message)
    with tempfile.TemporaryDirectory() as folder:
        worker = _Worker(spec, RunFolder(str(Path(folder) / "run"), "plan"), on_gpu=on_gpu)
        worker.done(next(iter(of_slide.values()))[:tiles_per_task])
        worker.clocks = [0.0, 0.0]
        receipts, open_s = [], []
        for rows in of_slide.values():
            open_s.append(worker.open_s(rows[0]))
            starts = range(0, len(rows), tiles_per_task)
            receipts += [worker.done(rows[start : start + tiles_per_task]) for start in starts]
        table = pa.concat_tables(receipts)
        good = table.filter(pc.is_null(table["error"]))
        errors = [f"{row['slide_id']}: {row['error']}" for row in table.to_pylist() if row["error"]]
        if not len(good):
            message = f"none of {len(table)} tiles could be worked on; the first: {errors[0]}"
            raise ValueError(message)
        sampled = {(t["slide_id"], t["tile_id"]): t for rows in of_slide.values() for t in rows}
        done = [sampled[row["slide_id"], row["tile_id"]] for row in good.to_pylist()]
        share = min(1.0, worker.clocks[1] / worker.clocks[0])
        seconds = _seconds(good, done, spec, on_gpu=on_gpu)
        seconds["open"] = sum(open_s) / len(open_s)
        rates = {name: value * share for name, value in seconds.items()}
        density, densities = _density(good, done)
        rates |= (
            {"start": share * _command_s(), "start_worker": worker.start_s}
            | density
            | _cell_bytes(worker.run, good)
        )
    return Sample(rates, densities, len(good), errors, share)


class _Worker:
    """The stages of a worker of the run, in this process.

    Attributes:
        run: Where it writes.
        start_s: CPU seconds until such a worker can begin.
        clocks: Seconds and CPU seconds spent in stages that only compute.
    """

    def __init__(self, spec: CellsSpec, run: RunFolder, *, on_gpu: bool) -> None:
        self.run, self.on_gpu = run, on_gpu
        started = time.process_time()
        (names,) = stage_groups(spec, gpus=False)
        self.stages = {
            name: make_stage(name, spec, run, on_gpu=on_gpu and name in NETWORKS) for name in names
        }
        made_s = time.process_time() - started
        started = _children_s()
        subprocess.run([sys.executable, "-c", WORKER], check=True)  # noqa: S603 - our own words
        self.start_s = made_s + _children_s() - started
        self.clocks = [0.0, 0.0]

    def done(self, tiles: list[SampledTile]) -> pa.Table:
        """Return the RECEIPTS of some tiles."""
        rows: Any = [dict(tile) for tile in tiles]
        for name, stage in self.stages.items():
            started = time.perf_counter(), time.process_time()
            rows = stage(rows)
            if name == "find" or (name in NETWORKS and not self.on_gpu):
                self.clocks[0] += time.perf_counter() - started[0]
                self.clocks[1] += time.process_time() - started[1]
        return rows

    def open_s(self, tile: TileRow) -> float:
        """Open the slide of a tile anew; return the seconds that takes."""
        read = self.stages["read"]
        if not isinstance(read, Read) or read.no_pixels:
            return 0.0
        outcome = Outcome()
        read.slides.drop(tile["uri"], tile["mpp"])
        with guarded(outcome, "open"):  # what is wrong with it, its tiles will tell
            read.slides.get(tile["uri"], tile["mpp"])
        return float(outcome["seconds_open"])


def _command_s() -> float:
    """Return the seconds from a command until Ray is there, by starting one.

    Raises:
        ValueError: it does not start.
    """
    started = time.perf_counter()
    words = [sys.executable, "-c", COMMAND]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own words
        first = process.stdout.readline() if process.stdout else ""
        seconds = time.perf_counter() - started
    if first.strip() != "there":
        message = "Ray does not start on this machine, see above; plan without calibrate"
        raise ValueError(message)
    return seconds


def _children_s() -> float:
    """Return the CPU seconds of processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _seconds(
    receipts: pa.Table, tiles: list[SampledTile], spec: CellsSpec, *, on_gpu: bool
) -> dict[str, float]:
    """Return the seconds of a unit for every stage."""
    num_cells = receipts["num_cells"].to_numpy().astype(np.float64)
    units = {
        "tiles": np.ones(len(tiles)),
        "cells": num_cells,
        "mpx": np.array([read_mpx(tile) for tile in tiles]),
        "side_mpx": np.full(len(tiles), spec.side_px**2 / 1e6),
    }
    rates: dict[str, float] = {}
    for stage, unit in UNITS.items():
        seconds = receipts[f"seconds_{stage}"].fill_null(0.0).to_numpy().astype(np.float64)
        if seconds.any() and units[unit].any():
            name = f"{stage}_gpu" if on_gpu and stage in NETWORKS else stage
            rates[name] = float(seconds.sum() / units[unit].sum())
    segment = receipts["seconds_segment"].fill_null(0.0).to_numpy().astype(np.float64)
    return rates | split_segment(segment, units["mpx"], num_cells)


def _density(
    receipts: pa.Table, tiles: list[SampledTile]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the cells of a mm2, of cores and of tissue, and of the tissue of each slide sampled.

    A tile also offers nuclei around its core, which its neighbours offer too. A slide's own density
    counts as much as it has tiles here, that of all as much as one tile.
    """
    num_cells = receipts["num_cells"].to_numpy().astype(np.float64)
    sides_um = np.array([(t["core_w0"] * t["mpp"], t["core_h0"] * t["mpp"]) for t in tiles])
    core_um2, offered_um2 = sides_um.prod(axis=1), (sides_um + 2 * MARGIN_UM).prod(axis=1)
    found = {"cells_per_mm2": float(1e6 * num_cells.sum() / offered_um2.sum())}
    tissue_mm2 = np.array([tile["tissue_mm2"] or 0.0 for tile in tiles]) * offered_um2 / core_um2
    if not tissue_mm2.any():
        return found, {}
    density = float(num_cells.sum() / tissue_mm2.sum())
    one_mm2 = float(tissue_mm2.mean())
    slide_ids = np.array([tile["slide_id"] for tile in tiles])
    of_slide = {}
    for slide_id in np.unique(slide_ids):
        own = slide_ids == slide_id
        cells = float(num_cells[own].sum()) + density * one_mm2
        of_slide[str(slide_id)] = cells / (float(tissue_mm2[own].sum()) + one_mm2)
    return found | {"cells_per_tissue_mm2": density}, of_slide


def _cell_bytes(run: RunFolder, receipts: pa.Table) -> dict[str, float]:
    """Return the bytes of a cell in the shards of a sample, vectors included."""
    named = receipts.filter(pc.is_valid(receipts["shard"]))
    num_cells = pc.sum(named["num_cells"]).as_py()
    if not num_cells:
        return {}
    uris = [run.shard_uri(name) for name in named["shard"].unique().to_pylist()]
    return {"stored_cell_bytes": sum(storage.content_size(uri) or 0 for uri in uris) / num_cells}
