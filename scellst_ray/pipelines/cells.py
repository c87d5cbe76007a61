"""CELLS: the streaming pass from slides to cells (and, with a head, to EXPRESSION).

    pending slides -> plan -> [read, segment, crop] -> [embed, head] -> [write] -> receipts

On CPUs the bracketed stages are fused in one actor, so pixels never cross a process; with GPUs
the middle one has actors of its own. The driver logs receipts, and finishes a slide when its
tiles are all in.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext

from scellst_ray import schemas, storage
from scellst_ray.cohort import MAX_MPP, MIN_MPP, SlideRow, read_manifest
from scellst_ray.compaction import finish_slide, unfinished_record
from scellst_ray.models.encoder import best_precision, encoder_digest
from scellst_ray.pipelines.packing import pack, unpack
from scellst_ray.pipelines.stages import (
    SEGMENTER_VERSIONS,
    CellsSpec,
    Embed,
    Segment,
    WriteShards,
    local_weights,
    plan_slide,
)
from scellst_ray.runs import FINISHED, RunFolder, check_manifest_unchanged, open_run
from scellst_ray.session import Cluster, ray_session

TILE_ROW_BYTES = 250
LOG_EVERY_S = 5.0
Report = Callable[["Progress"], None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Slides to CELLS: every nucleus with its outline and embedding."""

    manifest: str
    """Slides: CSV or Parquet with slide_id, uri and, where the file lacks it, mpp."""
    out: str
    """Run folder; the same command on it does only what is missing."""
    segmenter: Literal["hematoxylin"] = "hematoxylin"
    """How nuclei are found; hematoxylin needs no weights."""
    read_mpp: float | None = None
    """um per px to read at; by default the slide's own within 0.25-0.5."""
    core_px: int = 960
    """Side of a tile's core in px read."""
    halo_px: int = 32
    """Margin read around the core in px read."""
    encoder: str = "imagenet"
    """Weights: a file, 'imagenet' (downloaded by torchvision) or 'random:SEED'."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the encoder; auto takes bfloat16 where the device has it."""
    store_embeddings: bool = True
    """Keep each cell's embedding (4 kB a cell); training needs it."""
    workers: int | None = None
    """Worker actors; by default one per CPU, or per GPU for embedding."""
    gpus: bool | None = None
    """Embed on GPUs; by default if the cluster has any."""
    memory_gb: float = 2.0
    """Memory a worker declares to Ray."""
    tiles_per_task: int = 8
    """Tiles a worker takes at a time: the work lost when it dies."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        low = {"core_px": 64, "halo_px": 0, "tiles_per_task": 1, "memory_gb": 0.1, "workers": 1}
        for name, least in low.items():
            value = getattr(self, name)
            if value is not None and value < least:
                message = f"{name} is {value}; it must be at least {least}"
                raise ValueError(message)
        if self.read_mpp is not None and not MIN_MPP <= self.read_mpp <= MAX_MPP:
            message = f"read_mpp is {self.read_mpp}; it must lie in {MIN_MPP}-{MAX_MPP} um/px"
            raise ValueError(message)


@dataclass
class Progress:
    """Where a run stands, for whoever shows it."""

    num_slides: int
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_tiles: int = 0
    num_tiles_known: int = 0
    num_cells: int = 0
    num_cells_before: int = 0
    started: float = field(default_factory=time.monotonic)


def extract(config: ExtractConfig, report: Report = lambda _: None) -> dict[str, dict[str, Any]]:
    """Run `extract`; return the record of every slide of the manifest.

    Raises:
        ValueError: the manifest, the weights or the output folder cannot be used.
    """
    slides = read_manifest(config.manifest)
    digest = encoder_digest(local_weights(config.encoder))
    return run_cells("extract", config, slides, {"encoder": digest}, None, report)


def run_cells(
    job: str,
    config: ExtractConfig,
    slides: list[SlideRow],
    identity: dict[str, Any],
    head_uri: str | None,
    report: Report,
    prepare: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Open the run, do what is missing, and return the record of every slide.

    Args:
        job: 'extract' or 'predict'.
        config: The job's configuration.
        slides: The manifest.
        identity: What, besides the tile settings, decides results (digests of weights).
        head_uri: The expression head, if any.
        report: Called with the progress after every change.
        prepare: Called once the folder is known to be this run's.
    """
    # Where precision is chosen it must be the same for a whole run, so the driver decides.
    auto = best_precision("cuda" if config.gpus else "cpu")
    precision = auto if config.precision == "auto" else config.precision
    settings = ("segmenter", "read_mpp", "core_px", "halo_px", "store_embeddings")
    identity = identity | {name: getattr(config, name) for name in settings}
    identity |= {"precision": precision, "segmenter_version": SEGMENTER_VERSIONS[config.segmenter]}
    run = open_run(config.out, job, identity, asdict(config))
    prepare()
    check_manifest_unchanged(run, {s.slide_id: {"uri": s.uri, "mpp": s.mpp} for s in slides})
    spec = CellsSpec(
        config.segmenter,
        config.read_mpp,
        config.core_px,
        config.halo_px,
        config.encoder,
        precision,
        head_uri,
        config.store_embeddings,
    )
    progress = Progress(len(slides))
    wanted = {slide.slide_id for slide in slides}
    for slide_id, record in run.records().items():
        if slide_id in wanted and record["status"] in FINISHED:
            progress.records[slide_id] = record
    report(progress)
    pending = [slide for slide in slides if slide.slide_id not in progress.records]
    if pending:
        with ray_session() as cluster:
            driver = Driver(run, progress, report)
            rows = driver.resume(pending)
            if rows:
                driver.consume(receipts_dataset(rows, spec, run, config, cluster))
            driver.finish()
    return progress.records


