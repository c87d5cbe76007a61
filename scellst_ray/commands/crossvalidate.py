"""`scellst-ray crossvalidate`: heads trained on some slides and scored on others, over a grid.

Trials in evaluation/crossvalidation/trial.py, run by training/grid.py; here is which there are.
crossvalidate_report.py prints and writes what they found.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

from scellst_ray import storage
from scellst_ray.evaluation.crossvalidation.folds import Fold, Protocol, make_folds
from scellst_ray.evaluation.crossvalidation.trial import (
    SlideData,
    TrialSettings,
    prepare_slide,
    run_trial,
)
from scellst_ray.models.mil.fit import FitConfig
from scellst_ray.pipelines.session import ray_session
from scellst_ray.runs.folder import RunFolder
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.spots.panel import CountFilter
from scellst_ray.spots.selection import parse_rule
from scellst_ray.stages.supervision import Rules, TrainingSlide, training_slides
from scellst_ray.training.grid import (
    Prepare,
    Trial,
    TrialResources,
    pending,
    prepare_inputs,
    run_trials,
    trial_uri,
)


@dataclass(frozen=True, kw_only=True)
class CrossvalidateConfig:
    """Heads trained on some slides and scored on others: folds by panels, losses and seeds."""

    manifest: str
    """Slides with spots, as for `train`; patient_id for leave-one-patient-out."""
    cells: str
    """Run folder of `extract` that holds the CELLS of these slides."""
    out: str
    """Folder for trials and the table of results."""
    protocol: Protocol = "leave-one-slide-out"
    """single-slide: train on one, score on each other."""
    slides: list[str] | None = None
    """slide_ids (a,b); by default every row with spots."""
    panels: list[str] | None = None
    """Rules of gene panels as genes of `train` (a,b), by default variable:250; each is applied to
    a trial's training slides."""
    losses: list[str] | None = None
    """Of mse, nb and nb_total (a,b); by default mse."""
    num_seeds: int = 1
    """Seeds 0, 1, ...: of weights, split and order."""
    predictor: Literal["ours", "published"] = "ours"
    """As of `train`."""
    ensemble: int = 1
    """As of `train`."""
    min_gene_counts: int = 200
    """As of `train`."""
    min_spot_share: float = 0.1
    """As of `train`."""
    min_spot_counts: int = 20
    """As of `train`."""
    keep_mitochondrial: bool = False
    """As of `train`."""
    check_alignment: bool = True
    """As of `train`."""
    learning_rate: float = 1e-4
    """Of AdamW."""
    weight_decay: float = 0.01
    """Of AdamW."""
    batch_spots: int = 128
    """Spots per step."""
    max_epochs: int = 400
    """At most this many epochs."""
    patience: int = 20
    """Epochs without a better validation loss before stopping."""
    val_share: float = 0.2
    """Share of each training slide's spots held out for early stopping."""
    colour: bool = True
    """Compare with the colour-only ridge; it reads the discs of all spots, once."""
    bootstraps: int = 200
    """Draws of spots for 95 % intervals of each trial; 0 for none."""
    cpus_per_trial: int = 1
    """CPUs of each trial: one is the most efficient while there are more trials than CPUs."""
    gpus_per_trial: float = 0.0
    """GPUs of each trial, such as 0.25 for four side by side."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for panel in self.all_panels():
            parse_rule(panel)
        for loss in self.all_losses():
            fit = self.fit_config(loss, 0)
            assert fit.loss == loss
            self.rules(fit)
        for name, least in (("num_seeds", 1), ("cpus_per_trial", 1), ("bootstraps", 0)):
            if getattr(self, name) < least:
                message = f"{name} is {getattr(self, name)}; it must be at least {least}"
                raise ValueError(message)
        if self.gpus_per_trial < 0:
            message = f"gpus_per_trial is {self.gpus_per_trial}; it must not be negative"
            raise ValueError(message)

    def all_panels(self) -> list[str]:
        """Return the rules of panels."""
        return self.panels or ["variable:250"]

    def all_losses(self) -> list[str]:
        """Return the losses."""
        return self.losses or ["mse"]

    def fit_config(self, loss: str, seed: int) -> FitConfig:
        """Return how a head is fitted."""
        return FitConfig(
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            batch_spots=self.batch_spots,
            max_epochs=self.max_epochs,
            patience=self.patience,
            seed=seed,
            val_share=self.val_share,
            predictor=self.predictor,
            loss=loss,  # type: ignore[arg-type] # checked by it
            ensemble=self.ensemble,
        )

    def rules(self, fit: FitConfig) -> Rules:
        """Return how spots become supervision."""
        limits = CountFilter(
            min_gene_counts=self.min_gene_counts,
            min_spot_share=self.min_spot_share,
            min_spot_counts=self.min_spot_counts,
            drop_prefix="" if self.keep_mitochondrial else "MT-",
        )
        counts = fit.formula().counts
        return Rules(limits, with_counts=counts, check_alignment=self.check_alignment)


@dataclass(frozen=True)
class Grid:
    """What became of a grid.

    Attributes:
        results: Of every trial that is done: `trial`, `fold`, `panel`, `loss`, `seed`,
            `train_slides`, and what run_trial returns.
        failures: By trial, why it failed.
        num_done_before: Trials that were done already.
        num_slots: Trials that ran side by side; 0 if there was nothing to do.
    """

    results: list[dict[str, Any]]
    failures: dict[str, str]
    num_done_before: int
    num_slots: int


def make_trials(
    config: CrossvalidateConfig, folds: Sequence[Fold], run_digest: str
) -> tuple[list[Trial], dict[str, dict[str, Any]]]:
    """Return the trials of a grid, and what names each in tables.

    A trial's name holds a digest of all that decides its result, so that other settings, cells or
    slides are other trials.
    """
    trials, names = [], {}
    combinations = product(config.all_panels(), config.all_losses(), range(config.num_seeds), folds)
    for panel, loss, seed, fold in combinations:
        fit = config.fit_config(loss, seed)
        settings = TrialSettings(
            fold.train, fold.test, panel, fit, config.rules(fit), num_draws=config.bootstraps
        )
        facts = asdict(settings) | {"run": run_digest, "colour": config.colour}
        text = json.dumps(facts, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        about = {"fold": fold.name, "panel": panel, "loss": loss, "seed": seed}
        words = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(map(str, about.values())))[:80].strip("-")
        trial = Trial(
            f"{words}-{digest}",
            replace(settings, num_threads=config.cpus_per_trial, use_gpu=config.gpus_per_trial > 0),
            (*fold.train, *fold.test),
        )
        trials.append(trial)
        names[trial.name] = about | {"train_slides": list(fold.train)}
    return trials, names


def crossvalidate(config: CrossvalidateConfig, say: Callable[[str], None] = print) -> Grid:
    """Run the trials that are missing in `config.out`; return what all of them found.

    Raises:
        ValueError: slides or spots cannot be used; all such slides are listed at once.
    """
    cells, out = storage.absolute(config.cells), storage.absolute(config.out)
    run = open_cells(cells)
    slides = training_slides(read_manifest(config.manifest, ("spots",)), run, config.slides)
    patients = {s.row.slide_id: _text(s.row.columns.get("patient_id")) for s in slides}
    folds = make_folds(config.protocol, patients)
    trials, about = make_trials(config, folds, run.digest)
    folder = storage.join(out, "trials")
    missing = pending(folder, trials)
    say(f"{len(trials)} trials, {len(trials) - len(missing)} of them done before")
    failures: dict[str, str] = {}
    num_slots = 0
    if missing:
        preparer = _preparer(config, slides, run)
        failures, num_slots = _run_missing(config, missing, preparer, folder, say)
    results = [
        {"trial": trial.name} | about[trial.name] | storage.read_json(trial_uri(folder, trial.name))
        for trial in trials
        if trial.name not in failures
    ]
    return Grid(results, failures, len(trials) - len(missing), num_slots)


def _run_missing(
    config: CrossvalidateConfig,
    missing: Sequence[Trial],
    preparer: Prepare,
    folder: str,
    say: Callable[[str], None],
) -> tuple[dict[str, str], int]:
    """Run trials on Ray; return why some failed, and how many run side by side."""
    failures: dict[str, str] = {}
    with ray_session() as cluster:
        resources = TrialResources(config.cpus_per_trial, config.gpus_per_trial)
        num_slots = max(1, cluster.num_cpus // config.cpus_per_trial)
        if config.gpus_per_trial:
            num_slots = min(num_slots, int(cluster.num_gpus / config.gpus_per_trial))
        wanted = sorted({name for trial in missing for name in trial.inputs})
        prepared = prepare_inputs(preparer, wanted, TrialResources())
        if prepared.errors:
            listed = "; ".join(f"{name}: {text}" for name, text in prepared.errors.items())
            message = f"cannot use {len(prepared.errors)} of {len(wanted)} slides: {listed}"
            raise ValueError(message)
        for name, report in prepared.reports.items():
            say(f"{name}: {report['num_spots']} spots with {report['num_cells']} cells")
        ended = run_trials(run_trial, missing, prepared.refs, folder, resources)
        for number, (name, error) in enumerate(ended, start=1):
            say(f"{number} of {len(missing)}: {name}{f' failed: {error}' if error else ''}")
            if error:
                failures[name] = error
    return failures, num_slots


def open_cells(cells: str) -> RunFolder:
    """Return a run of `extract` with embeddings.

    Raises:
        ValueError: there is none, or it stores no embeddings.
    """
    uri = storage.join(cells, "run.json")
    if not storage.exists(uri):
        message = f"{cells}: no run of scellst_ray there; run `scellst-ray extract` first"
        raise ValueError(message)
    info = storage.read_json(uri)
    if not info["identity"].get("store_embeddings"):
        message = f"{cells}: its cells have no embeddings; extract with store_embeddings"
        raise ValueError(message)
    return RunFolder(cells, info["digest"])


def _preparer(
    config: CrossvalidateConfig, slides: Sequence[TrainingSlide], run: RunFolder
) -> Prepare:
    """Return the function that prepares a slide by its name."""
    rules = [config.rules(config.fit_config(loss, 0)) for loss in config.all_losses()]
    strictest = max(rules, key=lambda rule: rule.with_counts)
    by_id = {slide.row.slide_id: slide for slide in slides}
    return partial(_prepare, by_id, run, strictest, config.colour)


def _prepare(
    slides: Mapping[str, TrainingSlide],
    run: RunFolder,
    rules: Rules,
    colour: bool,  # noqa: FBT001 - bound by partial
    name: str,
) -> tuple[dict[str, Any], SlideData]:
    return prepare_slide(slides[name], run, rules, colour=colour)


def _text(value: object) -> str | None:
    return None if value is None or not str(value).strip() else str(value).strip()
