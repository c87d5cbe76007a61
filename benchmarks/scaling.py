"""Measure the use of 1 to 32 simulated GPUs, also when a host is lost during the run.

    python benchmarks/scaling.py [--gpus 1 4 16 32] [--slower F] [--no-loss] [--json FILE]

The pipeline runs unchanged from the manifest to the records. Its Ray cluster is a head and nodes
with 8 GPUs and 4 CPUs each, all on this machine. Stages that read pixels sleep instead, for as
long as the real stage takes, in the processes that Ray starts for them. Two processes on one GPU
share it, as on a real GPU. Work grows with the GPUs: slides have 40 tiles on average, with
lognormal sizes. Tables between stages have a fortieth of the bytes of real pixels and maps, and so
have the object stores. Every run is its own process.

With `--slower F` all stages take F times longer, so that two cores stand for 2 F cores. They run
the processes of a whole cluster, most of which would run on other machines. The driver is one
process in both cases. `driver_cores` is the share of a core that it would take without F.
Reported seconds are real.

Tiles are planned when all actors on GPUs have started. Starting a hundred processes takes minutes
on two cores; on a real cluster it takes as long as one process. `with_start` includes that
time.
"""

import argparse
import json
import logging
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import exp
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import shapely
from gpu_time import GPU_STAGES, read_calls, summary
from ray.cluster_utils import Cluster

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.core.geometry import Box
from scellst_ray.core.version import __version__
from scellst_ray.pipelines.extract import run_cells
from scellst_ray.pipelines.progress import Progress
from scellst_ray.pipelines.receipts import WorkFunctions
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.identity import NetworkIdentity
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.stages.checked_networks import CheckedNetworks
from scellst_ray.stages.config import ExtractConfig
from scellst_ray.stages.make import make_stage
from scellst_ray.stages.rows import SECONDS_OF_STAGE, PendingSlide, TileRow
from scellst_ray.stages.tiles import MAX_CELLS_PER_TILE, CellsSpec, box_columns, todo

# Seconds per tile of 1024 px. On a T4 (assumed; most spot nodes have one): CellViT-SAM-H in half
# precision, and the embeddings of the cells. On a core: reading the tile and finding its nuclei
# (benchmarks/postprocess.py).
SECONDS = {"read": 0.1, "network": 1.6, "find": 0.15, "embed": 0.2}
PLAN_S = 1.0
# Columns that no stage after this one needs.
USED: dict[str, tuple[Literal["image", "maps", "tokens"], ...]] = {
    "read": (),
    "network": (),
    "find": ("image", "maps"),
    "embed": ("tokens",),
}
# The tiles of a GPU use 0.14 of a CPU. Real nodes have more CPUs; here each CPU is one process.
GPUS_PER_NODE, GPUS_PER_CPU = 8, 2
SLIDES_PER_GPU, TILES_PER_SLIDE, SIGMA = 4, 40, 0.8
STORE_BYTES = 256 * 2**20
# A fortieth of the real size.
IMAGE, MAPS, TOKENS = (190, 190, 3), (164, 164), (54_000,)
CELLS_PER_TILE = 25
CORE_PX, HALO_PX, MPP = 960, 32, 0.25
STEP_S = 0.05
MAX_SHARERS = 16
# All nodes share two cores, so Ray does less: it starts no idle process for each CPU, and it checks
# all processes of the machine every minute instead of every five seconds.
QUIET = {"RAY_prestart_worker_first_driver": "0", "REPORTER_UPDATE_INTERVAL_MS": "60000"}
OUTLINE = shapely.to_wkb(shapely.box(0, 0, 20, 20))


