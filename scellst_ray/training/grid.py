"""Many independent trials as Ray tasks: each a file when done, so that a grid is taken up again.

Slides are prepared once and shared by all trials of a node through Ray's object store; a trial is
one task. What is run comes from above: functions and settings that travel to the workers.
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
    """One trial.

    Attributes:
        name: Unique, safe as a file name; another name for other settings.
        settings: What the work is told.
        inputs: Names of the prepared inputs it is given.
    """

    name: str
    settings: Any
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class TrialResources:
    """What a task takes.

    Attributes:
        cpus: Of each task.
        gpus: Of each trial; a part of one if less than 1.
        max_retries: How often a task whose process or node died is done again.
    """

    cpus: float = 1
    gpus: float = 0
    max_retries: int = 3


@dataclass(frozen=True)
class Prepared:
    """Inputs that lie in the object store.

    Attributes:
        refs: By name.
        reports: What `prepare` told of each.
        errors: Why others could not be prepared.
    """

    refs: dict[str, Any]
    reports: dict[str, Any]
    errors: dict[str, str]


def prepare_inputs(prepare: Prepare, names: Sequence[str], resources: TrialResources) -> Prepared:
    """Prepare inputs in parallel; they stay on the nodes that made them until they are used.

    Args:
        prepare: Returns (a small report, the input) for a name. An input that is lost with its
            node is prepared again by Ray.
        names: Of the inputs.
        resources: What each takes (no GPU).
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
    """Return where a trial's result is, once it is done."""
    return storage.join(folder, f"{name}.json")


def pending(folder: str, trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials without a result."""
    done = {uri.rsplit("/", 1)[-1] for uri in storage.list_files(folder)}
    return [trial for trial in trials if f"{trial.name}.json" not in done]


def run_trials(
    work: Work,
    trials: Sequence[Trial],
    refs: Mapping[str, Any],
    folder: str,
    resources: TrialResources,
) -> Iterator[tuple[str, str | None]]:
    """Run trials in parallel; yield each as it ends: its name, and why it failed or None.

    A worker publishes its trial's result itself, so that what is done is done also when the driver
    dies. A trial that failed costs no other; nothing is stored of it, and the next run tries again.

    Args:
        work: Returns a trial's result, as JSON, from its settings and inputs by name.
        trials: In the order in which they begin.
        refs: See Prepared.
        folder: Where results go; on a cluster, where every node sees it.
        resources: What each takes.
    """
    task: Any = ray.remote(
        num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=resources.max_retries
    )(_run_trial)
    names = {}
    for trial in trials:
        # Refs as arguments of their own, so that Ray brings inputs near before it starts a task.
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
    """Return a task's error in one line: its own if it raised one, else what became of it."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
