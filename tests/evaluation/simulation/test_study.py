"""The simulation study: expected scores, written files, and continuing a study."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from scellst_ray.commands import simulate as module
from scellst_ray.commands.simulate import findings, markdown, run_simulate
from scellst_ray.evaluation.simulation.config import SimulateConfig
from scellst_ray.evaluation.simulation.reference import synthetic_reference
from scellst_ray.evaluation.simulation.study import read_image, simulate
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
    "max_epochs": 24,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Return the folder of a small study, its report and the printed text."""
    patch = pytest.MonkeyPatch()
    out = tmp_path_factory.mktemp("study")
    console = Console(record=True, width=80)
    patch.setattr(module, "Console", lambda: console)
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
    for colour in module.BARS.values():
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
        ({"learning_rates": [-1.0]}, r"learning_rates is \[-1.0\]; it must be at least 0"),
        ({"val_share": 1.0}, "val_share is 1.0"),
        ({"search_epochs": [5, 2]}, r"search_epochs is \[5, 2\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        SimulateConfig(**changes)


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
