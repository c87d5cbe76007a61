"""`scellst-ray plan`: tiles, cells, bytes, time and price of a run, before it starts.

The tiles are exactly those of the run, since the same function plans them. Everything else is
estimated from rates (see costs.py): from earlier runs, from a sample measured now, or defaults.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.models.device import has_gpu
from scellst_ray.models.encoder.encoder import encoder_dim, is_named
from scellst_ray.models.mil.head import load_head
from scellst_ray.preflight.calibration import calibrate
from scellst_ray.preflight.checks import missing_files
from scellst_ray.preflight.config import PlanConfig
from scellst_ray.preflight.costs import (
    DEFAULT,
    Cost,
    PlannedCluster,
    Rates,
    RunShape,
    total,
    used,
    wall_s,
    work_of,
)
from scellst_ray.preflight.rates import with_runs
from scellst_ray.preflight.slide_plans import SlidePlan, by_slide, plan_slides
from scellst_ray.runs.identity import NetworkIdentity, StoredIdentity
from scellst_ray.slides.manifest import PATH_COLUMNS, SlideRow, read_manifest, select_slides
from scellst_ray.stages.checked_networks import (
    CheckedNetworks,
    cells_spec,
    check_networks,
    segmenter_embedding_dim,
)
from scellst_ray.stages.config import (
    ExtractConfig,
    PredictConfig,
    encoder_of_head,
    head_file,
    resolve_config,
    tiles_of_task,
)
from scellst_ray.stages.segmenter_settings import WITHOUT_FILE
from scellst_ray.stages.tiles import CellsSpec

# If a sample got less than this share of a CPU, a note says so.
BUSY = 0.8


@dataclass(frozen=True)
class Plan:
    """A planned run.

    Attributes:
        job: 'extract' or 'predict'.
        slides: Plan of each slide.
        works: Cost of each slide.
        total: Cost of all slides.
        cluster: Cluster of the run.
        rates: Rates that the estimate uses.
        wall_s: Seconds from the command to the last record.
        notes: Remarks a reader needs to interpret the estimate.
        price: Price of the run, in the currency of the prices given; None without prices.
    """

    job: str
    slides: list[SlidePlan]
    works: list[Cost]
    total: Cost
    cluster: PlannedCluster
    rates: Rates
    wall_s: float
    notes: list[str]
    price: float | None


def make_plan(config: PlanConfig, report: Callable[[int], None] = lambda _: None) -> Plan:
    """Plan a run; slides that cannot be planned are part of it, with their errors.

    Args:
        config: Settings of the job and of the cluster.
        report: Called with the number of slides planned so far.

    Raises:
        ValueError: the manifest, the head, the weights (if calibrating) or an earlier run cannot be
            used.
    """
    slides = select_slides(read_manifest(config.job.manifest), config.job.slides)
    job, hidden_dims, head_uri = _job(config)
    notes: list[str] = []
    networks = _networks(job, head_uri, notes, read=config.calibrate is not None)
    spec = cells_spec(resolve_config(job), networks)
    keep = config.calibrate or 0
    notes += _missing_files(slides)
    plans = plan_slides(slides, spec, keep, config.processes, config.job.plan_timeout_s, report)
    cluster = config.cluster()
    shape = _shape(job, spec, networks, hidden_dims, gpus=bool(cluster.gpus))
    rates = _rates(config, spec, networks, plans, notes)
    unmeasured = [n for n in used(shape, cluster) if rates.sources[n] == DEFAULT]
    if unmeasured:
        notes.append(f"not calibrated, defaults of this package: {', '.join(unmeasured)}")
    works = [work_of(plan, rates, shape, cluster) for plan in plans]
    everything = total(works, shape)
    seconds = wall_s(everything, rates, shape, cluster)
    name = "extract" if head_uri is None else "predict"
    price = _price(config, cluster, seconds)
    return Plan(name, plans, works, everything, cluster, rates, seconds, notes, price)


def _missing_files(slides: Sequence[SlideRow]) -> list[str]:
    """Return a note about files that the manifest names besides slides and that are missing."""
    local = [s for s in slides if all(map(storage.is_local, map(str, _named_files(s))))]
    problems = [f"slide {s.slide_id}: {text}" for s in local for text in missing_files(s)]
    more = f" ({len(problems) - 1:,} more, see `scellst-ray doctor`)" if len(problems) > 1 else ""
    return [problems[0] + more] if problems else []


def _named_files(slide: SlideRow) -> list[object]:
    return [slide.columns[name] for name in PATH_COLUMNS if name in slide.columns]


def _job(config: PlanConfig) -> tuple[ExtractConfig, int, str | None]:
    """Return the job with its encoder, the numbers the head stores per cell, and the head's URI."""
    job = config.job
    if not isinstance(job, PredictConfig):
        return job, 0, None
    uri = head_file(job.head)
    head, info = load_head(uri)
    if job.encoder == "head":
        job = replace(job, encoder=encoder_of_head(info, uri))
    return job, head.formula.ensemble * schemas.HIDDEN_DIM + 1, uri


