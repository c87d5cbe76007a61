"""Calibration: rates measured on a sample of tiles, with the stages of the run in this process."""

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

# Modules of higher rooms that a worker and the command import. They are imported in processes of
# their own, since preflight/ may not import them.
WORKER_MODULES = (
    "scellst_ray.pipelines.receipts",
    "scellst_ray.stages.find",
    "scellst_ray.stages.networks",
    "scellst_ray.stages.read",
    "scellst_ray.stages.write",
)
SESSION_MODULE = "scellst_ray.pipelines.session"
COMMAND_MODULES = (SESSION_MODULE, "scellst_ray.commands.cli", "scellst_ray.commands.extract")
IMPORT_MODULES = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
# The work of the command before its workers start. It joins a cluster that already runs.
START_RAY = f"""
{IMPORT_MODULES}
import os
if "RAY_ADDRESS" in os.environ:
    print("started", flush=True)
else:
    with sys.modules["{SESSION_MODULE}"].ray_session():
        print("started", flush=True)
"""


@dataclass(frozen=True)
class Sample:
    """Measurements on a sample of tiles.

    Attributes:
        rates: Measured rates, named as in `costs.DEFAULTS`.
        densities: Cells per mm2 of tissue by slide_id, for the slides of the sample.
        num_tiles: Number of tiles that had no error.
        errors: One text per tile with an error.
        share: Share of a CPU that this process got while it computed. Seconds are scaled to a
            whole CPU.
    """

    rates: dict[str, float]
    densities: dict[str, float]
    num_tiles: int
    errors: list[str]
    share: float


def calibrate(
    tiles: Iterable[SampledTile], spec: CellsSpec, tiles_per_task: int, *, on_gpu: bool
) -> Sample:
    """Measure the stages on a sample of tiles, after one task as warm-up.

    Other work on this machine must not count. A stage that only computes waits for nothing but a
    CPU. So its CPU seconds per second are the share of a CPU that it got. All seconds are scaled
    by this share.

    Args:
        tiles: Rows of TILES, sorted by slide, as `plan_slides` samples them.
        spec: Results to compute, as in the run.
        tiles_per_task: Tiles per task, as in the run.
        on_gpu: Whether networks run on this machine's GPU.

    Raises:
        ValueError: there is no tile, or all tiles failed.
    """
    of_slide = {key: list(rows) for key, rows in groupby(tiles, lambda row: str(row["slide_id"]))}
    if not of_slide:
        message = "no slide of this cohort has a tile to measure; plan without calibrate"
        raise ValueError(message)
    with tempfile.TemporaryDirectory() as folder:
        worker = _Worker(spec, RunFolder(str(Path(folder) / "run"), "plan"), on_gpu=on_gpu)
        worker.process(next(iter(of_slide.values()))[:tiles_per_task])
        worker.clocks = [0.0, 0.0]
        receipts, open_s = [], []
        for rows in of_slide.values():
            open_s.append(worker.time_open(rows[0]))
            starts = range(0, len(rows), tiles_per_task)
            receipts += [worker.process(rows[start : start + tiles_per_task]) for start in starts]
        table = pa.concat_tables(receipts)
        good = table.filter(pc.is_null(table["error"]))
        errors = [f"{row['slide_id']}: {row['error']}" for row in table.to_pylist() if row["error"]]
        if not len(good):
            message = (
                f"all {len(table)} tiles of the sample failed, the first with: {errors[0]}; plan "
                "without calibrate"
            )
            raise ValueError(message)
        sampled = {(t["slide_id"], t["tile_id"]): t for rows in of_slide.values() for t in rows}
        processed = [sampled[row["slide_id"], row["tile_id"]] for row in good.to_pylist()]
        share = min(1.0, worker.clocks[1] / worker.clocks[0])
        seconds = _stage_rates(good, processed, spec, on_gpu=on_gpu)
        seconds["open"] = sum(open_s) / len(open_s)
        rates = {name: value * share for name, value in seconds.items()}
        density, densities = _density(good, processed)
        rates |= (
            {"start": share * _time_command(), "start_worker": worker.start_s}
            | density
            | _cell_bytes(worker.run, good)
        )
    return Sample(rates, densities, len(good), errors, share)


