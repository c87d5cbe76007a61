"""Cross-validation: folds, one trial against a plain fit, the grid, its tables."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console

from scellst_ray import storage
from scellst_ray.commands import crossvalidate_report
from scellst_ray.commands.crossvalidate import (
    CrossvalidateConfig,
    crossvalidate,
    make_trials,
    open_cells,
)
from scellst_ray.commands.crossvalidate_report import results_table, run_crossvalidate, summary
from scellst_ray.evaluation.crossvalidation.folds import make_folds
from scellst_ray.evaluation.crossvalidation.trial import learn as learn_trial
from scellst_ray.evaluation.crossvalidation.trial import prepare_slide, run_trial, score, section
from scellst_ray.evaluation.expression.metrics import partial_pearson_by_column, pearson_by_column
from scellst_ray.models.mil.bags import split_spots
from scellst_ray.models.mil.fit import fit_head, new_head
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.stages.bags import choose_panel, make_bags
from scellst_ray.stages.networks import vectors
from scellst_ray.stages.supervision import training_slides
from scellst_ray.training.bag_files import load_bags
from tests.support.small_run import DIM, write_small_run

LOOSE = {
    "min_gene_counts": 5,
    "min_spot_share": 0.0,
    "min_spot_counts": 1,
    "learning_rate": 3e-3,
    "max_epochs": 4,
    "batch_spots": 16,
    "colour": False,
    "bootstraps": 20,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def make_config(small, tmp_path_factory):
    """Return a function that makes a configuration with a folder of its own."""

    def make(**changes):
        settings = {"manifest": str(small.manifest), "cells": small.run.uri}
        settings["out"] = str(tmp_path_factory.mktemp("out"))
        return CrossvalidateConfig(**(settings | LOOSE | {"panels": ["variable:5"]} | changes))

    return make


@pytest.fixture(scope="module")
def slides(small, make_config):
    """Return both slides as the trials are given them, and as `train` is."""
    config = make_config()
    found = training_slides(read_manifest(str(small.manifest)), small.run, None)
    rules = config.rules(config.fit_config("nb", 0))
    data = {s.row.slide_id: prepare_slide(s, small.run, rules, colour=False)[1] for s in found}
    return data, found


def trial_of(config, number=0):
    folds = make_folds("leave-one-slide-out", {"s0": None, "s1": None})
    return make_trials(config, folds, "digest")[0][number]


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("leave-one-slide-out", [("a", "bc", "a"), ("b", "ac", "b"), ("c", "ab", "c")]),
        ("single-slide", [("a", "a", "bc"), ("b", "b", "ac"), ("c", "c", "ab")]),
        ("leave-one-patient-out", [("P", "b", "ac"), ("Q", "ac", "b")]),
    ],
)
def test_folds(protocol, expected):
    folds = make_folds(protocol, {"a": "P", "b": "Q", "c": "P"})
    assert [(f.name, "".join(f.train), "".join(f.test)) for f in folds] == expected


@pytest.mark.parametrize(
    ("protocol", "patients", "words"),
    [
        ("leave-one-slide-out", {"a": "P"}, "1 slides with spots"),
        ("leave-one-patient-out", {"a": "P", "b": None}, r"slides \['b'\] have none"),
        ("leave-one-patient-out", {"a": "P", "b": "P"}, "all slides are of P"),
    ],
)
def test_folds_that_cannot_be_are_refused(protocol, patients, words):
    with pytest.raises(ValueError, match=words):
        make_folds(protocol, patients)


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


@pytest.mark.parametrize("loss", ["mse", "nb"])
def test_a_trial_is_what_train_would_do(slides, small, make_config, tmp_path, loss):
    config = make_config(losses=[loss])
    settings = trial_of(config, 1).settings
    data, found = slides
    assert settings.train_slides == ("s0",)
    learnt = learn_trial(settings, [data["s0"]])
    rules = settings.rules
    panel = choose_panel(found[:1], "variable:5", small.run, rules).genes
    assert learnt.panel == panel
    make_bags(found[0], panel, small.run, str(tmp_path), rules)
    bags, slide_ids = load_bags([str(tmp_path / "bags" / "s0.parquet")], counts=loss == "nb")
    train_spots, val_spots = split_spots(slide_ids, config.val_share, 0)
    train, val = bags.take(train_spots), bags.take(val_spots)
    head = new_head(train, 0, settings.fit.formula())
    result = fit_head(head, train, val, settings.fit)
    assert learnt.info["validation_loss"] == pytest.approx(result.best_loss, rel=1e-6)
    assert learnt.info["num_epochs"] == len(result.history)
    for one, other in zip(learnt.head.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_scores_are_those_of_the_measured_spots(slides, make_config):
    settings = trial_of(make_config(), 1).settings
    data = slides[0]
    learnt = learn_trial(settings, [data["s0"]])
    found = score(settings, learnt, data["s1"])
    test = data["s1"]
    columns = [test.spots.genes.index(gene) for gene in found["genes"]]
    counts = test.spots.counts[test.kept].toarray()
    # All genes of the slide pass the filters of this test, so the library is the sum.
    assert len(section(test, settings.rules).spots.genes) == counts.shape[1]
    logged = np.log1p(counts[:, columns] * 1e4 / counts.sum(axis=1, keepdims=True))
    predicted = np.empty_like(logged)
    for spot in range(len(test.kept)):
        cells = test.links.cell_index[test.links.offsets[spot] : test.links.offsets[spot + 1]]
        x_ND = torch.from_numpy(test.embeddings_ND[cells])
        predicted[spot] = learnt.head(x_ND).detach().numpy().mean(axis=0)
    values = found["models"]["ours"]
    expected = pearson_by_column(predicted, logged)
    np.testing.assert_allclose(values["by_gene"]["pcc"], expected, atol=2e-5)
    assert values["pcc"] == pytest.approx(np.nanmean(expected), abs=2e-5)
    depth = np.log1p(counts.sum(axis=1))
    partial_r = partial_pearson_by_column(predicted, logged, depth)
    np.testing.assert_allclose(values["by_gene"]["pcc_given_depth"], partial_r, atol=2e-5)
    assert values["pcc_low"] <= values["pcc"] <= values["pcc_high"]
    assert found["models"]["mean"]["pcc"] is None
    assert set(found["models"]) == {"ours", "mean", "ours_shuffled"}


def test_the_test_slide_has_no_say(slides, make_config):
    settings = trial_of(make_config(), 1).settings
    data = slides[0]
    one = run_trial(settings, data)
    changed = data["s1"].spots.counts.copy()
    changed.data[:] = 1.0
    other = data | {"s1": _with_counts(data["s1"], changed)}
    two = run_trial(settings, other)
    assert one["genes"] == two["genes"]
    assert one["fit"]["validation_loss"] == two["fit"]["validation_loss"]
    assert one["scores"] != two["scores"]


def _with_counts(data, counts):
    return replace(data, spots=replace(data.spots, counts=counts))


def test_genes_that_a_slide_lacks_are_left_out(slides, make_config):
    settings = trial_of(make_config(), 1).settings
    data = slides[0]["s1"]
    learnt = learn_trial(settings, [slides[0]["s0"]])
    names = [f"x{gene}" if gene == learnt.panel[0] else gene for gene in data.spots.genes]
    lacking = replace(data, spots=replace(data.spots, genes=names))
    assert score(settings, learnt, lacking)["genes"] == learnt.panel[1:]
    none = replace(data, spots=replace(data.spots, genes=[f"x{g}" for g in data.spots.genes]))
    with pytest.raises(ValueError, match="slide s1: it has none of the 5 genes"):
        score(settings, learnt, none)


def test_embeddings_that_are_not_finite_are_refused(make_config, tmp_path):
    made = write_small_run(tmp_path)
    uri = made.run.cells_uri("s0")
    table = storage.read_table(uri)
    bad = np.full((len(table), DIM), np.nan, np.float16)
    place = table.column_names.index("embedding")
    storage.publish_table(uri, table.set_column(place, table.schema.field(place), vectors(bad)))
    config = make_config()
    (slide,) = training_slides(read_manifest(str(made.manifest)), made.run, ["s0"])
    with pytest.raises(ValueError, match="slide s0: embeddings hold NaN"):
        prepare_slide(slide, made.run, config.rules(config.fit_config("mse", 0)), colour=False)


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


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run of scellst_ray there"):
        open_cells(str(tmp_path))
    storage.publish_json(str(tmp_path / "run.json"), {"digest": "d", "identity": {}})
    with pytest.raises(ValueError, match="its cells have no embeddings"):
        open_cells(str(tmp_path))


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
    trials, _ = make_trials(config, folds, open_cells(config.cells).digest)
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
    # The means are over seeds and slides.
    row = summary(results).filter((pl.col("loss") == "nb") & (pl.col("model") == "ours"))
    mine = results.filter((pl.col("loss") == "nb") & (pl.col("model") == "ours"))
    assert row["pcc"][0] == pytest.approx(mine["pcc"].mean())
    assert (row["num_slides"][0], row["num_trials"][0]) == (2, 4)
    assert results_table(third).equals(results_table(again))
    genes = pl.read_parquet(f"{out}/genes.parquet")
    assert len(genes) == 8 * 3 * 5
    assert Path(out, "results.md").read_text().count("| s1 | s1 |") == 12


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_slide_that_cannot_be_used_is_named_before_anything_runs(make_config):
    config = make_config(min_gene_counts=10**9)
    with pytest.raises(ValueError, match=r"cannot use 2 of 2 slides: s0: ValueError: .*; s1"):
        crossvalidate(config, lambda _: None)


def test_a_failed_trial_is_told_and_makes_the_command_fail(make_config, monkeypatch):
    config = make_config()
    console = Console(record=True, width=100)
    monkeypatch.setattr(crossvalidate_report, "Console", lambda: console)
    failed = crossvalidate_report.Grid([], {"t1": "ValueError: no"}, 0, 2)
    monkeypatch.setattr(crossvalidate_report, "crossvalidate", lambda *_: failed)
    assert run_crossvalidate(config) == 1
    assert "failed: t1: ValueError: no" in console.export_text()
