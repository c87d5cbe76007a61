"""Costs of a planned run: seconds of every stage, bytes, and the wall time on a cluster.

The seconds of a stage are its rate times its units of work: pixels for reading and segmenting,
cells for crops and embeddings, tiles for writing. A rate comes from earlier runs, from a measured
sample or from the defaults, and its source is kept with it.

The stages of a run overlap. So the wall time is the sum of:

- the start of Ray, and the start of all workers on the CPUs that they share,
- the planning of the first slide,
- the time of the busiest part: workers, CPUs, GPUs or planners,
- the last task, and the tables of the last slide.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from scellst_ray.preflight.slide_plans import SlidePlan
from scellst_ray.stages.config import num_planners

DEFAULT = "default"
# Rates of one CPU core at about 3 GHz, with ResNet-50 in float32 and CellViT-256. Rates named _gpu
# are those of a data-centre GPU in half precision. All are orders of magnitude.
DEFAULTS: dict[str, float] = {
    "open": 0.1,  # s per slide and worker
    "read": 0.05,  # s/Mpx
    "network": 58.0,  # s/Mpx
    "network_gpu": 0.15,
    "segment": 0.25,  # s/Mpx
    "segment_cell": 3e-4,  # s/cell
    "crop": 1e-4,  # s/cell
    "embed": 1 / 150,  # s/cell
    "embed_gpu": 1 / 5000,
    "write": 0.03,  # s/tile
    "finish": 6e-5,  # s/cell
    "finish_slide": 0.1,  # s
    "task": 0.02,  # s per task for Ray itself, on top of the stages
    "start": 15.0,  # s from the command until Ray runs
    "start_worker": 4.0,  # CPU s until a worker is ready: imports, networks
    "cells_per_mm2": 1500.0,  # cells per mm2 of the tiles' cores
    "cells_per_tissue_mm2": 2500.0,
    "cell_bytes": 160.0,  # outline, position and type of a cell, without vectors
    "stored_cell_bytes": math.nan,  # all bytes of a cell including vectors; NaN: unknown
}
# Unit of work that the seconds of each stage in a record are divided by.
UNITS = {
    "read": "mpx",
    "network": "side_mpx",
    "segment": "mpx",
    "crop": "cells",
    "embed": "cells",
    "write": "tiles",
}
CROP_BYTES = 3000
# A planner and three actors of Ray Data start with the workers. Each loads half as much as one.
STARTED_BESIDE = 2
# Bytes per number of a float16 vector in compressed Parquet, which hardly shrinks it.
VECTOR_BYTES = 2 * 0.95


@dataclass(frozen=True)
class Rates:
    """Seconds and bytes per unit of work.

    Attributes:
        values: Rates by name, as in `DEFAULTS`.
        sources: Source of each rate: 'default', a measured sample, or earlier runs.
        densities: Cells per mm2 of tissue by slide_id, for slides where it is known.
    """

    values: dict[str, float] = field(default_factory=lambda: dict(DEFAULTS))
    sources: dict[str, str] = field(default_factory=lambda: dict.fromkeys(DEFAULTS, DEFAULT))
    densities: dict[str, float] = field(default_factory=dict)

    def replaced(self, values: Mapping[str, float], source: str) -> "Rates":
        """Return these rates with some replaced by `values`, which come from `source`."""
        sources = self.sources | dict.fromkeys(values, source)
        return Rates(self.values | dict(values), sources, self.densities)


@dataclass(frozen=True)
class RunShape:
    """Settings of a run that decide its stages and the amount of data it writes.

    Attributes:
        network: Whether a network segments the tiles.
        pixels: Whether the pixels of tiles are read.
        crops: Whether embeddings are made from crops.
        embed: Whether embeddings are made.
        side_px: Side of a whole tile, halo included, in px as read.
        vector_dims: Numbers stored per cell in embedding and hidden vectors.
        tiles_per_task: Number of tiles in a task.
        kept_crops: Largest number of crops kept for pretraining.
    """

    network: bool
    pixels: bool
    crops: bool
    embed: bool
    side_px: int
    vector_dims: int
    tiles_per_task: int
    kept_crops: int = 0


@dataclass(frozen=True)
class PlannedCluster:
    """Cluster of a planned run: CPUs, GPUs (0: networks run on CPUs), and workers on the CPUs."""

    cpus: int
    gpus: int
    workers: int


@dataclass(frozen=True)
class Cost:
    """Cost of one slide, or of all slides.

    Attributes:
        slides: Number of slides with tiles.
        tiles: Number of tiles.
        cells: Expected number of cells.
        cpu_s: Seconds of CPU workers by stage.
        gpu_s: Seconds of GPU workers by stage.
        bytes_read: Bytes read of slides, and of shards when tables are made of them.
        bytes_written: Bytes written to shards, tables and crops.
        bytes_kept: Bytes that remain at the end of the run.
    """

    slides: int
    tiles: int
    cells: float
    cpu_s: dict[str, float]
    gpu_s: dict[str, float]
    bytes_read: float
    bytes_written: float
    bytes_kept: float

    @property
    def all_cpu_s(self) -> float:
        """CPU seconds of all stages."""
        return sum(self.cpu_s.values())

    @property
    def all_gpu_s(self) -> float:
        """GPU seconds of all stages."""
        return sum(self.gpu_s.values())


def work_of(plan: SlidePlan, rates: Rates, shape: RunShape, cluster: PlannedCluster) -> Cost:
    """Return the cost of one slide."""
    value, gpu = rates.values, "_gpu" if cluster.gpus else ""
    num_cells = _expected_cells(plan, rates) if plan.num_cells is None else float(plan.num_cells)
    side_mpx = plan.num_tiles * shape.side_px**2 / 1e6
    tasks = math.ceil(plan.num_tiles / shape.tiles_per_task)
    cpu_s = {"plan": plan.seconds}
    if plan.num_tiles:
        cpu_s |= {
            "open": value["open"] * min(cluster.workers, tasks) * shape.pixels,
            "read": value["read"] * plan.read_mpx * shape.pixels,
            "segment": value["segment"] * plan.read_mpx + value["segment_cell"] * num_cells,
            "crop": value["crop"] * num_cells * shape.crops,
            "write": value["write"] * plan.num_tiles,
            "task": value["task"] * tasks,
            "finish": value["finish_slide"] + value["finish"] * num_cells,
        }
    networks = {
        "network": value[f"network{gpu}"] * side_mpx * shape.network,
        "embed": value[f"embed{gpu}"] * num_cells * shape.embed,
    }
    cell_bytes = value["cell_bytes"] + VECTOR_BYTES * shape.vector_dims
    if not math.isnan(value["stored_cell_bytes"]):
        cell_bytes = value["stored_cell_bytes"]
    kept = num_cells * cell_bytes
    return Cost(
        int(plan.num_tiles > 0),
        plan.num_tiles,
        num_cells,
        cpu_s if cluster.gpus else cpu_s | networks,
        networks if cluster.gpus else {},
        bytes_read=(plan.num_bytes or 0) + kept,
        bytes_written=2 * kept,
        bytes_kept=kept,
    )


def _expected_cells(plan: SlidePlan, rates: Rates) -> float:
    """Return the expected cells of a slide: by its tissue if known, else by its tiles' cores."""
    by_tissue = rates.values["cells_per_tissue_mm2"]
    if plan.tissue_mm2 is None or math.isnan(by_tissue):
        return rates.values["cells_per_mm2"] * plan.core_mm2
    return rates.densities.get(plan.slide_id, by_tissue) * plan.tissue_mm2


