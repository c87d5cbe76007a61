"""Grids: many independent trials, each one Ray task that writes its result to a file.

A grid that was interrupted continues with the trials that have no file. Inputs, such as slides, are
prepared once and shared by all trials of a node through Ray's object store. The caller gives the
functions and settings that run on the workers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from scellst_ray import storage

Prepare = Callable[[str], tuple[Any, Any]]
Work = Callable[[Any, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Trial:
    """One trial of a grid.

    Attributes:
        name: Unique name, safe as a file name. Other settings must have another name.
        settings: Settings for the work function.
        inputs: Names of the prepared inputs for the work function.
    """

    name: str
    settings: Any
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class TrialResources:
    """Resources of a task.

    Attributes:
        cpus: CPUs of each task.
        gpus: GPUs of each trial; a part of a GPU if less than 1.
        max_retries: Number of times that a task is repeated if its process or node died.
    """

    cpus: float = 1
    gpus: float = 0
    max_retries: int = 3


@dataclass(frozen=True)
class Prepared:
    """Inputs in Ray's object store.

    Attributes:
        refs: Object reference of each input, by name.
        reports: Report of each input, by name.
        errors: Error text of each input that could not be prepared, by name.
    """

    refs: dict[str, Any]
    reports: dict[str, Any]
    errors: dict[str, str]


def prepare_inputs(prepare: Prepare, names: Sequence[str], resources: TrialResources) -> Prepared:
    """Prepare inputs in parallel; they stay on the nodes that made them until they are used.

    Args:
        prepare: Returns (a small report, the input) for a name. If a node is lost, Ray prepares
            its inputs again.
        names: Names of the inputs.
        resources: Resources of each task; its GPUs are not used.
    """
    task: Any = ray.remote(
        num_returns=2, num_cpus=resources.cpus, max_retries=resources.max_retries
    )(_prepare)
    pairs = {name: task.remote(prepare, name) for name in names}
    refs, reports, errors = {}, {}, {}
    for name, (report, ref) in pairs.items():
        try:
            reports[name] = ray.get(report)
            refs[name] = ref
        except RayError as error:
            errors[name] = error_text(error)
    return Prepared(refs, reports, errors)


def _prepare(prepare: Prepare, name: str) -> tuple[Any, Any]:
    return prepare(name)


def trial_uri(folder: str, name: str) -> str:
    """Return the address of a trial's result."""
    return storage.join(folder, f"{name}.json")


def list_pending(folder: str, trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that have no result in the folder."""
    done = {uri.rsplit("/", 1)[-1] for uri in storage.list_files(folder)}
    return [trial for trial in trials if f"{trial.name}.json" not in done]


def run_trials(
    work: Work,
    trials: Sequence[Trial],
    refs: Mapping[str, Any],
    folder: str,
    resources: TrialResources,
) -> Iterator[tuple[str, str | None]]:
    """Run trials in parallel; yield (name, error text or None) of each trial as it ends.

    Workers publish the results themselves, so finished trials survive the death of the driver. A
    failed trial does not affect other trials. It leaves no file, so the next run repeats it.

    Args:
        work: Returns the result of a trial, for JSON, from its settings and its inputs by name.
        trials: Trials, in the order in which they begin.
        refs: Object references of the inputs (see Prepared).
        folder: Folder for results; every node of a cluster must see it.
        resources: Resources of each trial.
    """
    task: Any = ray.remote(
        num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=resources.max_retries
    )(_run_trial)
    names = {}
    for trial in trials:
        # Each ref is an argument, so that Ray moves inputs to the node before it starts a task.
        uri, inputs = trial_uri(folder, trial.name), [refs[name] for name in trial.inputs]
        names[task.remote(work, uri, trial.settings, trial.inputs, *inputs)] = trial.name
    while names:
        (ended,), _ = ray.wait(list(names), num_returns=1)
        name = names.pop(ended)
        try:
            ray.get(ended)
        except RayError as error:
            yield name, error_text(error)
        else:
            yield name, None


def _run_trial(work: Work, uri: str, settings: Any, names: Sequence[str], *inputs: Any) -> None:  # noqa: ANN401
    storage.publish_json(uri, work(settings, dict(zip(names, inputs, strict=True))))


def error_text(error: RayError) -> str:
    """Return the error of a task in one line: the error it raised, else Ray's own error."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
