"""The stages of the pass over the pixels: which ones a run needs, and how a worker makes them.

A stage is a plain callable on rows, one row per tile. pipelines/receipts.py chains the stages, in
one CPU actor or over CPU and GPU actors. A plain loop over them gives the same tables. A row with
an error passes through unchanged: an error is a value, not an exception that stops the cohort.

Each stage is imported where it runs. Workers that start on few cores wait for every library that
they load. Loading torch takes seconds and half a gigabyte, and only networks need it.
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
# The last stage returns RECEIPTS; all stages before it return rows.
Stage = Callable[[list[TileRow]], list[TileRow] | pa.Table]


def make_stage(name: str, spec: CellsSpec, run: RunFolder, *, on_gpu: bool) -> Stage:
    """Return a stage of the pipeline, by its name in `stage_groups`."""
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
    """Return the stages that a run needs, grouped by actor.

    With GPUs the networks have actors of their own. Writing shares an actor with the stage before,
    since it takes little time.
    """
    network = spec.segmenter == "cellvit"
    embed = spec.encoder != "none"
    names = ("read", *["network"] * network, "find", *["embed"] * embed, "write")
    if not gpus:
        return [names]
    groups = [("read",), ("network",), ("find",)] if network else [("read", "find")]
    last = ("embed", "write") if embed else ("write",)
    return [*groups, last] if embed else [*groups[:-1], (*groups[-1], *last)]
