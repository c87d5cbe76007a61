"""`scellst-ray retry`: resume a run, given only its folder."""

import logging
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from typing import Any, get_type_hints

from scellst_ray import storage
from scellst_ray.commands.configs import RetryConfig
from scellst_ray.commands.progress import shown_progress
from scellst_ray.commands.run_end import summarise
from scellst_ray.core.names import check_names
from scellst_ray.models.mil.stored_head import HEAD_FILE
from scellst_ray.pipelines.extract import extract
from scellst_ray.pipelines.predict import predict
from scellst_ray.pipelines.progress import Report
from scellst_ray.runs.documents import mismatch
from scellst_ray.runs.folder import CONFIG_FILE, FINISHED, read_config
from scellst_ray.runs.reading import Run, open_run
from scellst_ray.runs.records import SlideRecord
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.stages.config import ExtractConfig, PredictConfig

Records = dict[str, SlideRecord]
JOBS: dict[str, tuple[type[ExtractConfig], Callable[..., Records]]] = {
    "extract": (ExtractConfig, extract),
    "predict": (PredictConfig, predict),
}
logger = logging.getLogger(__name__)


OF_RETRY = ("run", "failed", "slides")


def retry(config: RetryConfig, report: Report = lambda _: None) -> Records:
    """Run the job of a folder again; return the records of its slides.

    Raises:
        FileNotFoundError: there is no run, or its manifest was removed.
        ValueError: its configuration is of another release, or a slide is unknown or done.
    """
    run = open_run(storage.absolute(config.run))
    job = str(run.info.get("identity", {}).get("job"))
    if job not in JOBS:
        message = f"{run.uri}: a run of {job}; only runs of {' and '.join(JOBS)} can be resumed"
        raise ValueError(message)
    kind, function = JOBS[job]
    stored = read_config(run.uri)
    names = {f.name for f in fields(kind)}
    if not stored or not set(stored) <= names:
        unknown = ", ".join(sorted(set(stored) - names)) or "nothing"
        message = f"{run.uri}/config.yaml: holds {unknown}; run `scellst-ray {job}` with its flags"
        raise ValueError(message)
    given = {name: value for name, value in asdict(config).items() if name not in OF_RETRY}
    values = stored | {name: value for name, value in given.items() if value is not None}
    # The folder may have been moved. It holds a copy of the head.
    values |= {"out": run.uri, "slides": None}
    if "head" in names:
        values["head"] = storage.join(run.uri, HEAD_FILE)
    if config.failed or config.slides is not None:
        settings = _settings(kind, values, run.uri)
        values["slides"] = _choose_slides(run, settings.manifest, config.slides)
        if not values["slides"]:
            return {}
    return function(_settings(kind, values, run.uri), report)


def _settings(kind: type[ExtractConfig], values: dict[str, Any], run_uri: str) -> ExtractConfig:
    """Return the settings of a job, from values that anybody may have edited.

    Raises:
        ValueError: a value is of another type, out of range, or absent.
    """
    source = f"{run_uri}/{CONFIG_FILE}"
    hints = get_type_hints(kind)
    problems = (mismatch(value, hints[name], name) for name, value in values.items())
    problem = next((text for text in problems if text is not None), None)
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in values]
    if missing:
        problem = f"has no {', '.join(missing)}"
    if problem is None:
        try:
            return kind(**values)
        except ValueError as error:
            problem = str(error)
    job = next(name for name, (other, _) in JOBS.items() if other is kind)
    message = f"{source}: {problem}; mend it, or run `scellst-ray {job}` with its flags"
    raise ValueError(message)


def _choose_slides(run: Run, manifest: str, slides: list[str] | None) -> list[str]:
    """Return the given slides, or else those of the manifest that failed or are partial.

    Raises:
        ValueError: a given slide is not in the manifest, or it is done.
    """
    in_manifest = {slide.slide_id for slide in read_manifest(manifest)}
    if slides is not None:
        chosen = check_names(slides, sorted(in_manifest), f"{manifest}: slide_ids")
        done = [s for s in chosen if s in run.records and run.records[s]["status"] in FINISHED]
        if done:
            message = f"{run.uri}: slide(s) {', '.join(done)} are done; give other slides"
            raise ValueError(message)
        return chosen
    unfinished = {s for s, record in run.records.items() if record["status"] not in FINISHED}
    if unfinished - in_manifest:
        text = "slides that are not in %s stay as they are: %s"
        logger.warning(text, manifest, ", ".join(sorted(unfinished - in_manifest)))
    return sorted(unfinished & in_manifest)


def run_retry(config: RetryConfig) -> int:
    """Run `retry`; return 0 only if every slide that it processed is done or empty."""
    with shown_progress() as report:
        records = retry(config, report)
    return summarise(records, config.run)