def main() -> None:
    """Run every size, print the figures and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument(
        "--slower", type=float, default=1.0, help="factor by which stages take longer"
    )
    parser.add_argument("--no-loss", action="store_true", help="no run that loses a host")
    parser.add_argument("--folder", help="one run (for internal use)")
    parser.add_argument("--lose", action="store_true", help="lose a host after half of the tiles")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.folder:
        found = one_run(Path(options.folder), options.gpus[0], options.slower, lose=options.lose)
        print(json.dumps(found))
        return
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "ray": ray.__version__}
    result: dict[str, Any] = {"scellst_ray": __version__, "machine": machine, "runs": []}
    result |= {"seconds_per_tile": SECONDS}
    cases = [(num, False) for num in options.gpus]
    cases += [] if options.no_loss else [(options.gpus[-1], True)]
    for num_gpus, lose in cases:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--gpus", str(num_gpus), "--folder", folder]
            command += ["--slower", str(options.slower), *["--lose"] * lose]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        result["runs"].append(json.loads(output.splitlines()[-1]))
        print(json.dumps(result["runs"][-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def one_run(folder: Path, num_gpus: int, slower: float, *, lose: bool) -> dict[str, Any]:
    """Run a cohort on its own cluster; return the account of its GPUs' time."""
    sizes = slide_sizes(num_gpus * SLIDES_PER_GPU)
    slides = [empty_slide(folder, number, size) for number, size in enumerate(sizes)]
    for name in ("calls", "gpus"):
        (folder / name).mkdir()
    config = ExtractConfig(
        manifest="none",
        out=str(folder / "run"),
        segmenter="cellvit",
        segmenter_weights=str(folder / "none.pth"),
        encoder="tokens",
        gpus=True,
        precision="float16",
    )
    networks = CheckedNetworks(NetworkIdentity(encoder="tokens", embedding_dim=None), ("nucleus",))
    cluster, nodes = start_cluster(num_gpus)
    lose_last = partial(cluster.remove_node, nodes[-1], allow_graceful=False)
    watch = Watch(sum(sizes), lose_last if lose else None)
    try:
        gpus = gpus_of_nodes(nodes)
        began = time.time()
        places: dict[str, Any] = {"places": folder / "gpus", "num_places": 2 * num_gpus}
        planned = partial(plan, sizes=sizes, seconds=PLAN_S * slower, **places)
        work = WorkFunctions(planned, partial(stage, folder=str(folder), slower=slower))
        run_cells("extract", config, slides, networks, watch.report, work=work)
        driver_cores = watch.cores() * slower
    finally:
        if watch.thread is not None:
            watch.thread.join()
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]
    check_complete(folder, sizes)
    gone = gpus[-GPUS_PER_NODE:] if lose else []
    lost = {gpu: watch.lost_at if gpu in gone else None for gpu in gpus}
    actors = Counter(path.name.split("-")[0] for path in (folder / "calls").iterdir())
    cohort = {"slides": len(sizes), "tiles": sum(sizes), "largest_slide": max(sizes)}
    pace = {"slower": slower, "driver_cores": round(driver_cores, 2)}
    return (
        cohort
        | pace
        | summary(read_calls(folder / "calls"), lost, began, watch.last_record)
        | {"actors": actors}
    )


def slide_sizes(num_slides: int) -> list[int]:
    """Return the number of tiles of each slide: quantiles of a lognormal distribution."""
    normal = NormalDist()
    raw = [exp(SIGMA * normal.inv_cdf((k + 0.5) / num_slides)) for k in range(num_slides)]
    return [max(1, round(TILES_PER_SLIDE * num_slides * size / sum(raw))) for size in raw]


def empty_slide(folder: Path, number: int, size: int) -> SlideRow:
    """Return a slide with an empty file of some size, since slides are sorted by their size."""
    path = folder / f"{number}.svs"
    with path.open("wb") as handle:
        handle.truncate(size * 2**20)
    return SlideRow(f"s{number:06d}", str(path), None)


