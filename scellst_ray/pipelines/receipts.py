"""RECEIPTS: the Ray Data pipeline from slides still to do to one receipt per tile.

    slides -> plan -> [read] -> [network] -> [find nuclei] -> [embed, head] -> [write] -> receipts

On CPUs the bracketed stages are fused in one actor, so pixels never cross a process; with GPUs
the networks have actors of their own. Stages that a run does not need are left out. What ends an
actor's process is kept to the tile it happened on: see pipelines/attempts.py.
"""

import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from scellst_ray.pipelines import attempts
from scellst_ray.pipelines.packing import pack, unpack
from scellst_ray.pipelines.stages import FindNuclei, Read, WriteShards
from scellst_ray.pipelines.tiles import PLANNED, CellsSpec, Row, plan_slide
from scellst_ray.runs import RunFolder
from scellst_ray.session import Cluster

logger = logging.getLogger(__name__)
# Of a row of TILES, at least, and of RECEIPTS: blocks must not hold more rows than a task takes, or
# one would do several in turn and hand back its receipts only after the last.
TILE_ROW_BYTES = 120
# Tiles a GPU gets at a time: enough for the batch of a segmenting network.
GPU_TILES = 8


@dataclass(frozen=True)
class Resources:
    """What the workers may use; nothing here changes results.

    Attributes:
        workers: Actors per stage; None: as many as CPUs and memory allow, or one per GPU.
        gpus: Whether networks run on GPUs; None: if there are any.
        memory_gb: Memory each worker declares.
        tiles_per_task: Tiles a worker takes at a time.
        network_gb: Memory the segmenting network takes on top where it runs on a CPU.
        limits: How often and how long they try.
    """

    workers: int | None
    gpus: bool | None
    memory_gb: float
    tiles_per_task: int
    network_gb: float = 0.0
    limits: attempts.Limits = field(default_factory=attempts.Limits)


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
    session = attempts.new_session(run)
    tiles = ray.data.from_arrow([_slide_table(row) for row in rows]).map_batches(
        PlanTiles,
        fn_constructor_kwargs={"spec": spec, "session": session, "limits": resources.limits},
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=max(1, cluster.num_cpus // 8)),
        # No CPU slot: the workers hold them all, and planning would wait for one for ever.
        num_cpus=0,
    )
    gpus = cluster.num_gpus > 0 if resources.gpus is None else resources.gpus
    memory = int((resources.memory_gb + (0 if gpus else resources.network_gb)) * 2**30)
    groups = stage_groups(spec, gpus=gpus)
    dataset = tiles
    for names in groups:
        place = _place(names, groups, resources.workers, cluster, memory, gpus=gpus)
        per_task = resources.tiles_per_task
        dataset = dataset.map_batches(
            Stages,
            fn_constructor_kwargs={
                "names": names,
                "spec": spec,
                "run": run,
                "on_gpu": place.num_gpus > 0,
                "session": session,
                "limits": resources.limits,
            },
            compute=place.pool,
            num_cpus=place.num_cpus,
            num_gpus=place.num_gpus or None,
            memory=memory,
            batch_size=max(per_task, GPU_TILES) if names == ("network",) else per_task,
            batch_format="pyarrow",
        )
    return dataset


class _Place(NamedTuple):
    """What a group of stages runs on: its actors, and what each of them takes."""

    pool: ActorPoolStrategy
    num_cpus: float
    num_gpus: float


def _place(
    names: tuple[str, ...],
    groups: list[tuple[str, ...]],
    workers: int | None,
    cluster: Cluster,
    memory: int,
    *,
    gpus: bool,
) -> _Place:
    """Choose the actors of one group of stages; each declares `memory` bytes.

    Raises:
        ValueError: a cluster that cannot grow does not hold the fewest actors that the groups
            need: they would wait for memory for ever, and without a word.
    """
    on_gpus = [group for group in groups if gpus and group[0] in NETWORKS]
    beside = [group for group in groups if group not in on_gpus]
    num_gpus = workers or max(1, cluster.num_gpus)
    fitting = cluster.num_fitting(memory)
    least = len(beside) + num_gpus * len(on_gpus) if gpus else workers or 1
    if fitting < least:
        message = (
            f"{least} worker(s) of {memory / 2**30:.1f} GiB are needed, and the cluster's memory "
            f"holds {fitting}; give a smaller memory_gb if they need less, fewer workers, smaller "
            "tiles (core_px), a smaller network, or nodes with more memory"
        )
        if not cluster.may_grow:
            raise ValueError(message)
        logger.warning("%s; waiting for it to grow", message)
    if not gpus:
        size = workers or max(1, min(cluster.num_cpus, fitting))
        return _Place(ActorPoolStrategy(size=size), 1, 0)
    if names in on_gpus:
        # The CPU it uses now and then is left by the others, not asked for.
        return _Place(ActorPoolStrategy(size=num_gpus), 0, 1 / len(on_gpus))
    free = min(cluster.num_cpus, fitting - num_gpus * len(on_gpus))
    share = min(1.0, cluster.num_cpus / len(beside))
    return _Place(ActorPoolStrategy(min_size=1, max_size=max(1, free - len(beside) + 1)), share, 0)


NETWORKS = ("network", "embed")
FAILED_PLAN = ("slide_id", "tile_id", "uri", "stage", "error_type", "error")


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
    names = ("slide_id", "uri", "mpp_error", "segmentation", "imported_uri")
    texts = {name: pa.array([row[name]], pa.string()) for name in names}
    return pa.table(texts | {"mpp": mpp, "done_tiles": done})


class PlanTiles:
    """Slides to TILES, a slide at a time: what Ray Data maps over the manifest."""

    def __init__(self, spec: CellsSpec, session: str, limits: attempts.Limits) -> None:
        """Plan for these settings; notes of attempts go below `session`."""
        self.spec = spec
        self.attempts = attempts.of_this_actor(session, limits.max_attempts, limits.plan_timeout_s)

    def __call__(self, batch: pa.Table) -> Iterable[pa.Table]:
        """Yield the tiles of each slide of a batch of `plan_slide` rows."""
        for row in batch.to_pylist():
            (tiles,) = self.attempts.over([row | {"tile_id": -1}], self._plan)
            yield pa.Table.from_pylist(tiles, schema=PLANNED)

    def _plan(self, rows: list[Row], begins: Callable[[str], None]) -> list[Row]:
        (row,) = rows
        if row.get("error") is not None:
            return [{"num_tiles": 0} | {name: row.get(name) for name in FAILED_PLAN}]
        begins("plan")
        return plan_slide(row, self.spec)


class Stages:
    """Some stages in one actor: what a worker does with a batch of tiles."""

    def __init__(
        self,
        names: tuple[str, ...],
        spec: CellsSpec,
        run: RunFolder,
        session: str,
        limits: attempts.Limits,
        *,
        on_gpu: bool,
    ) -> None:
        """Make the stages; notes of attempts go below `session`."""
        # First, so that it is known what ended the process before.
        self.attempts = attempts.of_this_actor(session, limits.max_attempts, limits.tile_timeout_s)
        self.stages = {name: _stage(name, spec, run, on_gpu=on_gpu) for name in names}

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Take tiles as they come from the stage before to the form the next one takes."""
        done = self.attempts.over(unpack(batch), self._run)
        if isinstance(done[0], pa.Table):
            return pa.concat_tables(done)
        return pack([row for rows in done for row in rows])

    def _run(self, rows: Any, begins: Callable[[str], None]) -> Any:  # noqa: ANN401
        """Return what the last stage makes of rows: rows, or receipts."""
        for name, stage in self.stages.items():
            # Finding nuclei is segmenting and cropping; the first is where it can go wrong.
            begins("segment" if name == "find" else name)
            rows = stage(rows)
        return rows


def _stage(name: str, spec: CellsSpec, run: RunFolder, *, on_gpu: bool) -> Callable[[Any], Any]:
    if name == "read":
        return Read(spec)
    if name == "find":
        return FindNuclei(spec)
    if name == "write":
        return WriteShards(run)
    # Imported where they run: torch takes seconds and half a gigabyte, which readers need not.
    from scellst_ray.pipelines.networks import Embed, Network, device_for  # noqa: PLC0415

    device = device_for(on_gpu=on_gpu)
    return Network(spec, device) if name == "network" else Embed(spec, device)
