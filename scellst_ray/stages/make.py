"""The stages of the pass over the pixels: which a run needs, and how a worker makes them.

Plain callables on rows, one dict per tile, from tile to receipt. pipelines/receipts.py strings them
together, fused in one CPU actor or spread over CPU and GPU actors, and a plain loop over them gives
the same tables. A row that carries an error passes through untouched: an error is a value, never an
exception that stops the cohort.

Each is imported where it runs: a hundred workers that start on few cores wait for every library
they load, and torch takes seconds and half a gigabyte, which readers beside a GPU need not.
"""
# ruff: noqa: PLC0415 - see above

from collections.abc import Callable

import pyarrow as pa

from scellst_ray.models import device
from scellst_ray.runs.folder import RunFolder
from scellst_ray.stages.rows import TileRow
from scellst_ray.stages.tiles import CellsSpec

# Raised whenever a segmenter's results change: part of every run's digest.
SEGMENTER_VERSIONS = {"hematoxylin": 2, "cellvit": 1, "imported": 1}
NETWORKS = ("network", "embed")
# The last stage returns RECEIPTS, the others rows.
Stage = Callable[[list[TileRow]], list[TileRow] | pa.Table]


def make_stage(name: str, spec: CellsSpec, run: RunFolder, *, on_gpu: bool) -> Stage:
    """Return one stage of the pipeline, by its name, as `stage_groups` gives it."""
    if name == "read":
        from scellst_ray.stages.read import Read

        return Read(spec)
    if name == "find":
        from scellst_ray.stages.find import FindNuclei

        return FindNuclei(spec)
    if name == "write":
        from scellst_ray.stages.write import WriteShards

        return WriteShards(run)
    from scellst_ray.stages.networks import Embed, Network

    worker_device = device.device_of_worker(on_gpu=on_gpu)
    return Network(spec, worker_device) if name == "network" else Embed(spec, worker_device)


def stage_groups(spec: CellsSpec, *, gpus: bool) -> list[tuple[str, ...]]:
    """Return which stages a run needs, those of one actor together.

    With GPUs the networks are split from the rest, but for the writing, which needs next to
    nothing.
    """
    network = spec.segmenter == "cellvit"
    embed = spec.encoder != "none"
    names = ("read", *["network"] * network, "find", *["embed"] * embed, "write")
    if not gpus:
        return [names]
    groups = [("read",), ("network",), ("find",)] if network else [("read", "find")]
    last = ("embed", "write") if embed else ("write",)
    return [*groups, last] if embed else [*groups[:-1], (*groups[-1], *last)]