def start_cluster(num_gpus: int) -> tuple[Cluster, list[Any]]:
    """Start a head without CPUs and nodes with GPUs, connect to them, and return the nodes."""
    os.environ.update(QUIET)
    cluster = Cluster()
    common: dict[str, Any] = {
        "memory": 2**40,
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
    }
    cluster.add_node(num_cpus=0, **common)
    nodes = []
    for first in range(0, num_gpus, GPUS_PER_NODE):
        num = min(GPUS_PER_NODE, num_gpus - first)
        nodes.append(cluster.add_node(num_cpus=max(1, num // GPUS_PER_CPU), num_gpus=num, **common))
    ray.init(address=cluster.address, logging_level=logging.WARNING)
    return cluster, nodes


def gpus_of_nodes(nodes: list[Any]) -> list[str]:
    """Return the name of each GPU: the id of its node and its number on the node."""
    by_socket = {node["RayletSocketName"]: node for node in ray.nodes()}  # type: ignore[no-untyped-call]
    found = [by_socket[node.raylet_socket_name] for node in nodes]
    return [f"{n['NodeID']}:{k}" for n in found for k in range(int(n["Resources"]["GPU"]))]


class Watch:
    """A watch that records the progress of a run, and acts after half of its tiles."""

    def __init__(self, num_tiles: int, at_half: Callable[[], object] | None) -> None:
        """Make the watch; a thread calls `at_half` when half of the tiles are done."""
        self.num_tiles, self.at_half = num_tiles, at_half
        self.num_records = 0
        self.last_record = 0.0
        self.lost_at: float | None = None
        self.thread: threading.Thread | None = None
        self.first: tuple[float, float] | None = None

    def cores(self) -> float:
        """Return the mean number of cores that this process has used since the first tile."""
        assert self.first is not None
        cpu_s, at = (now - then for now, then in zip(_clocks(), self.first, strict=True))
        return cpu_s / at

    def report(self, progress: Progress) -> None:
        """Record the progress of the run."""
        if progress.num_tiles and self.first is None:
            self.first = _clocks()
        if len(progress.records) > self.num_records:
            self.num_records, self.last_record = len(progress.records), time.time()
        if self.at_half and not self.lost_at and progress.num_tiles * 2 > self.num_tiles:
            self.lost_at = time.time()
            self.thread = threading.Thread(target=self.at_half)
            self.thread.start()


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.monotonic()


def plan(
    row: PendingSlide,
    spec: CellsSpec,
    sizes: list[int],
    seconds: float,
    places: Path,
    num_places: int,
) -> list[TileRow]:
    """Return the tiles of a slide without opening it, after all actors on GPUs have started."""
    while sum(1 for _ in places.glob("*.*")) < num_places:
        time.sleep(1.0)
    time.sleep(seconds)
    num_tiles = sizes[int(row["slide_id"][1:])]
    slide: TileRow = {
        "slide_id": row["slide_id"],
        "tile_id": -1,
        "num_tiles": num_tiles,
        "uri": row["uri"],
        "mpp": MPP,
        "read_mpp": MPP,
        "width0": num_tiles * CORE_PX,
        "height0": CORE_PX,
    }
    done = set(row["done_tiles"])
    tiles: list[TileRow] = []
    for tile_id in range(num_tiles):
        if tile_id not in done:
            core = Box(tile_id * CORE_PX, 0, spec.core_px, spec.core_px)
            boxes = box_columns(core, core.grow(spec.halo_px))
            tiles.append({**slide, **boxes, "tile_id": tile_id})
    tiles[-1]["seconds_plan"] = seconds
    return tiles


def stage(
    name: str, spec: CellsSpec, run: RunFolder, *, on_gpu: bool, folder: str, slower: float
) -> Any:  # noqa: ANN401
    """Return the pipeline's own writing stage, or a stage that sleeps."""
    if name == "write":
        return make_stage(name, spec, run, on_gpu=on_gpu)
    return Sleeping(name, SECONDS[name] * slower, Path(folder))


class Sleeping:
    """A stage that sleeps and returns columns of a fortieth of the size of its real results."""

    def __init__(self, name: str, seconds: float, folder: Path) -> None:
        """Open this process's file of calls, and join the processes of its GPU."""
        self.name, self.seconds = name, seconds
        context = ray.get_runtime_context()
        self.where = context.get_node_id()
        self.gpu: SharedGpu | None = None
        if name in GPU_STAGES:
            self.where += f":{ray.get_gpu_ids()[0]}"
            self.gpu = SharedGpu(folder / "gpus" / self.where)
        self.calls = (folder / "calls" / f"{name}-{uuid.uuid4().hex}").open("a", buffering=1)

    def __call__(self, rows: list[TileRow]) -> list[TileRow]:
        """Sleep for as long as these tiles take, and record the call."""
        waiting = todo(rows)
        tiles = [(row["slide_id"], row["tile_id"]) for row in waiting]
        call = {"gpu": self.where, "stage": self.name, "gpu_s": self.seconds, "tiles": tiles}
        self.calls.write(json.dumps(call | {"began": time.time()}) + "\n")
        seconds = self.seconds * len(waiting)
        if self.gpu is None:
            time.sleep(seconds)
        else:
            self.gpu.work(seconds)
        self.calls.write(json.dumps({"ended": time.time()}) + "\n")
        for row in waiting:
            _add_results(self.name, row)
            row[SECONDS_OF_STAGE["segment" if self.name == "find" else self.name]] = self.seconds
            for used in USED[self.name]:
                row.pop(used, None)
        return rows


def _add_results(name: str, row: TileRow) -> None:
    """Add the columns of a stage to a tile."""
    if name == "read":
        row["image"] = np.zeros(IMAGE, np.uint8)
    elif name == "network":
        row["maps"], row["tokens"] = np.zeros(MAPS, np.uint32), np.zeros(TOKENS, np.float16)
    elif name == "find":
        row["cells"] = _cells(row)


def _cells(row: TileRow) -> pa.Table:
    size = CELLS_PER_TILE
    columns = {
        "slide_id": pa.repeat(row["slide_id"], size),
        "cell_id": row["tile_id"] * MAX_CELLS_PER_TILE + np.arange(size),
        "x0": np.full(size, row["core_x0"] + 10, np.float32),
        "y0": np.full(size, 10, np.float32),
        "area_um2": np.full(size, 25, np.float32),
        "nucleus_type": pa.repeat("nucleus", size),
        "type_prob": pa.nulls(size, pa.float32()),
        "polygon": pa.repeat(OUTLINE, size),
        "seam": np.zeros(size, np.uint8),
    }
    return pa.table(columns, schema=pa.schema(schemas.SHARD_FIELDS))


class SharedGpu:
    """A GPU whose time is shared equally by the processes that use it at a moment."""

    def __init__(self, path: Path) -> None:
        """Join the processes of the GPU: each has a byte of a file that says whether it works."""
        place = 0
        while True:
            with suppress(FileExistsError):
                Path(f"{path}.{place}").touch(exist_ok=False)
                break
            place += 1
        self.place = place
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, mmap.PAGESIZE)
        self.works = mmap.mmap(descriptor, mmap.PAGESIZE)
        os.close(descriptor)

    def work(self, seconds: float) -> None:
        """Sleep until this process has had so much of the GPU's time, in seconds."""
        self.works[self.place] = 1
        before = time.monotonic()
        while seconds > 0:
            sharers = max(1, sum(self.works[:MAX_SHARERS]))
            time.sleep(min(STEP_S, seconds * sharers))
            now = time.monotonic()
            seconds -= (now - before) / sharers
            before = now
        self.works[self.place] = 0


def check_complete(folder: Path, sizes: list[int]) -> None:
    """Check that every tile has one receipt, and that every cell is present once."""
    run = RunFolder(str(folder / "run"), "")
    records, receipts = run.records(), run.receipts()
    assert {record["status"] for record in records.values()} == {"done"}
    found = {(r["slide_id"], r["tile_id"]) for r in receipts.to_pylist()}
    assert len(receipts) == len(found) == sum(sizes)
    for number, size in enumerate(sizes):
        cells = storage.read_table(run.cells_uri(f"s{number:06d}"), ["cell_id"])["cell_id"]
        assert pc.count_distinct(cells).as_py() == len(cells) == size * CELLS_PER_TILE


if __name__ == "__main__":
    main()
