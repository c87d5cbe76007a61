"""Measure the control plane: cohorts of up to a million tiles with stages that do nothing.

    python benchmarks/control_plane.py [--slides 100 1000 10000] [--json FILE]

The pipeline runs unchanged from the rows of the manifest to the records: planning tasks, attempts,
blocks between stages, shards, receipts log, compaction, lease. Only stages that read pixels are
replaced. A slide's size is a function of its name (100 tiles on average), and each tile has two
nuclei. Every cohort runs in its own process, whose memory is sampled every 2 seconds. A second run
of the last cohort is killed (SIGKILL) when half of the slides have a record. It is then started
again.
"""

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import ray
import shapely

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
from scellst_ray.slides.tiling import tile_edges
from scellst_ray.stages.checked_networks import CheckedNetworks
from scellst_ray.stages.config import ExtractConfig
from scellst_ray.stages.make import make_stage
from scellst_ray.stages.rows import PendingSlide, TileRow
from scellst_ray.stages.tiles import MAX_CELLS_PER_TILE, CellsSpec, box_columns, todo

CORE_PX, HALO_PX, MPP = 960, 32, 0.25
SIDES = (8, 10, 12)
CELLS_PER_TILE = 2
SAMPLE_EVERY_S = 2.0
IDLE = "other workers of Ray"
PARTS = {
    "PlanTiles": "planner",
    "Stages": "workers",
    "Finisher": "finishing",
    "raylet": "raylet",
    "gcs_server": "gcs",
    "IDLE": IDLE,
}
OUTLINE = shapely.to_wkb(shapely.box(0, 0, 20, 20))