def receipts_dataset(
    rows: list[dict[str, Any]],
    spec: CellsSpec,
    run: RunFolder,
    config: ExtractConfig,
    cluster: Cluster,
) -> ray.data.Dataset:
    """Build the lazy pipeline from slides still to do to RECEIPTS.

    Args:
        rows: One dict per slide, as `plan_slide` takes it.
        spec: What to compute.
        run: Where to write.
        config: Resources.
        cluster: What there is.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # A slide's tiles must leave the planner in small blocks, or one worker would get them all.
    context.target_max_block_size = TILE_ROW_BYTES * config.tiles_per_task
    context.execution_options.preserve_order = False
    # One tile of a dense slide can take minutes on a slow CPU; time limits are per tile, not here.
    context.execution_no_progress_timeout_s = -1
    # Said of every slide smaller than the pool.
    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")
    slides = ray.data.from_arrow([_slide_table(row) for row in rows])
    # Planning takes no CPU slot: the workers hold them all, and waiting for one would be for ever.
    tiles = slides.map_batches(
        _Plan,
        fn_constructor_kwargs={"spec": spec},
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=1),
        num_cpus=0,
    )
    shared = {"batch_format": "pyarrow", "batch_size": config.tiles_per_task}
    memory = int(config.memory_gb * 2**30)
    gpus = cluster.num_gpus > 0 if config.gpus is None else config.gpus
    if not gpus:
        return tiles.map_batches(
            _AllStages,
            fn_constructor_kwargs={"spec": spec, "run": run},
            num_cpus=1,
            memory=memory,
            compute=ActorPoolStrategy(size=config.workers or cluster.num_cpus),
            **shared,
        )
    num_gpus = config.workers or cluster.num_gpus
    cpu_workers = max(1, cluster.num_cpus - num_gpus)
    nuclei = tiles.map_batches(
        _SegmentBatch,
        fn_constructor_kwargs={"spec": spec},
        num_cpus=1,
        memory=memory,
        compute=ActorPoolStrategy(min_size=1, max_size=cpu_workers),
        **shared,
    )
    return nuclei.map_batches(
        _EmbedAndWrite,
        fn_constructor_kwargs={"spec": spec, "run": run},
        num_gpus=1,
        num_cpus=1,
        memory=memory,
        compute=ActorPoolStrategy(size=num_gpus),
        **shared,
    )


def _slide_table(row: dict[str, Any]) -> pa.Table:
    done = pa.array([row["done_tiles"]], pa.list_(pa.int64()))
    mpp = pa.array([row["mpp"]], pa.float64())
    texts = {n: pa.array([row[n]], pa.string()) for n in ("slide_id", "uri", "mpp_error")}
    return pa.table(texts | {"mpp": mpp, "done_tiles": done})


class _Plan:
    def __init__(self, spec: CellsSpec) -> None:
        self.spec = spec

    def __call__(self, batch: pa.Table) -> Iterable[pa.Table]:
        for row in batch.to_pylist():
            yield pa.Table.from_pylist(plan_slide(row, self.spec), schema=PLANNED)


PLANNED = schemas.TILES.append(pa.field("seconds_plan", pa.float32()))


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


_finish_slide = ray.remote(num_cpus=0, max_retries=3)(finish_slide)


class Driver:
    """What the driver keeps while receipts come in."""

    def __init__(self, run: RunFolder, progress: Progress, report: Report) -> None:
        """Start with nothing received."""
        self.run, self.progress, self.report = run, progress, report
        self.receipts: dict[str, list[pa.Table]] = {}
        self.unlogged: list[pa.Table] = []
        self.logged_at = time.monotonic()
        self.finishing: dict[Any, str] = {}

    def resume(self, pending: list[SlideRow]) -> list[dict[str, Any]]:
        """Take up the receipts of an earlier driver; return the slides that still need work."""
        log = self.run.receipts()
        log = log.filter(pc.and_(pc.is_null(log["error"]), pc.greater_equal(log["tile_id"], 0)))
        rows = []
        for slide in pending:
            done = log.filter(pc.equal(log["slide_id"], slide.slide_id))
            # A receipt whose shard is gone is worth nothing.
            uris = storage.list_files(self.run.shards_uri(slide.slide_id)) if len(done) else []
            names = pa.array([uri.rsplit("/", 1)[-1] for uri in uris], pa.string())
            there = pc.is_in(done["shard"], value_set=names)
            done = done.filter(pc.or_(there, pc.equal(done["num_cells"], 0)))
            if len(done):
                self._add(slide.slide_id, done)
                self.progress.num_cells_before = self.progress.num_cells
            if slide.slide_id in self.receipts or not len(done):
                rows.append(
                    {
                        "slide_id": slide.slide_id,
                        "uri": slide.uri,
                        "mpp": slide.mpp,
                        "mpp_error": slide.mpp_error,
                        "done_tiles": done["tile_id"].to_pylist(),
                    }
                )
        return rows

    def consume(self, dataset: ray.data.Dataset) -> None:
        """Run the pipeline to its end."""
        batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        try:
            for batch in batches:
                receipts = batch.select(schemas.RECEIPTS.names).cast(schemas.RECEIPTS)
                self.unlogged.append(receipts)
                if time.monotonic() - self.logged_at > LOG_EVERY_S:
                    self._log()
                for slide_id in pc.unique(receipts["slide_id"]).to_pylist():
                    self._add(slide_id, receipts.filter(pc.equal(receipts["slide_id"], slide_id)))
                self._collect(timeout=0)
        finally:
            self._log()

    def finish(self) -> None:
        """Wait for the slides being finished."""
        while self.finishing:
            self._collect(timeout=1)

    def _log(self) -> None:
        if self.unlogged:
            self.run.log_receipts(pa.concat_tables(self.unlogged))
        self.unlogged, self.logged_at = [], time.monotonic()

    def _add(self, slide_id: str, receipts: pa.Table) -> None:
        """Take receipts of one slide; start finishing it when they are all there."""
        parts = self.receipts.setdefault(slide_id, [])
        num_tiles = receipts["num_tiles"][0].as_py()
        self.progress.num_tiles_known += 0 if parts else num_tiles
        parts.append(receipts)
        self.progress.num_tiles += len(receipts) if num_tiles else 0
        self.progress.num_cells += pc.sum(receipts["num_cells"]).as_py()
        if sum(len(part) for part in parts) >= max(1, num_tiles):
            # The tables are named in the log before they are used up.
            self._log()
            whole = pa.concat_tables(self.receipts.pop(slide_id))
            self.finishing[_finish_slide.remote(self.run, slide_id, whole)] = slide_id
        self.report(self.progress)

    def _collect(self, timeout: float) -> None:
        """Take the records of slides that have been finished meanwhile."""
        if not self.finishing:
            return
        refs = list(self.finishing)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout)
        for ref in ready:
            slide_id = self.finishing.pop(ref)
            try:
                record = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                # Its shards and receipts stay: the next run finishes it.
                record = unfinished_record(slide_id, error.cause)
                logger.error("slide %s could not be finished: %s", slide_id, error.cause)
            self.progress.records[slide_id] = record
        if ready:
            self.report(self.progress)