def _networks(
    job: ExtractConfig, head_uri: str | None, notes: list[str], *, read: bool
) -> CheckedNetworks:
    """Return the identity of the networks: from their files if `read`, else from their names."""
    if read:
        return replace(check_networks(job), head_uri=head_uri)
    dim: int | None = schemas.EMBEDDING_DIM
    if job.encoder in WITHOUT_FILE:
        dim = segmenter_embedding_dim(job.encoder)
    elif is_named(job.encoder) or (storage.is_local(job.encoder) and storage.exists(job.encoder)):
        dim = encoder_dim(job.encoder)
    else:
        notes.append(f"{job.encoder} was not read: the plan assumes embeddings of length {dim}")
    identity = NetworkIdentity(
        encoder=job.encoder, embedding_dim=dim if job.store_embeddings else None
    )
    return CheckedNetworks(identity, head_uri=head_uri)


def _shape(
    job: ExtractConfig,
    spec: CellsSpec,
    networks: CheckedNetworks,
    hidden_dims: int,
    *,
    gpus: bool,
) -> RunShape:
    return RunShape(
        network=spec.segmenter == "cellvit",
        pixels=spec.segmenter != "imported" or spec.encoder != "none",
        crops=spec.needs_crops,
        embed=spec.encoder != "none",
        side_px=spec.side_px,
        vector_dims=hidden_dims + (networks.identity.embedding_dim or 0),
        tiles_per_task=tiles_of_task(job.tiles_per_task, gpus=gpus),
        kept_crops=job.crops or 0,
    )


def _rates(
    config: PlanConfig,
    spec: CellsSpec,
    networks: CheckedNetworks,
    plans: list[SlidePlan],
    notes: list[str],
) -> Rates:
    """Return the rates: from earlier runs, else from a sample, else the defaults."""
    rates, gpus = Rates(), config.num_gpus > 0
    identity: StoredIdentity = {"segmenter": spec.segmenter, "precision": spec.precision}
    if config.calibrate is not None:
        identity["encoder"] = networks.identity.encoder
        if networks.identity.segmenter_weights is not None:
            identity["segmenter_weights"] = networks.identity.segmenter_weights
        on_gpu = gpus and has_gpu()
        per_task = tiles_of_task(config.job.tiles_per_task, gpus=gpus)
        sample = calibrate(by_slide(plans), spec, per_task, on_gpu=on_gpu)
        rates = rates.replaced(sample.rates, f"{sample.num_tiles} tiles measured here")
        rates = replace(rates, densities=sample.densities)
        notes += [f"a tile of the sample failed: {error}" for error in sample.errors[:5]]
        if sample.share < BUSY:
            notes.append(
                f"other work shares this machine: the sample got {sample.share:.0%} of a CPU, and "
                "seconds are scaled to a whole CPU"
            )
        if gpus and not on_gpu:
            notes.append("no GPU on this machine: seconds of networks on GPUs are defaults")
    if config.from_run:
        rates, run_notes = with_runs(rates, config.from_run, identity, on_gpu=gpus)
        notes += run_notes
    return rates


def _price(config: PlanConfig, cluster: PlannedCluster, seconds: float) -> float | None:
    """Return the price of the cluster for the seconds of the run; None without prices."""
    prices = (config.cpu_price, config.gpu_price)
    if prices == (None, None):
        return None
    price_per_hour = cluster.cpus * (prices[0] or 0.0) + cluster.gpus * (prices[1] or 0.0)
    return price_per_hour * seconds / 3600
