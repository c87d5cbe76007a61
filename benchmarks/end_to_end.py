"""Compare the throughput of the whole pipeline with a bare loop of its kernels on the same cores.

    python benchmarks/end_to_end.py [--size-um 2400] [--json results/end_to_end.json]

The benchmark makes one synthetic slide and extracts it in two ways. One is Ray Data with one worker
per core. The other is the same number of plain processes without Ray, which call the same
functions in a loop over tiles. Both are timed in the steady state, after the first receipts of
every worker. Starting Ray and loading weights happens once per run, so it is reported separately.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from measuring import peak_memory

from scellst_ray.core import schemas
from scellst_ray.core.version import __version__
from scellst_ray.pipelines.extract import OWN_WORK
from scellst_ray.pipelines.receipts import Resources, receipts_dataset
from scellst_ray.pipelines.session import ray_session
from scellst_ray.runs.folder import RunFolder
from scellst_ray.slides.synthetic.slide import SyntheticConfig, write_synthetic_slide
from scellst_ray.stages.find import FindNuclei
from scellst_ray.stages.networks import Embed
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.read import Read
from scellst_ray.stages.rows import PendingSlide, TileRow
from scellst_ray.stages.tiles import CellsSpec
from scellst_ray.stages.write import WriteShards


def main() -> None:
    """Run the benchmark and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size-um", type=float, default=2400.0, help="side of the slide in um")
    parser.add_argument("--core-px", type=int, default=480, help="side of the core of a tile in px")
    parser.add_argument("--tiles-per-task", type=int, default=2)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeat", type=int, default=2, help="number of runs of each way")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/end_to_end.json"))
    options = parser.parse_args()
    spec = CellsSpec(
        segmenter="hematoxylin",
        read_mpp=None,
        core_px=options.core_px,
        halo_px=32,
        encoder="random:0",
        precision="float32",
        head_uri=None,
        store_embeddings=True,
    )
    runs: dict[str, list[dict[str, Any]]] = {"bare_loop": [], "pipeline": []}
    with tempfile.TemporaryDirectory() as folder:
        config = SyntheticConfig(seed=0, width_um=options.size_um, height_um=options.size_um)
        slide = write_synthetic_slide(Path(folder) / "slide", config).slide
        row: PendingSlide = {
            "slide_id": "s",
            "uri": str(slide),
            "mpp": None,
            "mpp_error": None,
            "mpp_confirmed": False,
            "done_tiles": [],
            "segmentation": None,
            "imported_uri": None,
            "source": None,
            "thumbnail_uri": None,
        }
        for number in range(options.repeat):
            out = RunFolder(str(Path(folder) / f"bare{number}"), "bench")
            runs["bare_loop"].append(bare_loop(row, spec, out, options.workers))
            out = RunFolder(str(Path(folder) / f"pipeline{number}"), "bench")
            resources = Resources(
                options.workers, gpus=False, memory_gb=1.0, tiles_per_task=options.tiles_per_task
            )
            runs["pipeline"].append(pipeline(row, spec, out, resources))
    result = summary(runs) | {"options": vars(options) | {"json": str(options.json)}}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=2))


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the best result of each way, and the ratio of each pair of runs."""
    ratios = [
        ray_run["cells_per_s"] / bare["cells_per_s"]
        for bare, ray_run in zip(runs["bare_loop"], runs["pipeline"], strict=True)
    ]
    return {
        "ratio_by_pair": [round(ratio, 3) for ratio in ratios],
        "pipeline": max(runs["pipeline"], key=lambda run: float(run["cells_per_s"])),
        "bare_loop": max(runs["bare_loop"], key=lambda run: float(run["cells_per_s"])),
        "runs": runs,
        "versions": {"scellst_ray": __version__, "ray": ray.__version__, "arrow": pa.__version__},
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
    }


def bare_loop(row: PendingSlide, spec: CellsSpec, run: RunFolder, workers: int) -> dict[str, Any]:
    """Process the tiles in plain processes; a shared counter hands out the tiles."""
    tiles = plan_slide(row, spec)
    context = multiprocessing.get_context("spawn")
    ready, queue = context.Barrier(workers + 1), context.Queue()
    counter = context.Value("i", workers)
    arguments = (tiles, spec, run, ready, counter, queue)
    processes = [
        context.Process(target=_loop, args=(number, *arguments)) for number in range(workers)
    ]
    started = time.monotonic()
    for process in processes:
        process.start()
    with peak_memory([p.pid for p in processes if p.pid]) as peak:
        ready.wait()
        steady = time.monotonic()
        parts = [pa.Table.from_pylist(queue.get(), schema=schemas.RECEIPTS) for _ in processes]
        seconds = time.monotonic() - steady
    for process in processes:
        process.join()
    receipts = pa.concat_tables(parts)
    # Each process first warms up on a tile that is not counted.
    return measured(receipts, seconds, steady - started, peak())


def _loop(
    number: int,
    tiles: list[TileRow],
    spec: CellsSpec,
    run: RunFolder,
    ready: Any,  # noqa: ANN401 - multiprocessing's own types differ by context
    counter: Any,  # noqa: ANN401
    queue: Any,  # noqa: ANN401
) -> None:
    read, find, embed, write = Read(spec), FindNuclei(spec), Embed(spec, "cpu"), WriteShards(run)
    write(embed(find(read([tiles[number]]))))
    ready.wait()
    receipts = []
    while True:
        with counter.get_lock():
            index, counter.value = counter.value, counter.value + 1
        if index >= len(tiles):
            break
        receipts += write(embed(find(read([tiles[index]])))).to_pylist()
    queue.put(receipts)


def pipeline(
    row: PendingSlide, spec: CellsSpec, run: RunFolder, resources: Resources
) -> dict[str, Any]:
    """Run the Ray Data pipeline; its steady state starts with the first block of receipts."""
    started = time.monotonic()
    with ray_session(num_cpus=resources.workers) as cluster:
        dataset = receipts_dataset([row], spec, run, resources, cluster, OWN_WORK)
        me = psutil.Process()
        with peak_memory([p.pid for p in me.children(recursive=True)]) as peak:
            batches = dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            )
            arrivals = [(time.monotonic(), table) for table in map(_receipts, batches)]
    # The first block of every worker is its warm-up. Receipts after that are counted.
    warm = resources.workers or 1
    steady = arrivals[warm - 1][0]
    receipts = pa.concat_tables([table for _, table in arrivals[warm:]])
    return measured(receipts, arrivals[-1][0] - steady, steady - started, peak())


def _receipts(batch: Any) -> pa.Table:  # noqa: ANN401 - Ray's batch type is a union
    return batch.select(schemas.RECEIPTS.names)


def measured(
    receipts: pa.Table, seconds: float, start_seconds: float, peak_bytes: int
) -> dict[str, Any]:
    """Return rates computed from receipts and a time."""
    assert pc.sum(pc.is_valid(receipts["error"])).as_py() in {0, None}
    num_cells = pc.sum(receipts["num_cells"]).as_py()
    stages = {s: pc.sum(receipts[f"seconds_{s}"]).as_py() or 0.0 for s in schemas.STAGES}
    return {
        "tiles": len(receipts),
        "cells": num_cells,
        "seconds": round(seconds, 2),
        "start_seconds": round(start_seconds, 2),
        "tiles_per_s": round(len(receipts) / seconds, 3),
        "cells_per_s": round(num_cells / seconds, 2),
        "worker_seconds_by_stage": {name: round(value, 2) for name, value in stages.items()},
        "peak_memory_mib": round(peak_bytes / 2**20),
        "driver_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


if __name__ == "__main__":
    main()
