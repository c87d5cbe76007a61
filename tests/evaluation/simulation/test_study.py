"""The simulation study: what each condition must come to, its files, and taking it up again."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from scellst_ray.commands import simulate as simulate_report
from scellst_ray.commands.simulate import findings, markdown, run_simulate
from scellst_ray.evaluation.simulation.conditions import score_genes
from scellst_ray.evaluation.simulation.config import SimulateConfig
from scellst_ray.evaluation.simulation.fit import RowHead, Search, fit_rows, predict_rows, row_bags
from scellst_ray.evaluation.simulation.reference import synthetic_reference
from scellst_ray.evaluation.simulation.study import read_image, simulate
from scellst_ray.models.mil.bags import BagSet, bag_mean
from scellst_ray.models.mil.fit import FitConfig, fit_head
from scellst_ray.models.mil.head import MilHead
from scellst_ray.models.mil.stored_head import Formula
from scellst_ray.runs.reading import open_run
from tests.support.small_run import write_small_run

TINY = {
    "embedding_dim": 24,
    "spread": 0.4,
    "num_types": 3,
    "cells_per_cluster": 60,
    "num_spots": 120,
    "cells_per_spot": 5,
    "num_variable": 12,
    "num_markers": 3,
    "learning_rates": [3e-3, 1e-9],
    "search_epochs": [2],
    "max_epochs": 40,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Return a small study's folder, its report and what was printed."""
    patch = pytest.MonkeyPatch()
    out = tmp_path_factory.mktemp("study")
    console = Console(record=True, width=80)
    patch.setattr(simulate_report, "Console", lambda: console)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run_simulate(SimulateConfig(out=str(out), **TINY)) == 0
    torch.set_num_threads(threads)
    patch.undo()
    return out, json.loads((out / "report.json").read_text()), console.export_text()


def by_name(report):
    names = ("panel", "scenario", "inputs", "supervision")
    return {tuple(found[name] for name in names): found for found in report["conditions"]}


def test_scenarios_come_to_what_they_must(study):
    found = {key: value["pearson"] for key, value in by_name(study[1]).items()}
    assert len(found) == 24
    assert max(abs(r) for key, r in found.items() if key[1] == "random") < 0.15
    assert found["markers", "centroid", "one-hot", "supervised"] > 0.95
    assert found["markers", "cell", "one-hot", "supervised"] > 0.3
    for panel in ("hvg", "markers"):
        assert found[panel, "centroid", "ssl", "supervised"] > found[panel, "cell", "ssl", "mil"]


def test_validation_chooses_the_learning_rate(study):
    for found in by_name(study[1]).values():
        losses = {float(rate): loss for rate, loss in found["search_losses"].items()}
        assert set(losses) == {3e-3, 1e-9}
        assert found["learning_rate"] == min(losses, key=losses.get)
        assert found["validation_loss"] == min(losses.values())


def test_the_report_says_what_was_done(study):
    out, report, shown = study
    assert report["reference"]["source"] == "synthetic, seed 0"
    assert report["image"] == {
        "source": "synthetic, seed 0",
        "num_cells_clustered": 270,
        "cells_per_cluster": 60,
        "embedding_dim": 24,
    }
    assert report["config"]["num_spots"] == 120
    assert report["peak_memory_bytes"] > 1e8
    text = (out / "report.md").read_text()
    for line in findings(list(by_name(report).values())):
        assert line in text
        assert line in shown
    assert text.count("| hvg |") == 12
    table = [line for line in shown.splitlines() if "│" in line]
    assert sum("hvg" in line for line in table) == 3
    assert max(map(len, table)) <= 80


def test_every_gene_is_in_the_table(study):
    out, report, _ = study
    genes = pl.read_parquet(out / "genes.parquet")
    assert len(genes) == 12 * sum(len(panel) for panel in report["panels"].values())
    means = genes.group_by("panel", "scenario", "inputs", "supervision").agg(
        pl.col("pearson").mean()
    )
    found = by_name(report)
    for row in means.iter_rows():
        assert row[4] == pytest.approx(found[row[:4]]["pearson"])
    for key, value in found.items():
        mine = genes.filter((pl.col("panel") == key[0]) & (pl.col("scenario") == key[1]))
        assert mine["gene"].unique().len() == len(report["panels"][key[0]])
        assert value["pearson_low"] <= value["pearson"] <= value["pearson_high"]


def test_the_figure_has_bars_in_every_colour(study):
    image = imread(study[0] / "simulation.png")[:, :, :3]
    assert image.shape[1] > 1000
    for colour in simulate_report.BARS.values():
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(image - wanted).max(axis=2) < 0.01).sum() > 300


