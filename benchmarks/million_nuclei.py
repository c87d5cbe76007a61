"""Process simulated slides of up to a million nuclei from a network's maps to compacted CELLS.

    python benchmarks/million_nuclei.py [--nuclei 100000 300000 1000000] [--json FILE]

For every tile of 1024 px a simulation makes nuclei from a seed, and the maps that a network would
give. Its time is not counted. The rest is the unchanged pipeline: Ray Data actors find nuclei and
write shards, the driver logs receipts, a task settles seams and compacts. Memory is that of all
processes together; shared pages count once. If no step grows faster than the slide, seconds per
nucleus stay the same.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
import ray.data
import shapely
from measuring import peak_memory
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.core.geometry import Box
from scellst_ray.core.version import __version__
from scellst_ray.pipelines.driver import Driver
from scellst_ray.pipelines.progress import Progress
from scellst_ray.pipelines.session import ray_session
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.records import SlideRecord
from scellst_ray.slides.reader import box_frame
from scellst_ray.stages.find import FindNuclei
from scellst_ray.stages.tiles import box_of
from scellst_ray.stages.write import WriteShards

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support import true_tiles

CORE_PX, HALO_PX, PITCH_PX = 960, 32, 46
MPP = 0.25
TURNS = np.linspace(0, 2 * np.pi, 33)[:-1]


def main() -> None:
    """Run every size, print the figures and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nuclei", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = sys.path[0]  # workers import from there, too
    rows = []
    for num in options.nuclei:
        rows.append(measure(num, options.workers))
        print(json.dumps(rows[-1]), flush=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "ray": ray.__version__}
    result = {"slides": rows, "machine": machine, "scellst_ray": __version__}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(num_nuclei: int, workers: int) -> dict[str, Any]:
    """Run one slide of about `num` nuclei and return its figures."""
    columns = max(1, round((num_nuclei * PITCH_PX**2) ** 0.5 / CORE_PX))
    with tempfile.TemporaryDirectory() as folder, ray_session(num_cpus=workers):
        run = RunFolder(folder, "bench")
        driver = Driver(run, Progress(1), lambda _: None)
        rows = true_tiles.square_of_tiles(true_tiles.truth_spec(CORE_PX, HALO_PX), columns)
        tiles = pa.Table.from_pylist(rows, schema=schemas.TILES)
        # Blocks are small as in the planner: each goes to one worker.
        blocks = [tiles.slice(start, 8) for start in range(0, len(tiles), 8)]
        dataset = ray.data.from_arrow(blocks).map_batches(
            SimulateAndFind,
            fn_constructor_kwargs={"run": run, "columns": columns},
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            batch_size=2,
            batch_format="pyarrow",
        )
        children = [p.pid for p in psutil.Process().children(recursive=True)]
        started = time.monotonic()
        with peak_memory(children) as peak:
            driver.consume(dataset)
            consumed = time.monotonic()
            driver.finish()
            finished = time.monotonic()
        (record,) = driver.progress.records.values()
        receipts = run.receipts()
        cells = storage.read_table(run.cells_uri("s"), ["cell_id"])
        return summary(record, receipts, len(cells), grid_side(columns) ** 2) | {
            "wall_s": round(finished - started, 1),
            "compaction_s": round(finished - consumed, 2),
            "peak_gib": round(peak() / 2**30, 2),
        }


def summary(
    record: SlideRecord, receipts: pa.Table, num_cells: int, expected: int
) -> dict[str, Any]:
    """Return counts, and CPU seconds per thousand nuclei by stage."""
    assert record["status"] == "done", record
    per_thousand = {
        stage: round(1e3 * record["seconds"][stage] / num_cells, 4)
        for stage in ("segment", "crop", "write")
    }
    return {
        "nuclei": expected,
        "cells": num_cells,
        "tiles": len(receipts),
        "seams": record["seams"],
        "worker_s_per_thousand": per_thousand,
    }


def grid_side(columns: int) -> int:
    """Return the number of nuclei in a row of the slide."""
    return columns * CORE_PX // PITCH_PX


def nuclei_near(box: Box, columns: int) -> tuple[NDArray[np.object_], NDArray[np.int64]]:
    """Return outlines and types of the nuclei in a box; all tiles get the same nuclei.

    Each place of a grid has a nucleus. Noise that depends on its row moves, stretches and turns it.
    """
    side = grid_side(columns)
    first = [max(0, start // PITCH_PX - 1) for start in (box.x0, box.y0)]
    end = [min(side, (start + box.w0) // PITCH_PX + 2) for start in (box.x0, box.y0)]
    column = np.arange(first[0], end[0])
    parts = []
    for row in range(first[1], end[1]):
        noise = np.random.default_rng(row).random((side, 6))[column]
        places = np.stack([column, np.full(len(column), row)], axis=1)
        parts.append(np.hstack([(places + 0.5) * PITCH_PX + 12 * noise[:, :2] - 6, noise[:, 2:]]))
    drawn = np.concatenate(parts)
    centre, axes, turn = drawn[:, :2], 7 + 9 * drawn[:, 2:4], np.pi * drawn[:, 4, None]
    x, y = axes[:, :1] * np.cos(TURNS), axes[:, 1:] * np.sin(TURNS)
    turned = np.stack(
        [x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], axis=2
    )
    return shapely.polygons(centre[:, None] + turned), (1 + 5 * drawn[:, 5]).astype(np.int64)


class SimulateAndFind:
    """A worker that makes maps of simulated nuclei and then runs the pipeline's own stages."""

    def __init__(self, run: RunFolder, columns: int) -> None:
        """Make the worker's stages."""
        self.spec = true_tiles.truth_spec(CORE_PX, HALO_PX)
        self.find, self.write, self.columns = FindNuclei(self.spec), WriteShards(run), columns

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the receipts of tiles."""
        rows = batch.to_pylist()
        for row in rows:
            read = box_of(row, "read")
            row["frame"] = box_frame(read, row["read_mpp"] / row["mpp"])
            truth = true_tiles.Truth(
                *nuclei_near(read.grow(true_tiles.CONTEXT_PX), self.columns), jitter=1.0
            )
            row["maps"] = truth.maps(row, self.spec.side_px)
        return self.write(self.find(rows))


if __name__ == "__main__":
    main()
