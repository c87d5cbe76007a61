"""RECEIPTS: the Ray Data pipeline from slides still to do to one receipt per tile.

    slides -> plan -> [read] -> [network] -> [find nuclei] -> [embed, head] -> [write] -> receipts

Without GPUs one actor runs all stages in brackets, so pixels never cross a process. With GPUs the
networks have actors of their own. Stages that a run does not need are left out. A tile that ends
its actor's process costs no other tile: see pipelines/attempts.py.
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
# GPU share per actor, by the number of GPU stages. With two: segmentation 0.6, embedding 0.2. Ray
# fills one GPU before the next, so with halves two segmentation actors would share a GPU. With 0.6
# they never do. After a node is lost, its embedding actors fit on a GPU in use; its segmentation
# actors wait for a free one.
GPU_SHARES = {1: (1.0,), 2: (0.6, 0.2)}


class MakeStage(Protocol):
    """The type of functions that make one stage of a worker."""

    def __call__(self, name: str, spec: CellsSpec, run: RunFolder, *, on_gpu: bool) -> Stage:
        """Return the stage of this name."""


@dataclass(frozen=True)
class WorkFunctions:
    """The functions that do the work on slides and tiles; simulations replace them.

    Attributes:
        plan: Returns the tiles of a slide, as `plan_slide`.
        stage: Makes a stage of a worker, as `make_stage`.
    """

    plan: Plan
    stage: MakeStage


@dataclass(frozen=True)
class Resources:
    """The resources that workers may use. They do not change results.

    Attributes:
        workers: Number of actors of each stage; None: as CPUs and memory allow, or one for a GPU.
        gpus: Whether networks run on GPUs; None: if the cluster has any.
        memory_gb: GiB of memory that each worker declares.
        tiles_per_task: Least number of tiles that a worker takes at a time.
        network_gb: GiB that the segmenting network takes in addition if it runs on a CPU.
        limits: Limits of number and time of the attempts at a tile.
        without_nodes: Ids of nodes on which nothing may run.
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
        """Ray's label selector of all nodes except `without_nodes`."""
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
        rows: Slides, as `plan_slide` takes them.
        spec: Settings of the computation.
        run: The run folder.
        resources: The resources that workers may use.
        cluster: The resources of the cluster.
        work: The functions that do the work on slides and tiles.
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
            # A block is a task. The first group takes blocks as they were planned. Later groups
            # take blocks of one row, into which all tiles of a task are packed.
            batch_size=None if names == groups[0] else 1,
            batch_format="pyarrow",
            label_selector=resources.elsewhere,
        )
    return dataset


class _Place(NamedTuple):
    """The actors of a group of stages, and the CPU and GPU shares of each."""

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
        ValueError: the cluster cannot grow, and its memory does not hold the fewest actors that
            the groups need. They would wait forever without a message.
    """
    on_gpus = [group for group in groups if gpus and group[0] in NETWORKS]
    on_cpus = [group for group in groups if group not in on_gpus]
    num_gpus = workers or max(1, cluster.num_gpus)
    fitting = cluster.num_fitting(memory)
    least = len(on_cpus) + num_gpus * len(on_gpus) if gpus else workers or 1
    if fitting < least:
        message = (
            f"{least} worker(s) of {memory / 2**30:.1f} GiB are needed, and the cluster's memory "
            f"holds {fitting}. Give a smaller memory_gb if workers need less, fewer workers, "
            "smaller tiles (core_px), a smaller network, or nodes with more memory"
        )
        if not cluster.may_grow:
            raise ValueError(message)
        logger.warning("%s; waiting for it to grow", message)
    if not gpus:
        size = workers or max(1, min(cluster.num_cpus, fitting))
        return _Place(ActorPoolStrategy(size=size), 1, 0)
    if names in on_gpus:
        # It declares no CPU: the other stages leave it the little that it needs.
        share = GPU_SHARES[len(on_gpus)][on_gpus.index(names)]
        return _Place(ActorPoolStrategy(size=num_gpus), 0, share)
    # All pools at their largest declare half of the CPUs. So no pool waits for slots of another,
    # even after a node is lost. The operating system shares out the CPUs that they really use.
    share = 1 / (2 * len(on_cpus))
    most = min(cluster.num_cpus, (fitting - num_gpus * len(on_gpus)) // len(on_cpus))
    # Pools grow by one actor at a time, and GPUs would wait: they start with one for each GPU.
    first = max(1, min(num_gpus, most // len(on_cpus)))
    pool = ActorPoolStrategy(min_size=1, max_size=max(1, most), initial_size=first)
    return _Place(pool, share, 0)


class Stages:
    """One or more stages in one actor: the work of a worker on a batch of tiles."""

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
        """Make the stages.

        Args:
            names: Names of the stages, in order.
            spec: Settings of the computation.
            run: The run folder.
            session: Folder for the notes of attempts.
            limits: Limits of number and time of the attempts at a tile.
            make: Makes a stage, as `make_stage`.
            on_gpu: Whether Ray gave this actor a GPU.
        """
        log_to_stderr(logging.WARNING)
        self.metrics = WorkerMetrics(run)
        # First, so that the end of the earlier process counts even if making the stages fails.
        self.attempts = attempts.attempts_of_actor(
            session, limits.max_attempts, limits.tile_timeout_s, on_gpu=on_gpu
        )
        self.stages = {name: make(name, spec, run, on_gpu=on_gpu) for name in names}

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the tiles of a batch for the next actor; after the last stage their receipts."""
        done = self.attempts.run_guarded(add_waiting_time(unpack(batch)), self._run)
        if isinstance(done[0], pa.Table):
            receipts = pa.concat_tables(done)
            self.metrics.count(receipts)
            return receipts
        return pack(stamp_queued([row for rows in done for row in rows]))

    def _run(self, rows: Any, begins: Callable[[str], None]) -> Any:  # noqa: ANN401
        """Run all stages; return rows, or receipts after the last stage."""
        for name, stage in self.stages.items():
            # Stage `find` is segmenting and cropping; only segmenting is likely to fail.
            begins("segment" if name == "find" else name)
            rows = stage(rows)
        return rows