def test_the_same_command_does_only_what_is_missing(study):
    out, report, _ = study
    said = []
    gone = out / "conditions" / "markers_cell_ssl_mil.json"
    before = json.loads(gone.read_text())
    gone.unlink()
    times = {path: path.stat().st_mtime_ns for path in (out / "conditions").iterdir()}
    again = simulate(SimulateConfig(out=str(out), **TINY), said.append)
    assert len(said) == 24
    assert {path: path.stat().st_mtime_ns for path in times} == times
    after = json.loads(gone.read_text())
    assert after["pearson_by_gene"] == pytest.approx(before["pearson_by_gene"], abs=1e-5)
    assert len(again["conditions"]) == len(report["conditions"])


def test_a_folder_with_another_study_is_refused(study):
    with pytest.raises(ValueError, match="other num_spots; give another --out"):
        simulate(SimulateConfig(out=str(study[0]), **(TINY | {"num_spots": 130})), print)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_types": 1}, "num_types is 1; it must be at least 2"),
        ({"spread": 0.0}, "spread is 0.0"),
        ({"learning_rates": []}, "learning_rates is empty"),
        ({"learning_rates": [-1.0]}, "lr is -1.0"),
        ({"val_share": 1.0}, "val_share is 1.0"),
        ({"search_epochs": [5, 2]}, r"search_epochs is \[5, 2\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        SimulateConfig(**changes)


def test_a_row_head_is_the_plain_head_on_the_rows():
    torch.manual_seed(0)
    matrix_ND = torch.randn(12, 5)
    head = RowHead(matrix_ND, 4, Formula())
    plain = MilHead(5, 4)
    plain.load_state_dict(head.state_dict())
    rows_SK = np.array([[1, 1, 7], [7, 0, 11]])
    targets = np.random.default_rng(0).random((2, 4)).astype(np.float32)
    bags = row_bags(rows_SK, targets)
    for model, inputs in ((head, bags.embeddings_LD), (plain, matrix_ND[rows_SK.ravel()])):
        prediction_SP = bag_mean(model(inputs), bags.offsets)
        (prediction_SP - torch.from_numpy(targets)).square().sum().backward()
    for one, other in zip(head.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    rows = np.array([3, 3, 0])
    expected = plain(matrix_ND[rows]).detach().numpy()
    np.testing.assert_allclose(predict_rows(head, rows, block=2), expected, rtol=1e-5)


def small_bags(num_cells=40, num_spots=60):
    """Return inputs, and training and validation bags of row numbers, from a planted rule."""
    rng = np.random.default_rng(1)
    matrix_ND = rng.normal(0, 1, (num_cells, 6)).astype(np.float32)
    rows_SK = rng.integers(0, num_cells, (num_spots, 4))
    targets = np.exp(matrix_ND[rows_SK][:, :, :3]).mean(axis=1).astype(np.float32)
    cut = num_spots * 4 // 5
    return matrix_ND, row_bags(rows_SK[:cut], targets[:cut]), row_bags(rows_SK[cut:], targets[cut:])


def plain_fit(matrix_ND, bags, config, num_cells):
    """Return what fit_head does with the embeddings themselves."""
    torch.manual_seed(config.seed)
    plain = MilHead(6, 3)
    plain.standardise(torch.from_numpy(matrix_ND[:num_cells]))
    own = [
        BagSet(torch.from_numpy(matrix_ND[b.embeddings_LD[:, 0]]), b.offsets, b.targets_SG)
        for b in bags
    ]
    return fit_head(plain, *own, config), plain


@pytest.mark.parametrize("rungs", [[], [2, 3], [3, 99]])
def test_fitting_rows_is_fitting_their_embeddings(rungs):
    matrix_ND, *bags = small_bags()
    config = FitConfig(lr=5e-3, max_epochs=7, patience=7, batch_spots=16)
    fitted = fit_rows(matrix_ND, np.arange(30), *bags, Search(config, [5e-3], rungs))
    result, plain = plain_fit(matrix_ND, bags, config, 30)
    assert fitted.validation_loss == pytest.approx(result.best_loss, rel=1e-5)
    assert fitted.num_epochs == len(result.history)
    expected = plain(torch.from_numpy(matrix_ND)).detach().numpy()
    np.testing.assert_allclose(predict_rows(fitted.head, np.arange(40)), expected, rtol=1e-3)


def test_the_worse_half_is_dropped_at_every_rung():
    matrix_ND, *bags = small_bags()
    rates = [1e-2, 3e-3, 1e-3, 1e-9]
    config = FitConfig(max_epochs=12, patience=12, batch_spots=16)
    fitted = fit_rows(matrix_ND, np.arange(40), *bags, Search(config, rates, [2, 5]))
    alone = {}
    for rate in rates:
        own = FitConfig(lr=rate, max_epochs=12, patience=12, batch_spots=16)
        alone[rate] = [val for _, val in plain_fit(matrix_ND, bags, own, 40)[0].history]
    best = {rate: np.minimum.accumulate(losses) for rate, losses in alone.items()}
    second = sorted(rates, key=lambda rate: best[rate][1])[:2]
    winner = min(second, key=lambda rate: best[rate][4])
    assert fitted.learning_rate == winner
    last = {rate: 1 if rate not in second else 4 for rate in rates} | {winner: 11}
    for rate, epoch in last.items():
        assert fitted.search[rate] == pytest.approx(best[rate][epoch], rel=1e-4)
    assert (fitted.num_epochs, fitted.validation_loss) == (12, fitted.search[winner])


def test_a_fit_that_has_stopped_is_not_taken_up_again():
    matrix_ND, *bags = small_bags()
    config = FitConfig(max_epochs=40, patience=1, batch_spots=64)
    fitted = fit_rows(matrix_ND, np.arange(40), *bags, Search(config, [3e-2], [30, 35]))
    own = FitConfig(lr=3e-2, max_epochs=40, patience=1, batch_spots=64)
    result, plain = plain_fit(matrix_ND, bags, own, 40)
    assert fitted.num_epochs == len(result.history) < 30
    expected = plain(torch.from_numpy(matrix_ND)).detach().numpy()
    np.testing.assert_allclose(predict_rows(fitted.head, np.arange(40)), expected, rtol=1e-3)


def test_rates_that_diverge_are_passed_over():
    matrix_ND, *bags = small_bags()
    config = FitConfig(max_epochs=4, patience=4, batch_spots=4)
    fitted = fit_rows(matrix_ND, np.arange(40), *bags, Search(config, [1e30, 1e-3], [3]))
    assert fitted.learning_rate == 1e-3
    assert fitted.search[1e30] is None
    with pytest.raises(ValueError, match=r"all learning rates .* diverged"):
        fit_rows(matrix_ND, np.arange(40), *bags, Search(config, [1e30], [3]))


def test_a_constant_prediction_counts_nought_and_a_constant_gene_not_at_all():
    true_NP = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [4.0, 3.0, 0.0]], np.float32)
    predicted_NP = np.array([[2.0, 5.0, 1.0], [4.0, 5.0, 2.0], [8.0, 5.0, 3.0]], np.float32)
    found = score_genes(predicted_NP, true_NP)
    assert found[0] == pytest.approx(1.0)
    assert found[1] == 0.0
    assert np.isnan(found[2])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a finished run of two slides with embeddings of length 16."""
    return write_small_run(tmp_path_factory.mktemp("run")).run.uri


def test_cells_of_a_run_take_part_with_their_types(run):
    config = SimulateConfig(cells=run, num_types=2, cells_per_cluster=30, max_cells=200)
    image = read_image(config)
    assert image.embeddings_ND.shape == (60, 16)
    assert image.info["source"] == run
    assert 190 <= image.info["num_cells_clustered"] <= 200
    for shares in image.info["nucleus_types"]:
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3)
    stored = np.concatenate([open_run(run).embeddings(s) for s in ("s0", "s1")])
    known = {row.tobytes() for row in stored}
    assert all(row.tobytes() in known for row in image.embeddings_ND.astype(np.float16))
    again = read_image(config)
    np.testing.assert_array_equal(again.embeddings_ND, image.embeddings_ND)


def test_one_slide_may_be_asked_for(run):
    config = SimulateConfig(cells=run, slides=["s1"], num_types=2, cells_per_cluster=20)
    image = read_image(config)
    assert image.info["num_cells_clustered"] == len(open_run(run).embeddings("s1"))


def test_the_report_tells_the_types_of_clusters():
    shares = [{"Neoplastic": 0.9, "Connective": 0.1}]
    image = {"source": "r", "num_cells_clustered": 9, "embedding_dim": 3, "cells_per_cluster": 2}
    report = {
        "conditions": [],
        "findings": [],
        "image": image | {"nucleus_types": shares},
        "reference": synthetic_reference(2, 0, 200, 5).info(),
        "config": {"num_types": 2, "num_spots": 5, "cells_per_spot": 2, "predictor": "ours"},
        "panels": {"hvg": ["A"]},
        "seconds": 60,
        "cpu_seconds": 60,
        "peak_memory_bytes": 2**30,
        "scellst_ray": "0",
    }
    assert "- Neoplastic 90%, Connective 10%" in markdown(report)
