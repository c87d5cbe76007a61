"""CELLS: the `extract` job, and the run that `extract` and `predict` share."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from functools import partial

from ray.data import Dataset

from scellst_ray.models.device import uses_cluster_gpus
from scellst_ray.pipelines.ask_nodes import asked_for, check_before_run
from scellst_ray.pipelines.attempts import Limits, forget_attempts
from scellst_ray.pipelines.crops import check_sample, crops_missing, make_crops, with_crops
from scellst_ray.pipelines.driver import Driver
from scellst_ray.pipelines.metrics import report_with_metrics
from scellst_ray.pipelines.progress import Progress, Report
from scellst_ray.pipelines.receipts import Resources, WorkFunctions, receipts_dataset
from scellst_ray.pipelines.session import Cluster, ray_session
from scellst_ray.runs.crop_files import CropSample
from scellst_ray.runs.crop_store import colours_by_slide
from scellst_ray.runs.folder import FINISHED, RunFolder
from scellst_ray.runs.identity import OF_EACH_SLIDE, NetworkIdentity, RunIdentity
from scellst_ray.runs.known_slides import accept_slides
from scellst_ray.runs.records import SlideRecord, SlideSource
from scellst_ray.runs.sources import sources_of
from scellst_ray.runs.start import hold_run
from scellst_ray.runs.summary import write_summary
from scellst_ray.slides.manifest import SlideRow, read_manifest, select_slides
from scellst_ray.stages.checked_networks import CheckedNetworks, cells_spec, check_networks
from scellst_ray.stages.config import ExtractConfig, resolve_config
from scellst_ray.stages.libraries import pixel_libraries
from scellst_ray.stages.make import SEGMENTER_VERSIONS, make_stage
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.rows import PendingSlide
from scellst_ray.stages.tiles import CellsSpec

WORKER_GB = 2.0
# Rounds in which slides are finished: each but the first does the tiles of damaged shards again.
MAX_ROUNDS = 4
OWN_WORK = WorkFunctions(plan_slide, make_stage)
logger = logging.getLogger(__name__)


def extract(config: ExtractConfig, report: Report = lambda _: None) -> dict[str, SlideRecord]:
    """Run `extract`; return the record of every slide of the manifest.

    Raises:
        ValueError: the manifest, the weights or the output folder cannot be used.
    """
    slides = read_manifest(config.manifest)
    return run_cells("extract", config, slides, check_networks(config), report)


def run_cells(
    job: str,
    config: ExtractConfig,
    slides: list[SlideRow],
    networks: CheckedNetworks,
    report: Report,
    prepare: Callable[[RunFolder], None] = lambda _: None,
    work: WorkFunctions = OWN_WORK,
) -> dict[str, SlideRecord]:
    """Open the run, do the work that is missing, and return the record of every slide.

    Args:
        job: 'extract' or 'predict'.
        config: The job's configuration.
        slides: The manifest.
        networks: From `check_networks`; for `predict` its identity holds the head's digest, too.
        report: Called with the progress after every change.
        prepare: Called with the run folder once this driver holds it.
        work: The functions that do the work; simulations give their own.
    """
    config, slides = resolve_config(config), select_slides(slides, config.slides)
    colours = None if config.colours_from is None else colours_by_slide(config.colours_from)
    identity = _make_identity(config, networks)
    # Before this driver holds the lease, it writes nothing and does not start Ray.
    with hold_run(config.out, job, identity, pixel_libraries()) as (run, lease):
        sources = sources_of(slides, colours, imported=config.segmenter == "imported")
        finished = _read_finished(run)
        trusted = accept_slides(run, sources, finished, config.moved or ())
        run.write_config(asdict(config))
        prepare(run)
        sample = _make_sample(config)
        if sample is not None:
            check_sample(run, sample)
        progress = Progress(len(slides))
        pending = _sort_by_size(_select_pending(slides, finished, progress), sources)
        report(progress)
        if not pending and (sample is None or not crops_missing(run, progress.records, sample)):
            # The driver that finished the last slide may have died before it wrote this.
            write_summary(run.uri)
            return progress.records
        with ray_session() as cluster:
            asked = (config, networks.identity, run, cluster, pending)
            unfit = _check_nodes(*asked) if work is OWN_WORK else ()
            forget_attempts(run)
            report = report_with_metrics(run, report)
            spec = replace(cells_spec(config, networks), colours=colours)
            resources = replace(_make_resources(config, networks), without_nodes=unfit)
            how = (spec, run, resources, cluster, work)
            _finish_slides(
                partial(Driver, run, progress, report, lease.check),
                lambda rows: receipts_dataset(rows, *how),
                *(pending, finished, spec, trusted),
            )
            if sample is not None:
                of_slides = (slides, progress.records)
                made = make_crops(run, *of_slides, sample, resources, cluster, lease.check)
                progress.records = with_crops(progress.records, made)
            forget_attempts(run)
        write_summary(run.uri, progress.records)
    return progress.records


def _finish_slides(
    new_driver: Callable[[], Driver],
    dataset: Callable[[list[PendingSlide]], Dataset],
    pending: list[SlideRow],
    finished: Mapping[str, SlideRecord],
    spec: CellsSpec,
    trusted: Collection[str],
) -> None:
    """Finish slides; do the tiles of damaged shards again, in a few rounds.

    Args:
        new_driver: Returns a driver. All of them share one progress.
        dataset: Returns the pipeline from slides to receipts.
        pending: The slides to finish.
        finished: Records of the slides that were finished before.
        spec: Settings of the computation.
        trusted: slide_ids whose receipts may count without a source.
    """
    for _ in range(MAX_ROUNDS):
        driver = new_driver()
        records = {**finished, **driver.progress.records}
        done = [s for s, record in records.items() if record["status"] in FINISHED]
        rows = driver.resume(pending, spec, done, trusted)
        if rows:
            driver.consume(dataset(rows))
        driver.finish()
        again = set(driver.remove_damaged())
        pending = [slide for slide in pending if slide.slide_id in again]
        if not pending:
            return


def _make_identity(config: ExtractConfig, networks: CheckedNetworks) -> RunIdentity:
    """Return every setting that changes results; a run folder has one such identity."""
    return RunIdentity(
        networks=networks.identity,
        segmenter=config.segmenter,
        segmenter_version=SEGMENTER_VERSIONS[config.segmenter],
        read_mpp=config.read_mpp,
        core_px=config.core_px,
        halo_px=config.halo_px,
        store_embeddings=config.store_embeddings,
        precision=config.precision,
        colours=None if config.colours_from is None else OF_EACH_SLIDE,
    )


def _check_nodes(
    config: ExtractConfig,
    identity: NetworkIdentity,
    run: RunFolder,
    cluster: Cluster,
    slides: list[SlideRow],
) -> tuple[str, ...]:
    """Stop a run that cannot succeed, before its work starts; return nodes to leave out."""
    weights = [
        (config.encoder, identity.encoder),
        (config.segmenter_weights, identity.segmenter_weights),
    ]
    gpus = uses_cluster_gpus(config.gpus, cluster.num_gpus)
    asked = asked_for(run.uri, weights, gpus=gpus)
    return check_before_run(asked, cluster, slides, imported=config.segmenter == "imported")


def _read_finished(run: RunFolder) -> dict[str, SlideRecord]:
    """Return the records of all slides of this run that are finished."""
    return {s: r for s, r in run.records().items() if r["status"] in FINISHED}


def _select_pending(
    slides: list[SlideRow], finished: Mapping[str, SlideRecord], progress: Progress
) -> list[SlideRow]:
    """Return the slides that are not finished; put the records of finished ones into `progress`."""
    wanted = {slide.slide_id for slide in slides}
    progress.records |= {s: record for s, record in finished.items() if s in wanted}
    return [slide for slide in slides if slide.slide_id not in finished]


def _sort_by_size(slides: list[SlideRow], sources: Mapping[str, SlideSource]) -> list[SlideRow]:
    """Return slides by size, so that no large slide begins when all other slides are done.

    Slides of unknown size come last, in the order of the manifest.
    """
    return sorted(slides, key=lambda slide: -(sources[slide.slide_id].get("bytes") or 0))


def _make_sample(config: ExtractConfig) -> CropSample | None:
    if config.crops is None:
        return None
    if config.slides is not None:
        # A sample of some slides would replace the sample of all slides.
        logger.warning(
            "no crops are made, since they are a sample of all slides: run the same command "
            "without `slides`"
        )
        return None
    caps = (config.crops_per_slide, config.crops_per_type)
    return CropSample(config.crops, *caps, seed=config.crops_seed)


def _make_resources(config: ExtractConfig, networks: CheckedNetworks) -> Resources:
    return Resources(
        config.workers,
        config.gpus,
        config.memory_gb or WORKER_GB,
        config.tiles_per_task,
        network_gb=0.0 if config.memory_gb else networks.bytes_on_cpu / 2**30,
        limits=Limits(config.max_attempts, config.tile_timeout_s, config.plan_timeout_s),
    )