def main() -> None:
    """Run every size, print the figures and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--slides", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--tiles-per-task", type=int, default=4000)
    parser.add_argument("--no-resume", action="store_true", help="leave out the killed run")
    parser.add_argument("--cohort", help="run one cohort in this folder (for internal use)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cohort:
        print(json.dumps(one_run(options.cohort, options.slides[0], options.tiles_per_task)))
        return
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "ray": ray.__version__}
    result: dict[str, Any] = {"scellst_ray": __version__, "machine": machine, "cohorts": []}
    for num_slides in options.slides:
        with tempfile.TemporaryDirectory() as folder:
            found = finished(start(folder, num_slides, options.tiles_per_task))
            result["cohorts"].append(found | checked(folder, num_slides))
        print(json.dumps(result["cohorts"][-1]), flush=True)
    if not options.no_resume:
        result["resume"] = resumed(options.slides[-1], options.tiles_per_task)
        print(json.dumps(result["resume"]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def start(folder: str, num_slides: int, tiles_per_task: int) -> subprocess.Popen[str]:
    """Start one run in its own process."""
    command = [sys.executable, __file__, "--slides", str(num_slides), "--cohort", folder]
    command += ["--tiles-per-task", str(tiles_per_task)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a run and return the JSON that it printed last."""
    output, _ = process.communicate()
    assert process.returncode == 0, output
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def checked(folder: str, num_slides: int) -> dict[str, Any]:
    """Check that every cell of a run is present once; return counts of its files."""
    run = RunFolder(folder, "")
    records, receipts = run.records(), run.receipts()
    num_tiles = sum(tiles_of(number) for number in range(num_slides))
    assert len(records) == num_slides
    assert {record["status"] for record in records.values()} == {"done"}
    assert len(receipts) == num_tiles
    assert sum(r["num_cells"] for r in records.values()) == num_tiles * CELLS_PER_TILE
    for slide_id in list(records)[:: max(1, num_slides // 50)]:
        cells = storage.read_table(run.cells_uri(slide_id), ["cell_id"])["cell_id"]
        assert pc.count_distinct(cells).as_py() == len(cells) == records[slide_id]["num_cells"]
    assert not storage.exists(run.shards_uri)
    return {"log_files": len(storage.list_files(f"{folder}/receipts"))}


def resumed(num_slides: int, tiles_per_task: int) -> dict[str, Any]:
    """Kill a run when half of its slides have a record; return the figures of its resumption."""
    with tempfile.TemporaryDirectory() as folder:
        first = start(folder, num_slides, tiles_per_task)
        records = Path(folder, "records")
        while not records.is_dir() or sum(1 for _ in records.iterdir()) < num_slides / 2:
            assert first.poll() is None, "the run ended before it could be killed"
            time.sleep(0.5)
        first.send_signal(signal.SIGKILL)
        first.wait()
        before = len(list(records.iterdir()))
        found = finished(start(folder, num_slides, tiles_per_task))
        return {"records_before": before} | found | checked(folder, num_slides)


def one_run(folder: str, num_slides: int, tiles_per_task: int) -> dict[str, Any]:
    """Run a cohort; return rates, CPU seconds by part and memory over time."""
    slides = [SlideRow(f"s{number:06d}", f"{number}.svs", None) for number in range(num_slides)]
    config = ExtractConfig(
        manifest="none",
        out=folder,
        encoder="none",
        gpus=False,
        memory_gb=0.5,
        precision="float32",
        tiles_per_task=tiles_per_task,
    )
    networks = CheckedNetworks(NetworkIdentity(encoder="none", embedding_dim=None))
    watch = Watch()
    began = time.monotonic()
    run_cells("extract", config, slides, networks, watch.report, work=WorkFunctions(plan, stage))
    return watch.summary(began) | {"slides": num_slides, "tiles_per_task": tiles_per_task}


class Watch:
    """A sampler of memory and counts of this process, every 2 seconds."""

    def __init__(self) -> None:
        """Start the sampling thread."""
        self.progress: Progress | None = None
        self.first_new: float | None = None
        self.samples: list[tuple[float, int, int, int]] = []
        self.cpu_s: dict[int, tuple[str, float]] = {}
        self.cpu_s_at_start: dict[int, tuple[str, float]] = {}
        threading.Thread(target=self._sample, daemon=True).start()

    def report(self, progress: Progress) -> None:
        """Record the progress of the run."""
        if self.progress is None:
            self.tiles_before = progress.num_tiles
        self.progress = progress
        if progress.num_cells > progress.num_cells_before and self.first_new is None:
            self.first_new = time.monotonic()
            self.tiles_before = progress.num_tiles

    def _sample(self) -> None:
        me = psutil.Process()
        while True:
            p = self.progress
            counts = (0, 0) if p is None else (p.num_tiles, len(p.records))
            self.samples.append((time.monotonic(), me.memory_info().rss, *counts))
            for process in [me, *me.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    part = "driver" if process == me else part_of(process)
                    # Between two tasks a process has the name IDLE.
                    if part == IDLE and process.pid in self.cpu_s:
                        part = self.cpu_s[process.pid][0]
                    self.cpu_s[process.pid] = (part, times.user + times.system)
            if self.first_new is not None and not self.cpu_s_at_start:
                self.cpu_s_at_start = dict(self.cpu_s)
            time.sleep(SAMPLE_EVERY_S)

    def cpu_by_part(self) -> dict[str, float]:
        """Return the CPU seconds of each kind of process since the first new tiles."""
        found: dict[str, float] = {}
        for pid, (part, seconds) in self.cpu_s.items():
            before = self.cpu_s_at_start.get(pid, (part, 0.0))[1]
            found[part] = found.get(part, 0.0) + seconds - before
        return {part: round(seconds, 1) for part, seconds in sorted(found.items())}

    def summary(self, began: float) -> dict[str, Any]:
        """Return the figures of the run."""
        assert self.progress is not None
        assert self.first_new is not None
        ended = time.monotonic()
        num_tiles = self.progress.num_tiles - self.tiles_before
        cpu_s = self.cpu_by_part()
        steps = max(1, len(self.samples) // 12)
        return {
            "new_tiles": num_tiles,
            "start_s": round(self.first_new - began, 2),
            "steady_s": round(ended - self.first_new, 2),
            "tiles_per_s": round(num_tiles / (ended - self.first_new)),
            "cpu_s": cpu_s,
            "tiles_per_cpu_s": round(num_tiles / sum(cpu_s.values())),
            "driver_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "over_time": [
                {"s": round(at - began), "rss_mib": rss >> 20, "tiles": tiles, "records": records}
                for at, rss, tiles, records in self.samples[::steps]
            ],
        }


def part_of(process: psutil.Process) -> str:
    """Return the part of the system that a process of Ray belongs to."""
    title = " ".join(process.cmdline())
    found = [part for name, part in PARTS.items() if name in title]
    return found[0] if found else "rest of Ray"


def sides_of(number: int) -> tuple[int, int]:
    """Return the numbers of tiles of a slide along x and y; their product is 100 on average."""
    return SIDES[number % 3], SIDES[number // 3 % 3]


def tiles_of(number: int) -> int:
    """Return the number of tiles of a slide."""
    columns, rows = sides_of(number)
    return columns * rows


def plan(row: PendingSlide, spec: CellsSpec) -> list[TileRow]:
    """Return the tiles of a slide without opening it."""
    began = time.perf_counter()
    columns, rows = sides_of(int(row["slide_id"][1:]))
    width0, height0 = columns * CORE_PX, rows * CORE_PX
    edges_x, edges_y = tile_edges((width0, height0), 1.0, spec.core_px)
    slide: TileRow = {
        "slide_id": row["slide_id"],
        "tile_id": -1,
        "num_tiles": columns * rows,
        "uri": row["uri"],
        "mpp": MPP,
        "read_mpp": MPP,
        "width0": width0,
        "height0": height0,
    }
    done = set(row["done_tiles"])
    tiles: list[TileRow] = []
    for tile_id in range(columns * rows):
        if tile_id in done:
            continue
        x0, y0 = edges_x[tile_id % columns], edges_y[tile_id // columns]
        core = Box(x0, y0, CORE_PX, CORE_PX)
        boxes = box_columns(core, core.grow(HALO_PX))
        tiles.append({**slide, **boxes, "tile_id": tile_id})
    tiles[-1]["seconds_plan"] = time.perf_counter() - began
    return tiles


def stage(name: str, spec: CellsSpec, run: RunFolder, *, on_gpu: bool) -> Any:  # noqa: ANN401
    """Return the pipeline's own writing stage, or a stage that reads no pixel."""
    if name == "write":
        return make_stage(name, spec, run, on_gpu=on_gpu)
    return find if name == "find" else (lambda rows: rows)


def find(rows: list[TileRow]) -> list[TileRow]:
    """Add two nuclei to every tile; they are made at once, since this is not measured."""
    live = todo(rows)
    tile_id = np.repeat([row["tile_id"] for row in live], CELLS_PER_TILE)
    number = np.tile(np.arange(CELLS_PER_TILE), len(live))
    slide_ids = [row["slide_id"] for row in live for _ in range(CELLS_PER_TILE)]
    size = len(tile_id)
    columns = {
        "slide_id": slide_ids,
        "cell_id": tile_id * MAX_CELLS_PER_TILE + number,
        "x0": np.full(size, 10.0, np.float32),
        "y0": np.full(size, 10.0, np.float32),
        "area_um2": np.full(size, 25.0, np.float32),
        "nucleus_type": pa.repeat("nucleus", size),
        "type_prob": pa.nulls(size, pa.float32()),
        "polygon": pa.repeat(OUTLINE, size),
        "seam": np.zeros(size, np.uint8),
    }
    cells = pa.table(columns, schema=pa.schema(schemas.SHARD_FIELDS))
    for index, row in enumerate(live):
        row["cells"] = cells.slice(index * CELLS_PER_TILE, CELLS_PER_TILE)
        row["seconds_segment"] = 0.0
    return rows


if __name__ == "__main__":
    main()
