"""Trials as Ray tasks: results are kept, and a failed trial affects no other."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from ray import cloudpickle

from scellst_ray.training.grid import (
    Trial,
    TrialResources,
    list_pending,
    prepare_inputs,
    run_trials,
    trial_uri,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("by_value", "local_ray")]


@pytest.fixture(scope="module")
def by_value():
    # Workers cannot import this file, so its functions are sent by value.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def prepare(folder, name):
    """Return an array for a name; write a file to show that it was made."""
    if name == "bad":
        message = "slide bad: no spots\nand more"
        raise ValueError(message)
    with (folder / f"prepared_{name}").open("a") as file:
        file.write("x")
    return {"name": name}, np.full(300_000, float(len(name)))


def work(folder, settings, inputs):
    """Return sums of inputs; die or fail if the settings say so."""
    with (folder / f"worked_{settings['number']}").open("a") as file:
        file.write("x")
    if settings.get("dies") and not (folder / "died").exists():
        (folder / "died").touch()
        os._exit(1)
    if settings.get("fails"):
        message = f"trial {settings['number']} cannot be fitted"
        raise ValueError(message)
    return {"number": settings["number"], "sums": {k: float(v.sum()) for k, v in inputs.items()}}


def make_trials(**special):
    names = [("a",), ("bb",), ("a", "bb")] * 2
    return [
        Trial(f"t{number}", {"number": number} | special.get(f"t{number}", {}), inputs)
        for number, inputs in enumerate(names)
    ]


def test_trials_equal_a_plain_loop_and_slides_are_prepared_once(tmp_path):
    prepared = prepare_inputs(partial(prepare, tmp_path), ["a", "bb"], TrialResources())
    assert prepared.errors == {}
    assert prepared.reports == {"a": {"name": "a"}, "bb": {"name": "bb"}}
    trials, folder = make_trials(), str(tmp_path / "trials")
    ended = dict(
        run_trials(partial(work, tmp_path), trials, prepared.refs, folder, TrialResources())
    )
    assert ended == {trial.name: None for trial in trials}
    data = {name: prepare(tmp_path, name)[1] for name in ("a", "bb")}
    for trial in trials:
        plain = work(tmp_path, trial.settings, {name: data[name] for name in trial.inputs})
        with Path(trial_uri(folder, trial.name)).open() as file:
            assert json.load(file) == plain
    assert (tmp_path / "prepared_a").read_text() == "xx"  # on Ray, and here


def test_what_fails_is_reported_and_tried_again_alone(tmp_path):
    refs = prepare_inputs(partial(prepare, tmp_path), ["a", "bb"], TrialResources()).refs
    folder = str(tmp_path / "trials")
    trials = make_trials(t2={"fails": True})
    run = partial(run_trials, partial(work, tmp_path))
    ended = dict(run(trials, refs, folder, TrialResources()))
    assert ended.pop("t2") == "ValueError: trial 2 cannot be fitted"
    assert set(ended.values()) == {None}
    assert [trial.name for trial in list_pending(folder, trials)] == ["t2"]
    corrected = make_trials()
    assert dict(run(list_pending(folder, corrected), refs, folder, TrialResources())) == {
        "t2": None
    }
    assert list_pending(folder, corrected) == []
    counts = [len((tmp_path / f"worked_{number}").read_text()) for number in range(6)]
    assert counts == [1, 1, 2, 1, 1, 1]


def test_a_trial_whose_worker_dies_is_done_again(tmp_path):
    refs = prepare_inputs(partial(prepare, tmp_path), ["a", "bb"], TrialResources()).refs
    trials = make_trials(t1={"dies": True})
    folder = str(tmp_path / "trials")
    ended = dict(run_trials(partial(work, tmp_path), trials, refs, folder, TrialResources()))
    assert set(ended.values()) == {None}
    assert (tmp_path / "died").exists()
    assert (tmp_path / "worked_1").read_text() == "xx"
    assert list_pending(folder, trials) == []


def test_a_trial_that_keeps_dying_is_given_up(tmp_path):
    refs = prepare_inputs(partial(prepare, tmp_path), ["a", "bb"], TrialResources()).refs
    folder, trials = str(tmp_path / "trials"), make_trials(t0={"dies": True})[:2]
    ended = dict(
        run_trials(partial(work, tmp_path), trials, refs, folder, TrialResources(max_retries=0))
    )
    assert ended["t0"].startswith("WorkerCrashedError")
    assert ended["t1"] is None


def test_inputs_that_cannot_be_prepared_are_named(tmp_path):
    prepared = prepare_inputs(partial(prepare, tmp_path), ["a", "bad"], TrialResources())
    assert prepared.errors == {"bad": "ValueError: slide bad: no spots"}
    assert set(prepared.refs) == {"a"}


def test_nothing_is_done_in_an_empty_folder(tmp_path):
    trials = make_trials()
    assert list_pending(str(tmp_path / "none"), trials) == trials