def total(works: Iterable[Cost], shape: RunShape) -> Cost:
    """Return the cost of all slides, including crops for pretraining."""
    parts = list(works)
    cells = sum(work.cells for work in parts)
    crops = CROP_BYTES * min(cells, shape.kept_crops)
    written, kept = (sum(getattr(w, f"bytes_{n}") for w in parts) for n in ("written", "kept"))
    return Cost(
        sum(work.slides for work in parts),
        sum(work.tiles for work in parts),
        cells,
        sum_by_key(work.cpu_s for work in parts),
        sum_by_key(work.gpu_s for work in parts),
        sum(work.bytes_read for work in parts),
        written + crops,
        kept + crops,
    )


def sum_by_key(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add up mappings, key by key."""
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def wall_s(work: Cost, rates: Rates, shape: RunShape, cluster: PlannedCluster) -> float:
    """Return the seconds of the run on a cluster, from the command to the last record."""
    started = cluster.workers + cluster.gpus + STARTED_BESIDE
    start_s = rates.values["start_worker"] * max(1.0, started / cluster.cpus)
    start_s += rates.values["start"]
    if not work.tiles:
        return start_s + work.cpu_s.get("plan", 0.0)
    without_slot = ("plan", "finish")  # run in processes that hold no CPU slot
    write_s = work.cpu_s["write"]
    stages_s = sum(s for name, s in work.cpu_s.items() if name not in without_slot)
    planners = num_planners(cluster.cpus)
    busy = [work.cpu_s["plan"] / planners, work.all_cpu_s / cluster.cpus]
    if cluster.gpus:
        # One actor embeds and writes; both networks share the GPU.
        busy += [(stages_s - write_s) / cluster.workers, work.all_gpu_s / cluster.gpus]
        busy += [(work.gpu_s["embed"] + write_s) / cluster.gpus]
    else:
        busy += [stages_s / cluster.workers]
    task_s = (stages_s + work.all_gpu_s) * min(1.0, shape.tiles_per_task / work.tiles)
    last_s = task_s * (1 - 1 / max(cluster.workers, cluster.gpus, 1))
    once_s = (work.cpu_s["plan"] + work.cpu_s["finish"]) / work.slides
    return start_s + once_s + max(busy) + last_s


def used(shape: RunShape, cluster: PlannedCluster) -> list[str]:
    """Return the names of the rates that the estimate of seconds uses."""
    gpu = "_gpu" if cluster.gpus else ""
    names = ["open", "read"] * shape.pixels + [f"network{gpu}"] * shape.network + ["segment"]
    names += ["crop"] * shape.crops + [f"embed{gpu}"] * shape.embed
    return [*names, "write", "finish", "start", "start_worker", "cells_per_mm2"]
