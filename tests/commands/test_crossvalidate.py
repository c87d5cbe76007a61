"""Cross-validation: names of trials, the grid, its tables."""

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from scellst_ray import storage
from scellst_ray.commands import crossvalidate as crossvalidate_module
from scellst_ray.commands import crossvalidate_report
from scellst_ray.commands.crossvalidate import crossvalidate, make_trials
from scellst_ray.commands.crossvalidate_report import results_table, run_crossvalidate, summary
from scellst_ray.evaluation.crossvalidation.folds import make_folds
from scellst_ray.evaluation.crossvalidation.trial import run_trial
from scellst_ray.runs.folder import open_embedded_run
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.stages.supervision import TrainingSlide
from scellst_ray.training.grid import Trial
from tests.support import crossvalidation
from tests.support.crossvalidation import trial_of

small, make_config, slides = (
    crossvalidation.small,
    crossvalidation.make_config,
    crossvalidation.slides,
)  # fixtures


def test_a_trial_is_named_by_all_that_decides_its_result(make_config):
    name = trial_of(make_config()).name
    assert name == trial_of(make_config(cpus_per_trial=2)).name
    assert name.startswith("s0-variable-5-mse-0-")
    changes = [
        {"learning_rate": 1e-3},
        {"panels": ["variable:4"]},
        {"losses": ["nb"]},
        {"min_spot_counts": 2},
        {"bootstraps": 0},
        {"colour": True},
    ]
    assert len({name, *(trial_of(make_config(**change)).name for change in changes)}) == 7
    config = make_config(panels=["variable:4", "hvg:5"], losses=["mse", "nb"], num_seeds=3)
    folds = make_folds("single-slide", {"s0": None, "s1": None})
    trials, about = make_trials(config, folds, "digest")
    assert len({trial.name for trial in trials}) == len(about) == 2 * 2 * 3 * 2
    assert {len(trial.inputs) for trial in trials} == {2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_seeds": 0}, "num_seeds is 0"),
        ({"losses": ["l1"]}, "loss is l1, expected one of mse, nb"),
        ({"panels": ["hvg:x"]}, "genes is 'hvg:x'"),
        ({"gpus_per_trial": -1.0}, "gpus_per_trial is -1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make_config, changes, words):
    with pytest.raises(ValueError, match=words):
        make_config(**changes)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_grid_is_a_loop_and_is_taken_up_again(slides, make_config, monkeypatch):
    config = make_config(losses=["mse", "nb"], num_seeds=2, max_epochs=3)
    console = Console(record=True, width=100)
    monkeypatch.setattr(crossvalidate_report, "Console", lambda: console)
    assert run_crossvalidate(config) == 0
    shown = console.export_text()
    assert "8 trials, 0 of them done before" in shown
    out = config.out
    results = pl.read_parquet(f"{out}/results.parquet")
    assert len(results) == 8 * 3
    folds = make_folds("leave-one-slide-out", {"s0": None, "s1": None})
    trials, _ = make_trials(config, folds, open_embedded_run(config.cells)[0].digest)
    for trial in trials:
        plain = run_trial(trial.settings, slides[0])
        mine = results.filter(pl.col("trial") == trial.name)
        for row in mine.iter_rows(named=True):
            expected = plain["scores"][row["test_slide"]]["models"][row["model"]]
            for metric in ("pcc", "pcc_given_depth", "rmse", "pcc_low"):
                assert row[metric] == pytest.approx(expected.get(metric), abs=1e-4)
    # Again: one is missing, and it alone is done.
    lost = f"{out}/trials/{trials[3].name}.json"
    before = json.loads(Path(lost).read_text())
    storage.remove_tree(lost)
    said = []
    again = crossvalidate(config, said.append)
    assert said[0] == "8 trials, 7 of them done before"
    assert len(again.results) == 8
    after = next(r for r in again.results if r["trial"] == trials[3].name)
    assert after["scores"] == before["scores"]
    third = crossvalidate(config, said.append)
    assert (third.num_done_before, third.num_slots) == (8, 0)
    assert sorted(before["inputs"]) == ["s0", "s1"]
    # The means are over seeds and slides.
    row = summary(results).filter((pl.col("loss") == "nb") & (pl.col("model") == "ours"))
    mine = results.filter((pl.col("loss") == "nb") & (pl.col("model") == "ours"))
    assert row["pcc"][0] == pytest.approx(mine["pcc"].mean())
    assert (row["num_slides"][0], row["num_trials"][0]) == (2, 4)
    assert results_table(third).equals(results_table(again))
    genes = pl.read_parquet(f"{out}/genes.parquet")
    assert len(genes) == 8 * 3 * 5
    assert Path(out, "results.md").read_text().count("| s1 | s1 |") == 12


def test_a_trial_of_other_spots_is_missing(tmp_path):
    spots = tmp_path / "spots.tsv"
    spots.write_text("one")
    slide = TrainingSlide(SlideRow("s0", "s0.tiff", 0.5, columns={"spots": str(spots)}), 0.5)
    inputs = {"s0": crossvalidate_module._identify(slide), "s1": "known"}
    trials = [Trial(name, {}, ("s0", "s1")) for name in ("done", "old", "new")]
    storage.publish_json(f"{tmp_path}/trials/done.json", {"scores": {}, "inputs": inputs})
    storage.publish_json(f"{tmp_path}/trials/old.json", {"scores": {}})  # of an earlier release

    def missing(inputs):
        found = crossvalidate_module._list_missing(f"{tmp_path}/trials", trials, inputs)
        return [trial.name for trial in found]

    assert missing(inputs) == ["new"]
    spots.write_text("two")
    assert missing(inputs | {"s0": crossvalidate_module._identify(slide)}) == ["done", "new"]
    cells = replace(slide, source="cells of another file")
    assert missing(inputs | {"s0": crossvalidate_module._identify(cells)}) == ["done", "new"]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_slide_that_cannot_be_used_is_named_before_anything_runs(make_config):
    config = make_config(min_gene_counts=10**9)
    with pytest.raises(ValueError, match=r"cannot use 2 of 2 slides: s0: ValueError: .*; s1"):
        crossvalidate(config, lambda _: None)


def test_a_failed_trial_is_reported_and_makes_the_command_fail(make_config, monkeypatch):
    config = make_config()
    console = Console(record=True, width=100)
    monkeypatch.setattr(crossvalidate_report, "Console", lambda: console)
    failed = crossvalidate_report.Grid([], {"t1": "ValueError: no"}, 0, 2)
    monkeypatch.setattr(crossvalidate_report, "crossvalidate", lambda *_: failed)
    assert run_crossvalidate(config) == 1
    assert "failed: t1: ValueError: no" in console.export_text()
