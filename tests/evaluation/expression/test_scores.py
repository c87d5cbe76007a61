"""Scores of several models equal those of scipy and scikit-learn, gene by gene."""

import json

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from scellst_ray.evaluation.expression.scores import (
    OURS,
    SHUFFLED,
    Bootstrap,
    Truth,
    difference,
    gene_table,
    score_models,
    summary,
)

BOOTSTRAP = Bootstrap(num_draws=50, seed=4)


@pytest.fixture(scope="module")
def models():
    rng = np.random.default_rng(0)
    depth = rng.normal(size=120)
    signal = rng.normal(size=(120, 8))
    truth = Truth(
        np.round(signal + depth[:, None] + rng.normal(size=signal.shape), 1),
        depth,
        [f"G{i}" for i in range(8)],
    )
    predictions = {
        OURS: signal + depth[:, None],
        "depth": np.tile(depth[:, None], 8),
        "mean": np.ones((120, 8)),
    }
    return predictions, truth


def test_scores_equal_scipy_and_sklearn(models):
    predictions, truth = models
    found = score_models(predictions, truth, Bootstrap(0))
    assert list(found) == [OURS, "depth", "mean", SHUFFLED]
    for name, predicted in predictions.items():
        scores = found[name].by_gene
        for gene in range(8):
            a, b = predicted[:, gene], truth.values_SG[:, gene]
            assert scores["rmse"][gene] == pytest.approx(sk.root_mean_squared_error(b, a))
            assert scores["mae"][gene] == pytest.approx(sk.mean_absolute_error(b, a))
            if name != "mean":
                assert scores["pcc"][gene] == pytest.approx(stats.pearsonr(a, b)[0])
                assert scores["scc"][gene] == pytest.approx(stats.spearmanr(a, b)[0])
    assert np.isnan(found["mean"].by_gene["pcc"]).all()
    assert found[OURS].by_draw == {}


def test_depth_alone_is_worth_nothing_given_depth(models):
    found = score_models(*models, BOOTSTRAP)
    text = {name: summary(scores, BOOTSTRAP) for name, scores in found.items()}
    assert text["depth"]["pcc"]["mean"] > 0.4
    assert text["depth"]["pcc_given_depth"]["mean"] is None
    assert text[OURS]["pcc_given_depth"]["mean"] > 0.5
    assert abs(text[SHUFFLED]["pcc"]["mean"]) < 0.15
    assert text["mean"]["pcc"] == {"mean": None, "median": None, "genes": 0, "above_0": None}
    assert text["mean"]["rmse"]["genes"] == 8
    for scores in text.values():
        for score in scores.values():
            if score["mean"] is not None:
                for kind in ("over_rows", "over_genes"):
                    low, high = score[kind]
                    assert low - 0.05 < score["mean"] < high + 0.05
                    assert low < high
    assert text[OURS]["pcc"]["above_0"] == 1.0
    json.dumps(text, allow_nan=False)


def test_differences_are_paired(models):
    found = score_models(*models, BOOTSTRAP)
    gap = difference(found[OURS], found["depth"], BOOTSTRAP)
    by_gene = found[OURS].by_gene["pcc"] - found["depth"].by_gene["pcc"]
    assert gap["pcc"]["mean"] == pytest.approx(by_gene.mean(), abs=1e-5)
    assert gap["pcc"]["over_rows"][0] > 0  # what both share cancels
    assert "pcc_given_depth" not in gap
    assert difference(found[OURS], found[OURS], BOOTSTRAP)["scc"] == {
        "mean": 0.0,
        "over_genes": [0.0, 0.0],
        "over_rows": [0.0, 0.0],
    }
    assert difference(found[OURS], found["mean"], BOOTSTRAP).keys() == {"rmse", "mae"}


def test_genes_have_their_own_intervals(models):
    found = score_models(*models, BOOTSTRAP)
    table = gene_table(found[OURS])
    assert len(table["pcc"]) == 8
    for gene in range(8):
        assert table["pcc_low"][gene] < table["pcc"][gene] < table["pcc_high"][gene]
    assert gene_table(found["mean"])["scc"] == [None] * 8


def test_without_depth_there_is_no_score_given_depth(models):
    predictions, truth = models
    bare = Truth(truth.values_SG, None, truth.genes)
    found = score_models(predictions, bare, BOOTSTRAP)
    assert "pcc_given_depth" not in summary(found[OURS], BOOTSTRAP)
    assert score_models({"mean": predictions["mean"]}, bare, Bootstrap(0)).keys() == {"mean"}
