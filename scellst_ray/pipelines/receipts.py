"""RECEIPTS: the Ray Data pipeline from slides still to do to one receipt per tile.

    slides -> plan -> [read, segment, crop] -> [embed, head] -> [write] -> receipts

On CPUs the bracketed stages are fused in one actor, so pixels never cross a process; with GPUs
the middle one has actors of its own.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext

from scellst_ray.pipelines.packing import pack, unpack
from scellst_ray.pipelines.stages import Embed, Segment, WriteShards
from scellst_ray.pipelines.tiles import CellsSpec, PlanTiles
from scellst_ray.runs import RunFolder
from scellst_ray.session import Cluster

TILE_ROW_BYTES = 250


@dataclass(frozen=True)
class Resources:
    """What the workers may use; nothing here changes results.

    Attributes:
        workers: Actors per stage; None: as many as CPUs and memory allow, or one per GPU.
        gpus: Whether to embed on GPUs; None: if there are any.
        memory_gb: Memory each worker declares.
        tiles_per_task: Tiles a worker takes at a time.
    """

    workers: int | None
    gpus: bool | None
    memory_gb: float
    tiles_per_task: int


def receipts_dataset(
    rows: list[dict[str, Any]],
    spec: CellsSpec,
    run: RunFolder,
    resources: Resources,
    cluster: Cluster,
) -> ray.data.Dataset:
    """Build the lazy pipeline from slides still to do to RECEIPTS.

    Args:
        rows: One dict per slide, as `plan_slide` takes it.
        spec: What to compute.
        run: Where to write.
        resources: What the workers may use.
        cluster: What there is.
    """
    _set_context(resources.tiles_per_task)
    tiles = ray.data.from_arrow([_slide_table(row) for row in rows]).map_batches(
        PlanTiles,
        fn_constructor_kwargs={"spec": spec},
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=max(1, cluster.num_cpus // 8)),
        # No CPU slot: the workers hold them all, and planning would wait for one for ever.
        num_cpus=0,
    )
    memory = int(resources.memory_gb * 2**30)
    # More workers than memory holds would wait for ever, too.
    fitting = max(1, min(cluster.num_cpus, cluster.memory // memory))
    gpus = cluster.num_gpus > 0 if resources.gpus is None else resources.gpus
    if not gpus:
        return tiles.map_batches(
            _AllStages,
            fn_constructor_kwargs={"spec": spec, "run": run},
            compute=ActorPoolStrategy(size=resources.workers or fitting),
            num_cpus=1,
            memory=memory,
            batch_size=resources.tiles_per_task,
            batch_format="pyarrow",
        )
    num_gpus = resources.workers or max(1, cluster.num_gpus)
    nuclei = tiles.map_batches(
        _SegmentBatch,
        fn_constructor_kwargs={"spec": spec},
        compute=ActorPoolStrategy(min_size=1, max_size=max(1, fitting - num_gpus)),
        num_cpus=1,
        memory=memory,
        batch_size=resources.tiles_per_task,
        batch_format="pyarrow",
    )
    return nuclei.map_batches(
        _EmbedAndWrite,
        fn_constructor_kwargs={"spec": spec, "run": run},
        compute=ActorPoolStrategy(size=num_gpus),
        num_cpus=1,
        num_gpus=1,
        memory=memory,
        batch_size=resources.tiles_per_task,
        batch_format="pyarrow",
    )


def _set_context(tiles_per_task: int) -> None:
    """Set what Ray Data takes from its context and not from arguments."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # A slide's tiles must leave the planner in small blocks, or one worker would get them all.
    context.target_max_block_size = TILE_ROW_BYTES * tiles_per_task
    context.execution_options.preserve_order = False
    # A block of dense tiles can take half an hour on a slow CPU: silence is not a fault.
    context.execution_no_progress_timeout_s = -1
    # Said of every slide smaller than the pool.
    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")


def _slide_table(row: dict[str, Any]) -> pa.Table:
    done = pa.array([row["done_tiles"]], pa.list_(pa.int64()))
    mpp = pa.array([row["mpp"]], pa.float64())
    texts = {n: pa.array([row[n]], pa.string()) for n in ("slide_id", "uri", "mpp_error")}
    return pa.table(texts | {"mpp": mpp, "done_tiles": done})


class _AllStages:
    """The three stages in one actor: what a CPU worker does with a batch of tiles."""

    def __init__(self, spec: CellsSpec, run: RunFolder) -> None:
        self.stages = Segment(spec), Embed(spec, "cpu"), WriteShards(run)

    def __call__(self, batch: pa.Table) -> pa.Table:
        segment, embed, write = self.stages
        return write(embed(segment(batch.to_pylist())))


class _SegmentBatch:
    def __init__(self, spec: CellsSpec) -> None:
        self.segment = Segment(spec)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pack(self.segment(batch.to_pylist()))


class _EmbedAndWrite:
    def __init__(self, spec: CellsSpec, run: RunFolder) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.embed, self.write = Embed(spec, device), WriteShards(run)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.write(self.embed(unpack(batch)))
