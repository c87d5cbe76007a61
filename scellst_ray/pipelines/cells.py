"""CELLS: the `extract` job, and the run that `extract` and `predict` share."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from scellst_ray import storage
from scellst_ray.cohort import MAX_MPP, MIN_MPP, SlideRow, read_manifest
from scellst_ray.models.encoder import best_precision, encoder_digest, is_named
from scellst_ray.pipelines.driver import Driver, Progress, Report
from scellst_ray.pipelines.receipts import Resources, receipts_dataset
from scellst_ray.pipelines.stages import SEGMENTER_VERSIONS, local_weights
from scellst_ray.pipelines.tiles import CellsSpec
from scellst_ray.runs import FINISHED, check_manifest_unchanged, open_run
from scellst_ray.session import ray_session


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
    """Of the encoder; auto takes bfloat16 where the driver's device has it, or gpus is true."""
    store_embeddings: bool = True
    """Keep each cell's embedding (4 kB a cell); training needs it."""
    workers: int | None = None
    """Worker actors; by default as CPUs and memory allow, or one per GPU for embedding."""
    gpus: bool | None = None
    """Embed on GPUs; by default if the cluster has any."""
    memory_gb: float = 2.0
    """Memory a worker declares to Ray."""
    tiles_per_task: int = 2
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


def extract(config: ExtractConfig, report: Report = lambda _: None) -> dict[str, dict[str, Any]]:
    """Run `extract`; return the record of every slide of the manifest.

    Raises:
        ValueError: the manifest, the weights or the output folder cannot be used.
    """
    slides = read_manifest(config.manifest)
    digest = encoder_digest(local_weights(config.encoder))
    return run_cells("extract", config, slides, {"encoder": digest}, None, report)


def _source(slide: SlideRow) -> dict[str, Any]:
    """Return what says which image a slide_id stands for."""
    return {"uri": slide.uri, "mpp": slide.mpp, "bytes": storage.content_size(slide.uri)}


def _settled(config: ExtractConfig) -> ExtractConfig:
    """Return the configuration with what must be the same in every process decided, once.

    An encoder file gets its absolute name, and `auto` precision becomes that of the driver.
    """
    if not is_named(config.encoder):
        config = replace(config, encoder=storage.absolute(config.encoder))
    if config.precision != "auto":
        return config
    gpus = torch.cuda.is_available() if config.gpus is None else config.gpus
    return replace(config, precision=best_precision("cuda" if gpus else "cpu"))


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
    config = _settled(config)
    settings = ("segmenter", "read_mpp", "core_px", "halo_px", "store_embeddings", "precision")
    identity = identity | {name: getattr(config, name) for name in settings}
    identity["segmenter_version"] = SEGMENTER_VERSIONS[config.segmenter]
    run = open_run(config.out, job, identity, asdict(config))
    prepare()
    check_manifest_unchanged(run, {slide.slide_id: _source(slide) for slide in slides})
    spec = CellsSpec(
        config.segmenter,
        config.read_mpp,
        config.core_px,
        config.halo_px,
        config.encoder,
        config.precision,
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
                resources = Resources(
                    config.workers, config.gpus, config.memory_gb, config.tiles_per_task
                )
                driver.consume(receipts_dataset(rows, spec, run, resources, cluster))
            driver.finish()
    return progress.records
