"""CELLS: the `extract` job, and the run that `extract` and `predict` share."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from scellst_ray import storage
from scellst_ray.cohort import MAX_MPP, MIN_MPP, SlideRow, chosen, read_manifest
from scellst_ray.crop_format import CropSample
from scellst_ray.crop_store import colours_by_slide
from scellst_ray.lease import held
from scellst_ray.models.catalogue import is_catalogued
from scellst_ray.pipelines.attempts import Limits, forget_attempts
from scellst_ray.pipelines.crops import check_sample, crops_missing, make_crops, with_crops
from scellst_ray.pipelines.driver import Driver, Progress, Report
from scellst_ray.pipelines.nodes import asked_for, check_before_run
from scellst_ray.pipelines.receipts import Resources, Work, receipts_dataset
from scellst_ray.pipelines.run_metrics import watched
from scellst_ray.pipelines.segmenter_settings import WITHOUT_FILE, segmenter_problems
from scellst_ray.pipelines.sources import sources_of
from scellst_ray.pipelines.stages import SEGMENTER_VERSIONS
from scellst_ray.pipelines.tiles import CellsSpec
from scellst_ray.run_summary import write_summary
from scellst_ray.runs import FINISHED, RunFolder, check_manifest_unchanged, open_run
from scellst_ray.session import Cluster, ray_session

WORKER_GB = 2.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Slides to CELLS: every nucleus with its outline and embedding."""

    manifest: str
    """Slides: CSV or Parquet with slide_id, uri and, where the file lacks it, mpp."""
    out: str
    """Run folder; the same command on it does only what is missing."""
    slides: list[str] | None = None
    """Only these slide_ids of the manifest (a,b)."""
    segmenter: Literal["hematoxylin", "cellvit", "imported"] = "hematoxylin"
    """How nuclei are found: without weights, by CellViT, or in files the manifest names."""
    segmenter_weights: str | None = None
    """CellViT checkpoint: a file, or a name that `scellst-ray models` lists."""
    segmenter_window_px: int | None = None
    """Scale CellViT's edges within this many px around a nucleus; by default within its tile."""
    read_mpp: float | None = None
    """um per px to read at; by default the slide's own within 0.25-0.5 (CellViT: 0.2-0.3)."""
    core_px: int = 960
    """Side of a tile's core in px read."""
    halo_px: int = 32
    """Margin read around the core in px read."""
    encoder: str = "imagenet"
    """Weights: a file, 'imagenet' (downloaded by torchvision), 'timm:NAME' (by timm) or
    'random:SEED'; 'tokens' for CellViT's own, 'types' for its type as one-hot, 'none' for no
    embeddings."""
    colours_from: str | None = None
    """Run folder with crops of these slides: each slide's own mean and deviation of RGB normalise
    its crops, not the encoder's; for slides of another scanner or stain (sCellST's 'self')."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the networks; auto takes bfloat16 where the driver's device has it, or gpus is true."""
    store_embeddings: bool = True
    """Keep each cell's embedding (4 kB a cell); training needs it."""
    crops: int | None = None
    """Keep crops of so many cells, of all slides together, for pretraining (3 kB each)."""
    crops_per_slide: int | None = None
    """Crops of a slide, at most."""
    crops_per_type: int | None = None
    """Crops of a slide and nucleus type, at most."""
    crops_seed: int = 0
    """Decides which cells."""
    workers: int | None = None
    """Worker actors; by default as CPUs and memory allow, or one per GPU for the networks."""
    gpus: bool | None = None
    """Run networks on GPUs; by default if the cluster has any."""
    memory_gb: float | None = None
    """Memory a worker declares to Ray; by default 2, and with CellViT on CPUs what it takes."""
    tiles_per_task: int = 2
    """Tiles a worker takes at a time: the work lost when it dies."""
    max_attempts: int = 3
    """Times a tile, or opening a slide, may end a worker's process before it counts as failed."""
    tile_timeout_s: float | None = 1800.0
    """Seconds a tile may take before its worker is ended, which counts as an attempt."""
    plan_timeout_s: float | None = 1800.0
    """Seconds opening a slide and finding its tissue may take, likewise."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        low = {"core_px": 64, "halo_px": 0, "tiles_per_task": 1, "memory_gb": 0.1, "workers": 1}
        low |= {"max_attempts": 1, "tile_timeout_s": 1, "plan_timeout_s": 1}
        low |= {"crops": 1, "crops_per_slide": 1, "crops_per_type": 1}
        for name, least in low.items():
            value = getattr(self, name)
            if value is not None and value < least:
                message = f"{name} is {value}; it must be at least {least}"
                raise ValueError(message)
        if self.read_mpp is not None and not MIN_MPP <= self.read_mpp <= MAX_MPP:
            message = f"read_mpp is {self.read_mpp}; it must lie in {MIN_MPP}-{MAX_MPP} um/px"
            raise ValueError(message)
        problems = segmenter_problems(self)
        if self.crops is None and (self.crops_per_slide or self.crops_per_type):
            problems.append("crops_per_slide and crops_per_type need crops: how many in all")
        if self.colours_from is not None and self.encoder in WITHOUT_FILE:
            problems.append(f"colours_from is for encoders of crops; this is {self.encoder}")
        if problems:
            raise ValueError("; ".join(problems))


def extract(config: ExtractConfig, report: Report = lambda _: None) -> dict[str, dict[str, Any]]:
    """Run `extract`; return the record of every slide of the manifest.

    Raises:
        ValueError: the manifest, the weights or the output folder cannot be used.
    """
    slides = read_manifest(config.manifest)
    return run_cells("extract", config, slides, check_networks(config), report)


@dataclass(frozen=True)
class CheckedNetworks:
    """What the networks of a run are.

    Attributes:
        identity: What decides results: digests of their weights, length of embeddings.
        type_names: Nucleus types of the segmenting network, by number; empty without one.
        bytes_on_cpu: Memory the segmenting network takes where there is no GPU.
        head_uri: The expression head, or None.
    """

    identity: dict[str, Any]
    type_names: tuple[str, ...] = ()
    bytes_on_cpu: int = 0
    head_uri: str | None = None


def check_networks(config: ExtractConfig) -> CheckedNetworks:
    """Read the networks' weights, before Ray starts, and return what they are.

    Raises:
        ValueError: weights that are not there, or not what they should be.
    """
    # Torch takes half a gigabyte, which a driver without networks need not.
    if config.segmenter != "cellvit" and config.encoder in WITHOUT_FILE:
        return CheckedNetworks({"encoder": config.encoder, "embedding_dim": None})
    from scellst_ray.models.cellvit_inference import tile_bytes  # noqa: PLC0415
    from scellst_ray.models.cellvit_weights import load_cellvit  # noqa: PLC0415
    from scellst_ray.models.encoder import encoder_digest, encoder_dim  # noqa: PLC0415
    from scellst_ray.pipelines.networks import local_weights  # noqa: PLC0415

    found: dict[str, Any] = {"encoder": config.encoder, "embedding_dim": None}
    type_names: tuple[str, ...] = ()
    bytes_on_cpu = 0
    if config.segmenter == "cellvit":
        model = load_cellvit(local_weights(str(config.segmenter_weights)))
        found["segmenter_weights"] = model.digest
        found["segmenter_window_px"] = config.segmenter_window_px
        type_names = model.type_names
        network_bytes = sum(p.nbytes for p in model.network.parameters())
        side = config.core_px + 2 * config.halo_px
        if model.arch.max_px is not None and side > model.arch.max_px:
            message = (
                f"core_px {config.core_px} and two halo_px {config.halo_px} make {side} px; "
                f"CellViT-{model.arch.variant} takes at most {model.arch.max_px}"
            )
            raise ValueError(message)
        bytes_on_cpu = network_bytes + tile_bytes(side, "float32")
        if config.encoder == "tokens":
            found |= {"encoder": f"tokens:{model.digest}", "embedding_dim": model.arch.dim}
        elif config.encoder == "types":
            names = ",".join(type_names)
            found |= {"encoder": f"types:{names}", "embedding_dim": len(type_names)}
    if config.encoder not in WITHOUT_FILE:
        weights = local_weights(config.encoder)
        digest, dim = encoder_digest(weights), encoder_dim(weights)
        found |= {"encoder": digest, "embedding_dim": dim}
    if not config.store_embeddings:
        found["embedding_dim"] = None
    return CheckedNetworks(found, type_names, bytes_on_cpu)


def settled(config: ExtractConfig) -> ExtractConfig:
    """Return the configuration with what must be the same in every process decided, once.

    Files of weights get absolute names, and `auto` precision becomes that of the driver.
    """
    if config.encoder not in WITHOUT_FILE and not is_catalogued(config.encoder):
        from scellst_ray.models.encoder import is_named  # noqa: PLC0415 - as in check_networks

        if not is_named(config.encoder):
            config = replace(config, encoder=storage.absolute(config.encoder))
    weights = config.segmenter_weights
    if weights is not None and not is_catalogued(weights):
        config = replace(config, segmenter_weights=storage.absolute(weights))
    # A retry reads it from the run's folder, wherever it is started.
    config = replace(config, manifest=storage.absolute(config.manifest))
    if config.encoder == "none":
        config = replace(config, store_embeddings=False)
    if config.precision != "auto":
        return config
    import torch  # noqa: PLC0415 - as in check_networks

    from scellst_ray.models.encoder import best_precision  # noqa: PLC0415

    gpus = torch.cuda.is_available() if config.gpus is None else config.gpus
    return replace(config, precision=best_precision("cuda" if gpus else "cpu"))


def run_cells(
    job: str,
    config: ExtractConfig,
    slides: list[SlideRow],
    networks: CheckedNetworks,
    report: Report,
    prepare: Callable[[], None] = lambda: None,
    work: Work | None = None,
) -> dict[str, dict[str, Any]]:
    """Open the run, do what is missing, and return the record of every slide.

    Args:
        job: 'extract' or 'predict'.
        config: The job's configuration.
        slides: The manifest.
        networks: From `check_networks`, and for `predict` the head's digest in its identity.
        report: Called with the progress after every change.
        prepare: Called once the folder is known to be this run's.
        work: What is done to slides and tiles, where that is not the pipeline's own.
    """
    config, slides = settled(config), chosen(slides, config.slides)
    settings = ("segmenter", "read_mpp", "core_px", "halo_px", "store_embeddings", "precision")
    identity = networks.identity | {name: getattr(config, name) for name in settings}
    identity["segmenter_version"] = SEGMENTER_VERSIONS[config.segmenter]
    colours = None
    if config.colours_from is not None:
        colours = colours_by_slide(config.colours_from)
        identity["colours"] = "of each slide"
    run = open_run(config.out, job, identity)
    # Nothing else is written, and Ray does not start, before other drivers are kept out.
    with held(run.uri) as lease:
        run.write_config(asdict(config))
        prepare()
        sources = sources_of(slides, colours, imported=config.segmenter == "imported")
        check_manifest_unchanged(run, sources)
        sample = _sample(config)
        if sample is not None:
            check_sample(run, sample)
        progress = Progress(len(slides))
        driver = Driver(run, progress, report, lease.check)
        pending = _largest_first(_pending(run, slides, progress), sources)
        report(progress)
        if not pending and (sample is None or not crops_missing(run, progress.records, sample)):
            return progress.records
        with ray_session() as cluster:
            if work is None:
                _check_nodes(config, identity, run, cluster, pending)
            forget_attempts(run)
            driver.report = watched(run, report)
            spec = replace(cells_spec(config, networks), colours=colours)
            resources = _resources(config, networks)
            rows = driver.resume(pending, spec)
            if rows:
                driver.consume(receipts_dataset(rows, spec, run, resources, cluster, work))
            driver.finish()
            if sample is not None:
                of_slides = (slides, progress.records)
                made = make_crops(run, *of_slides, sample, resources, cluster, lease.check)
                progress.records = with_crops(progress.records, made)
            forget_attempts(run)
        write_summary(run.uri, progress.records)
    return progress.records


def _check_nodes(
    config: ExtractConfig,
    identity: Mapping[str, Any],
    run: RunFolder,
    cluster: Cluster,
    slides: list[SlideRow],
) -> None:
    """Stop a run that cannot succeed on this cluster, before its work starts."""
    weights = [
        (config.encoder, identity["encoder"]),
        (config.segmenter_weights, identity.get("segmenter_weights")),
    ]
    gpus = cluster.num_gpus > 0 if config.gpus is None else config.gpus
    asked = asked_for(run.uri, weights, gpus=gpus)
    check_before_run(asked, cluster, slides, imported=config.segmenter == "imported")


def _pending(run: RunFolder, slides: list[SlideRow], progress: Progress) -> list[SlideRow]:
    """Return the slides that are not finished; the records of the others go into `progress`."""
    wanted = {slide.slide_id for slide in slides}
    records = run.records()
    finished = {s: record for s, record in records.items() if record["status"] in FINISHED}
    progress.records |= {s: record for s, record in finished.items() if s in wanted}
    return [slide for slide in slides if slide.slide_id not in progress.records]


def _largest_first(
    slides: list[SlideRow], sources: Mapping[str, Mapping[str, Any]]
) -> list[SlideRow]:
    """Return slides by size, so that no large one is begun when the others are done.

    Where sizes are not known, the order of the manifest stays.
    """
    return sorted(slides, key=lambda slide: -(sources[slide.slide_id]["bytes"] or 0))


def cells_spec(config: ExtractConfig, networks: CheckedNetworks) -> CellsSpec:
    """Return what to compute, of a settled configuration."""
    return CellsSpec(
        segmenter=config.segmenter,
        read_mpp=config.read_mpp,
        core_px=config.core_px,
        halo_px=config.halo_px,
        encoder=config.encoder,
        precision=config.precision,
        head_uri=networks.head_uri,
        store_embeddings=config.store_embeddings,
        type_names=networks.type_names,
        weights=config.segmenter_weights,
        weights_digest=networks.identity.get("segmenter_weights"),
        encoder_digest=None if config.encoder in WITHOUT_FILE else networks.identity["encoder"],
        window_px=config.segmenter_window_px,
    )


def _sample(config: ExtractConfig) -> CropSample | None:
    if config.crops is None:
        return None
    if config.slides is not None:
        # They would take the place of those of all slides.
        logger.warning("crops are of all slides: run the same command without slides for them")
        return None
    caps = (config.crops_per_slide, config.crops_per_type)
    return CropSample(config.crops, *caps, seed=config.crops_seed)


def _resources(config: ExtractConfig, networks: CheckedNetworks) -> Resources:
    return Resources(
        config.workers,
        config.gpus,
        config.memory_gb or WORKER_GB,
        config.tiles_per_task,
        network_gb=0.0 if config.memory_gb else networks.bytes_on_cpu / 2**30,
        limits=Limits(config.max_attempts, config.tile_timeout_s, config.plan_timeout_s),
    )
