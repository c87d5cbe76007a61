"""`scellst-ray crossvalidate`: heads trained on some slides and scored on other slides.

This module lists the trials. evaluation/crossvalidation/trial.py runs one trial, training/grid.py
runs trials in parallel, and crossvalidate_report.py prints and writes their results.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from scellst_ray import storage
from scellst_ray.commands.training_configs import CrossvalidateConfig
from scellst_ray.evaluation.crossvalidation.folds import Fold, make_folds
from scellst_ray.evaluation.crossvalidation.trial import (
    SlideData,
    TrialSettings,
    prepare_slide,
    run_trial,
)
from scellst_ray.pipelines.session import ray_session
from scellst_ray.runs.folder import RunFolder, open_embedded_run
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.stages.supervision import Rules, TrainingSlide, training_slides
from scellst_ray.storage import node_cache
from scellst_ray.training.grid import (
    Prepare,
    Trial,
    TrialResources,
    Work,
    list_pending,
    prepare_inputs,
    run_trials,
    trial_uri,
)


@dataclass(frozen=True)
class Grid:
    """The results of a grid of trials.

    Attributes:
        results: One dict for each trial that is done: `trial`, `fold`, `panel`, `loss`, `seed`,
            `train_slides`, and what run_trial returns.
        failures: Reasons of failures, by trial.
        num_done_before: Number of trials that were done before.
        num_slots: Number of trials that ran at the same time; 0 if there was nothing to do.
    """

    results: list[dict[str, Any]]
    failures: dict[str, str]
    num_done_before: int
    num_slots: int


def make_trials(
    config: CrossvalidateConfig, folds: Sequence[Fold], run_digest: str
) -> tuple[list[Trial], dict[str, dict[str, Any]]]:
    """Return the trials of a grid, and by trial the columns that name it in tables.

    The name of a trial holds a digest of all that decides its result. So other settings, cells or
    slides make another trial.
    """
    trials, names = [], {}
    combinations = product(config.all_panels(), config.all_losses(), range(config.num_seeds), folds)
    for panel, loss, seed, fold in combinations:
        fit = config.fit_with(loss, seed)
        settings = TrialSettings(
            fold.train, fold.test, panel, fit, config.rules_for(fit), num_draws=config.bootstraps
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
    """Run the trials that are missing in `config.out`; return the results of all.

    Raises:
        ValueError: slides or spots cannot be used; the message lists all such slides.
    """
    cells, out = storage.absolute(config.cells), storage.absolute(config.out)
    run, _ = open_embedded_run(cells)
    slides = training_slides(read_manifest(config.manifest, ("spots",)), run, config.slides)
    patients = {s.row.slide_id: _text(s.row.columns.get("patient_id")) for s in slides}
    folds = make_folds(config.protocol, patients)
    trials, about = make_trials(config, folds, run.digest)
    folder = storage.join(out, "trials")
    inputs = {slide.row.slide_id: _identify(slide) for slide in slides}
    missing = _list_missing(folder, trials, inputs)
    say(f"{len(trials)} trials, {len(trials) - len(missing)} of them done before")
    failures: dict[str, str] = {}
    num_slots = 0
    if missing:
        preparer = _preparer(config, slides, run)
        work = partial(_run_noted, inputs)
        failures, num_slots = _run_missing(config, missing, preparer, work, folder, say)
    results = [
        {"trial": trial.name} | about[trial.name] | storage.read_json(trial_uri(folder, trial.name))
        for trial in trials
        if trial.name not in failures
    ]
    return Grid(results, failures, len(trials) - len(missing), num_slots)


def _identify(slide: TrainingSlide) -> str:
    """Return a text that changes with a slide's spots, and with the file its cells were found in.

    It is stored with each trial, so that a trial of other spots is not taken for done.
    """
    names = [slide.row.columns.get(name) for name in ("spots", "spot_positions")]
    marks = [str(node_cache.fingerprint(name)) for name in names if name]
    return " ".join([*marks, str(slide.source)])


def _run_noted(
    inputs: Mapping[str, str], settings: TrialSettings, slides: Mapping[str, SlideData]
) -> dict[str, Any]:
    """Run a trial; its result also says which inputs it had."""
    return run_trial(settings, slides) | {"inputs": {name: inputs[name] for name in slides}}


def _list_missing(folder: str, trials: Sequence[Trial], inputs: Mapping[str, str]) -> list[Trial]:
    """Return the trials without a result, or whose slides have other spots or cells now."""
    pending = {trial.name for trial in list_pending(folder, trials)}
    for trial in trials:
        if trial.name not in pending:
            # Trials of earlier releases do not say what inputs they had; they count.
            had = storage.read_json(trial_uri(folder, trial.name)).get("inputs", {})
            if any(inputs[name] != value for name, value in had.items() if name in inputs):
                pending.add(trial.name)
    return [trial for trial in trials if trial.name in pending]


def _run_missing(
    config: CrossvalidateConfig,
    missing: Sequence[Trial],
    preparer: Prepare,
    work: Work,
    folder: str,
    say: Callable[[str], None],
) -> tuple[dict[str, str], int]:
    """Run trials on Ray; return the reasons of failures, and how many run at the same time."""
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
        ended = run_trials(work, missing, prepared.refs, folder, resources)
        for number, (name, error) in enumerate(ended, start=1):
            say(f"{number} of {len(missing)}: {name}{f' failed: {error}' if error else ''}")
            if error:
                failures[name] = error
    return failures, num_slots


def _preparer(
    config: CrossvalidateConfig, slides: Sequence[TrainingSlide], run: RunFolder
) -> Prepare:
    """Return the function that prepares a slide, given its slide_id."""
    rules = [config.rules_for(config.fit_with(loss, 0)) for loss in config.all_losses()]
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