class _Worker:
    """The stages of a worker of the run, in this process.

    Attributes:
        run: Run folder that the worker writes to.
        start_s: CPU seconds until such a worker is ready: imports and networks.
        clocks: [seconds, CPU seconds] spent in stages that only compute.
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
        command = [sys.executable, "-c", IMPORT_MODULES, *WORKER_MODULES]
        subprocess.run(command, check=True)  # noqa: S603 - constants of this module
        self.start_s = made_s + _children_s() - started
        self.clocks = [0.0, 0.0]

    def process(self, tiles: list[SampledTile]) -> pa.Table:
        """Run all stages on some tiles; return their RECEIPTS."""
        rows: Any = [dict(tile) for tile in tiles]
        for name, stage in self.stages.items():
            started = time.perf_counter(), time.process_time()
            rows = stage(rows)
            if name == "find" or (name in NETWORKS and not self.on_gpu):
                self.clocks[0] += time.perf_counter() - started[0]
                self.clocks[1] += time.process_time() - started[1]
        return rows

    def time_open(self, tile: TileRow) -> float:
        """Open the slide of a tile again; return the seconds."""
        read = self.stages["read"]
        if not isinstance(read, Read) or read.no_pixels:
            return 0.0
        outcome = Outcome()
        read.slides.drop(tile["uri"], tile["mpp"])
        with guarded(outcome, "open"):  # an error is reported with the slide's tiles
            read.slides.get(tile["uri"], tile["mpp"])
        return float(outcome["seconds_open"])


def _time_command() -> float:
    """Start Ray as a command does; return the seconds until it runs.

    Raises:
        ValueError: Ray does not start.
    """
    started = time.perf_counter()
    command = [sys.executable, "-c", START_RAY, *COMMAND_MODULES]
    with subprocess.Popen(  # noqa: S603 - constants of this module
        command, stdout=subprocess.PIPE, text=True
    ) as process:
        first_line = process.stdout.readline() if process.stdout else ""
        seconds = time.perf_counter() - started
    if first_line.strip() != "started":
        message = "Ray does not start on this machine, see above; plan without calibrate"
        raise ValueError(message)
    return seconds


def _children_s() -> float:
    """Return the CPU seconds of all ended child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _stage_rates(
    receipts: pa.Table, tiles: list[SampledTile], spec: CellsSpec, *, on_gpu: bool
) -> dict[str, float]:
    """Return the seconds per unit of work of every stage (see `costs.UNITS`)."""
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
    """Return cells per mm2 of cores and of tissue, and cells per mm2 of tissue by slide_id.

    A tile also reports nuclei in a margin around its core, so areas include this margin. The
    density of a slide is averaged with the density of all slides, which has the weight of one tile.
    """
    num_cells = receipts["num_cells"].to_numpy().astype(np.float64)
    sides_um = np.array([(t["core_w0"] * t["mpp"], t["core_h0"] * t["mpp"]) for t in tiles])
    core_um2, offered_um2 = sides_um.prod(axis=1), (sides_um + 2 * MARGIN_UM).prod(axis=1)
    per_core = {"cells_per_mm2": float(1e6 * num_cells.sum() / offered_um2.sum())}
    tissue_mm2 = np.array([tile["tissue_mm2"] or 0.0 for tile in tiles]) * offered_um2 / core_um2
    if not tissue_mm2.any():
        return per_core, {}
    density = float(num_cells.sum() / tissue_mm2.sum())
    one_mm2 = float(tissue_mm2.mean())
    slide_ids = np.array([tile["slide_id"] for tile in tiles])
    of_slide = {}
    for slide_id in np.unique(slide_ids):
        is_in = slide_ids == slide_id
        cells = float(num_cells[is_in].sum()) + density * one_mm2
        of_slide[str(slide_id)] = cells / (float(tissue_mm2[is_in].sum()) + one_mm2)
    return per_core | {"cells_per_tissue_mm2": density}, of_slide


def _cell_bytes(run: RunFolder, receipts: pa.Table) -> dict[str, float]:
    """Return the bytes per cell in the shards of the sample, including vectors."""
    written = receipts.filter(pc.is_valid(receipts["shard"]))
    num_cells = pc.sum(written["num_cells"]).as_py()
    if not num_cells:
        return {}
    uris = [run.shard_uri(name) for name in written["shard"].unique().to_pylist()]
    return {"stored_cell_bytes": sum(storage.content_size(uri) or 0 for uri in uris) / num_cells}
