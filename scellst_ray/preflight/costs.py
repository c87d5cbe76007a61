"""What a planned run takes: seconds of every stage, bytes, wall time of a cluster, and its price.

A stage's seconds are its rate times what it goes over: pixels for reading and segmenting, cells for
crops and embeddings, tiles for writing. Rates come from earlier runs, from a measured sample, or
are defaults; each keeps where it is from.

The wall time is that of a pipeline whose stages overlap: the start of Ray, that of all workers on
the CPUs that they share, and the first slide's planning, then whatever is busiest (the workers,
the CPUs with all that runs on them, the GPUs, the planners), then the last task and the last
slide's tables.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from scellst_ray.preflight.slide_plans import SlidePlan
from scellst_ray.stages.config import num_planners

DEFAULT = "default"
# One CPU core at about 3 GHz, encoder ResNet-50 in float32, CellViT-256; GPU: a data-centre card,
# half precision. Orders of magnitude to begin with: calibrate before paying for anything.
DEFAULTS: dict[str, float] = {
    "open": 0.1,  # s for each slide and worker
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
    "task": 0.02,  # s a task beside its stages: Ray's own work
    "start": 15.0,  # s from the command until Ray is there
    "start_worker": 4.0,  # CPU s until a worker works: imports, networks
    "cells_per_mm2": 1500.0,  # of tiles' cores
    "cells_per_tissue_mm2": 2500.0,
    "cell_bytes": 160.0,  # outline, place and type; vectors come on top
    "stored_cell_bytes": math.nan,  # all of it, where that is known
}
# What the seconds of a record's stage are divided by.
UNITS = {
    "read": "mpx",
    "network": "side_mpx",
    "segment": "mpx",
    "crop": "cells",
    "embed": "cells",
    "write": "tiles",
}
CROP_BYTES = 3000
# A planner and three actors of Ray Data's own start beside the workers, and load half as much.
STARTED_BESIDE = 2
# Of values as Parquet stores them compressed: float16 vectors hardly shrink.
VECTOR_BYTES = 2 * 0.95


@dataclass(frozen=True)
class Rates:
    """Seconds and bytes of a unit of work.

    Attributes:
        values: By name, as in `DEFAULTS`.
        sources: Where each is from: 'default', what was measured here, or which runs.
        densities: Cells of a mm2 of tissue of single slides, by slide_id, where something is known.
    """

    values: dict[str, float] = field(default_factory=lambda: dict(DEFAULTS))
    sources: dict[str, str] = field(default_factory=lambda: dict.fromkeys(DEFAULTS, DEFAULT))
    densities: dict[str, float] = field(default_factory=dict)

    def replaced(self, values: Mapping[str, float], source: str) -> "Rates":
        """Return these rates with others in the place of some."""
        sources = self.sources | dict.fromkeys(values, source)
        return Rates(self.values | dict(values), sources, self.densities)


@dataclass(frozen=True)
class RunShape:
    """What decides which stages there are, and what they write.

    Attributes:
        network: Whether a network segments.
        pixels: Whether tiles are read at all.
        crops: Whether embeddings are made from crops.
        embed: Whether there are embeddings.
        side_px: Side of a whole tile in px read.
        vector_dims: Numbers stored for each cell.
        tiles_per_task: Tiles a worker takes at a time.
        kept_crops: Crops kept for pretraining, at most.
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
    """What a run will have: CPUs, GPUs (0: networks on CPUs), and workers on the CPUs."""

    cpus: int
    gpus: int
    workers: int


@dataclass(frozen=True)
class Cost:
    """What is to be done on one slide, or on all.

    Attributes:
        slides: With tiles.
        tiles: Rows of TILES.
        cells: Expected.
        cpu_s: Seconds of CPU workers by stage.
        gpu_s: Seconds of GPU workers by stage.
        bytes_read: Of slides, and of shards when tables are made of them.
        bytes_written: Shards, tables and crops.
        bytes_kept: What is there in the end.
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
    """Return the work on one slide."""
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
    """Return the cells of a slide: by its tissue, where tissue and its density are known."""
    by_tissue = rates.values["cells_per_tissue_mm2"]
    if plan.tissue_mm2 is None or math.isnan(by_tissue):
        return rates.values["cells_per_mm2"] * plan.core_mm2
    return rates.densities.get(plan.slide_id, by_tissue) * plan.tissue_mm2


def total(works: Iterable[Cost], shape: RunShape) -> Cost:
    """Return the work on all slides, crops for pretraining included."""
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
    found: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = found.get(name, 0.0) + value
    return found


def wall_s(work: Cost, rates: Rates, shape: RunShape, cluster: PlannedCluster) -> float:
    """Return the seconds a cluster takes for all slides, from the command to the last record."""
    started = cluster.workers + cluster.gpus + STARTED_BESIDE
    start_s = rates.values["start_worker"] * max(1.0, started / cluster.cpus)
    start_s += rates.values["start"]
    if not work.tiles:
        return start_s + work.cpu_s.get("plan", 0.0)
    beside = ("plan", "finish")  # of processes that hold no CPU slot
    write_s = work.cpu_s["write"]
    stages_s = sum(s for name, s in work.cpu_s.items() if name not in beside)
    planners = num_planners(cluster.cpus)
    busy = [work.cpu_s["plan"] / planners, work.all_cpu_s / cluster.cpus]
    if cluster.gpus:
        # Embedding and writing are one actor's; both networks share the GPU.
        busy += [(stages_s - write_s) / cluster.workers, work.all_gpu_s / cluster.gpus]
        busy += [(work.gpu_s["embed"] + write_s) / cluster.gpus]
    else:
        busy += [stages_s / cluster.workers]
    task_s = (stages_s + work.all_gpu_s) * min(1.0, shape.tiles_per_task / work.tiles)
    last_s = task_s * (1 - 1 / max(cluster.workers, cluster.gpus, 1))
    once_s = (work.cpu_s["plan"] + work.cpu_s["finish"]) / work.slides
    return start_s + once_s + max(busy) + last_s


def used(shape: RunShape, cluster: PlannedCluster) -> list[str]:
    """Return the names of the rates that an estimate of seconds rests on."""
    gpu = "_gpu" if cluster.gpus else ""
    names = ["open", "read"] * shape.pixels + [f"network{gpu}"] * shape.network + ["segment"]
    names += ["crop"] * shape.crops + [f"embed{gpu}"] * shape.embed
    return [*names, "write", "finish", "start", "start_worker", "cells_per_mm2"]
