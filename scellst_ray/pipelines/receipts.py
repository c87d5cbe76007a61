"""RECEIPTS: the Ray Data pipeline from slides still to do to one receipt per tile.

    slides -> plan -> [read] -> [network] -> [find nuclei] -> [embed, head] -> [write] -> receipts

On CPUs the bracketed stages are fused in one actor, so pixels never cross a process; with GPUs
the networks have actors of their own. Stages that a run does not need are left out. What ends an
actor's process is kept to the tile it happened on: see pipelines/attempts.py.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy

from scellst_ray.core.logs import log_to_stderr
from scellst_ray.models.device import uses_cluster_gpus
from scellst_ray.pipelines import attempts
from scellst_ray.pipelines.metrics import WorkerMetrics
from scellst_ray.pipelines.packing import add_waiting_time, pack, stamp_queued, unpack
from scellst_ray.pipelines.planned_tiles import Plan, plan_dataset
from scellst_ray.pipelines.ray_internals import configure_tile_pass, select_other_nodes
from scellst_ray.pipelines.session import Cluster
from scellst_ray.runs.folder import RunFolder
from scellst_ray.stages.config import num_planners, tiles_of_task
from scellst_ray.stages.make import NETWORKS, Stage, stage_groups
from scellst_ray.stages.rows import PendingSlide
from scellst_ray.stages.tiles import CellsSpec

logger = logging.getLogger(__name__)
# Shares of a GPU, by how many groups of stages are on GPUs. Ray fills one GPU before it takes the
# next: with halves two segmenting networks would come upon one, and two embedding ones on another.
# A task stays with its actor, so actors of a lost node must find room: of the second group beside
# others, at once; of the first when others have no more to do, which they give up their places for.
GPU_SHARES = {1: (1.0,), 2: (0.6, 0.2)}


class MakeStage(Protocol):
    """Makes one stage of a worker."""

    def __call__(self, name: str, spec: CellsSpec, run: RunFolder, *, on_gpu: bool) -> Stage:
        """Return the stage of this name."""


@dataclass(frozen=True)
class WorkFunctions:
    """What is done to slides and tiles; simulations put something else in its place.

    Attributes:
        plan: Takes a slide to its tiles, as `plan_slide`.
        stage: Makes a stage of a worker, as `make_stage`.
    """

    plan: Plan
    stage: MakeStage


@dataclass(frozen=True)
class Resources:
    """What the workers may use; nothing here changes results.

    Attributes:
        workers: Actors per stage; None: as many as CPUs and memory allow, or one per GPU.
        gpus: Whether networks run on GPUs; None: if there are any.
        memory_gb: Memory each worker declares.
        tiles_per_task: Tiles a worker takes at a time, at least.
        network_gb: Memory the segmenting network takes on top where it runs on a CPU.
        limits: How often and how long they try.
        without_nodes: Ids of nodes where nothing shall run.
    """

    workers: int | None
    gpus: bool | None
    memory_gb: float
    tiles_per_task: int
    network_gb: float = 0.0
    limits: attempts.Limits = field(default_factory=attempts.Limits)
    without_nodes: tuple[str, ...] = ()

    @property
    def elsewhere(self) -> dict[str, str] | None:
        """Ray's label selector for all other nodes."""
        return select_other_nodes(self.without_nodes)


def receipts_dataset(
    rows: list[PendingSlide],
    spec: CellsSpec,
    run: RunFolder,
    resources: Resources,
    cluster: Cluster,
    work: WorkFunctions,
) -> ray.data.Dataset:
    """Build the lazy pipeline from slides still to do to RECEIPTS.

    Args:
        rows: One dict per slide, as `plan_slide` takes it.
        spec: What to compute.
        run: Where to write.
        resources: What the workers may use.
        cluster: What there is.
        work: What is done to slides and tiles.
    """
    gpus = uses_cluster_gpus(resources.gpus, cluster.num_gpus)
    per_task = tiles_of_task(resources.tiles_per_task, gpus=gpus)
    configure_tile_pass(per_task)
    session = attempts.new_session(run)
    how = {"spec": spec, "session": session, "limits": resources.limits}
    planners = num_planners(cluster.num_cpus, len(cluster.node_memory))
    dataset = plan_dataset(
        rows,
        planners,
        how | {"plan": work.plan, "tiles_per_task": per_task},
        resources.elsewhere,
    )
    memory = int((resources.memory_gb + (0 if gpus else resources.network_gb)) * 2**30)
    groups = stage_groups(spec, gpus=gpus)
    for names in groups:
        place = _place(names, groups, resources.workers, cluster, memory, gpus=gpus)
        dataset = dataset.map_batches(
            Stages,
            fn_constructor_kwargs=how
            | {"names": names, "run": run, "on_gpu": place.num_gpus > 0, "make": work.stage},
            compute=place.pool,
            num_cpus=place.num_cpus,
            num_gpus=place.num_gpus or None,
            memory=memory,
            # Blocks are tasks: as they were planned, then packed in one row.
            batch_size=None if names == groups[0] else 1,
            batch_format="pyarrow",
            label_selector=resources.elsewhere,
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
        share = GPU_SHARES[len(on_gpus)][on_gpus.index(names)]
        return _Place(ActorPoolStrategy(size=num_gpus), 0, share)
    # All pools at their largest ask for half of the CPUs, so none waits for places that another
    # holds, also when a node is lost. What they really use the system shares out.
    share = 1 / (2 * len(beside))
    most = min(cluster.num_cpus, (fitting - num_gpus * len(on_gpus)) // len(beside))
    # Pools grow by one actor at a time, and GPUs wait meanwhile: one for each GPU from the start.
    first = max(1, min(num_gpus, most // len(beside)))
    pool = ActorPoolStrategy(min_size=1, max_size=max(1, most), initial_size=first)
    return _Place(pool, share, 0)


class Stages:
    """Some stages in one actor: what a worker does with a batch of tiles."""

    def __init__(
        self,
        names: tuple[str, ...],
        spec: CellsSpec,
        run: RunFolder,
        session: str,
        limits: attempts.Limits,
        make: MakeStage,
        *,
        on_gpu: bool,
    ) -> None:
        """Make the stages; notes of attempts go below `session`."""
        log_to_stderr(logging.WARNING)
        self.metrics = WorkerMetrics(run)
        # First, so that it is known what ended the process before.
        self.attempts = attempts.attempts_of_actor(
            session, limits.max_attempts, limits.tile_timeout_s, on_gpu=on_gpu
        )
        self.stages = {name: make(name, spec, run, on_gpu=on_gpu) for name in names}

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Take tiles as they come from the stage before to the form the next one takes."""
        done = self.attempts.run_guarded(add_waiting_time(unpack(batch)), self._run)
        if isinstance(done[0], pa.Table):
            receipts = pa.concat_tables(done)
            self.metrics.count(receipts)
            return receipts
        return pack(stamp_queued([row for rows in done for row in rows]))

    def _run(self, rows: Any, begins: Callable[[str], None]) -> Any:  # noqa: ANN401
        """Return what the last stage makes of rows: rows, or receipts."""
        for name, stage in self.stages.items():
            # Finding nuclei is segmenting and cropping; the first is where it can go wrong.
            begins("segment" if name == "find" else name)
            rows = stage(rows)
        return rows
