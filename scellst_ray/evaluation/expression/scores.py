"""Predicted against measured expression: scores per gene with intervals, and baselines beside them.

Rows are spots or cells. Shape letters: S rows, G genes, R draws of a bootstrap.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scellst_ray.evaluation.expression.bootstrap import (
    draws,
    interval,
    mean_of_draws,
    mean_over_genes,
    pearson_of_draws,
    spearman_of_draws,
    times_drawn,
)
from scellst_ray.evaluation.expression.metrics import (
    mae_by_column,
    partial_pearson_by_column,
    pearson_by_column,
    rmse_by_column,
    spearman_by_column,
)

Array = NDArray[np.float64]
# pcc_given_depth: with the log of total counts partialled out, so more than how much tissue there
# is; only where the depth of each row is known.
METRICS = ("pcc", "pcc_given_depth", "scc", "rmse", "mae")
# The model itself; its rows shuffled over the slide are what chance gives.
OURS, SHUFFLED = "ours", "ours_shuffled"


@dataclass(frozen=True)
class Truth:
    """What was measured.

    Attributes:
        values_SG: Expression, in the units of the predictions.
        log_depth_S: Log of each row's total counts; None where it is not known.
        genes: G names.
    """

    values_SG: NDArray[np.floating]
    log_depth_S: Array | None
    genes: list[str]


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are found.

    Attributes:
        num_draws: 0 for no intervals.
        seed: Fixes the draws, the same for every model: differences are paired.
    """

    num_draws: int = 200
    seed: int = 0


@dataclass(frozen=True)
class ModelScores:
    """Scores of one model, by metric.

    Attributes:
        by_gene: [G]; NaN where no correlation exists, as of a constant prediction.
        by_draw: [R, G], the same of every draw of rows.
    """

    by_gene: dict[str, Array]
    by_draw: dict[str, Array]


def score_models(
    predictions: Mapping[str, NDArray[np.floating]], truth: Truth, bootstrap: Bootstrap
) -> dict[str, ModelScores]:
    """Score every model [S, G] on the same rows, genes and draws; rows of OURS shuffled, too.

    Raises:
        ValueError: Where shapes differ.
    """
    num_rows = len(truth.values_SG)
    rows_RS = draws(num_rows, bootstrap.num_draws, bootstrap.seed)
    shuffled = np.random.default_rng([bootstrap.seed, 1]).permutation(num_rows)
    models = dict(predictions)
    if OURS in models:
        models[SHUFFLED] = models[OURS][shuffled]
    return {name: _score(values_SG, truth, rows_RS) for name, values_SG in models.items()}


def _score(
    predicted_SG: NDArray[np.floating], truth: Truth, rows_RS: NDArray[np.int64]
) -> ModelScores:
    measured_SG, depth_S = truth.values_SG, truth.log_depth_S
    by_gene = {
        "pcc": pearson_by_column(predicted_SG, measured_SG),
        "scc": spearman_by_column(predicted_SG, measured_SG),
        "rmse": rmse_by_column(predicted_SG, measured_SG),
        "mae": mae_by_column(predicted_SG, measured_SG),
    }
    if depth_S is not None:
        by_gene["pcc_given_depth"] = partial_pearson_by_column(predicted_SG, measured_SG, depth_S)
    if not len(rows_RS):
        return ModelScores(by_gene, {})
    times_RS = times_drawn(rows_RS)
    error_SG = np.asarray(predicted_SG, np.float64) - np.asarray(measured_SG, np.float64)
    by_draw = {
        "pcc": pearson_of_draws(predicted_SG, measured_SG, times_RS),
        "scc": spearman_of_draws(predicted_SG, measured_SG, rows_RS),
        "rmse": np.sqrt(mean_of_draws(error_SG**2, times_RS)),
        "mae": mean_of_draws(np.abs(error_SG), times_RS),
    }
    if depth_S is not None:
        by_draw["pcc_given_depth"] = pearson_of_draws(predicted_SG, measured_SG, times_RS, depth_S)
    return ModelScores(by_gene, by_draw)


def summary(scores: ModelScores, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return means over genes with intervals, as JSON (None where there is no number).

    For each metric: mean, median, genes (how many have the score), over_rows and over_genes (95 %
    intervals of the mean: other spots of this slide, other genes for this slide), and for
    correlations the share of genes above 0.
    """
    result = {}
    for metric in METRICS:
        if metric not in scores.by_gene:
            continue
        values_G = scores.by_gene[metric]
        there = values_G[~np.isnan(values_G)]
        found: dict[str, Any] = {
            "mean": number(there.mean()) if len(there) else None,
            "median": number(np.median(there)) if len(there) else None,
            "genes": len(there),
        }
        if bootstrap.num_draws and len(there):
            genes_RG = draws(len(there), bootstrap.num_draws, bootstrap.seed)
            found["over_genes"] = _numbers(interval(there[genes_RG].mean(axis=1)))
            found["over_rows"] = _numbers(interval(mean_over_genes(scores.by_draw[metric])))
        if metric not in ("rmse", "mae"):
            found["above_0"] = number((there > 0).mean()) if len(there) else None
        result[metric] = found
    return result


def difference(one: ModelScores, other: ModelScores, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return how far the means of `one` lie above those of `other`, with paired intervals."""
    result = {}
    for metric in METRICS:
        if metric not in one.by_gene:
            continue
        gap_G = one.by_gene[metric] - other.by_gene[metric]
        there = gap_G[~np.isnan(gap_G)]
        if not len(there):
            continue
        found: dict[str, Any] = {"mean": number(there.mean())}
        if bootstrap.num_draws:
            genes_RG = draws(len(there), bootstrap.num_draws, bootstrap.seed)
            found["over_genes"] = _numbers(interval(there[genes_RG].mean(axis=1)))
            gap_RG = one.by_draw[metric] - other.by_draw[metric]
            found["over_rows"] = _numbers(interval(mean_over_genes(gap_RG)))
        result[metric] = found
    return result


def gene_table(scores: ModelScores) -> dict[str, Any]:
    """Return scores by gene as JSON: metric, and metric_low and metric_high where drawn."""
    table: dict[str, Any] = {}
    for metric in METRICS:
        if metric not in scores.by_gene:
            continue
        table[metric] = _numbers(scores.by_gene[metric])
        if metric in scores.by_draw:
            low_G, high_G = interval(scores.by_draw[metric])
            table |= {f"{metric}_low": _numbers(low_G), f"{metric}_high": _numbers(high_G)}
    return table


def number(value: float | np.floating) -> float | None:
    """Return a number to 5 digits after the point, None for NaN: JSON has no NaN."""
    return None if np.isnan(value) else round(float(value), 5)


def _numbers(values: Array) -> list[float | None]:
    return [number(value) for value in values]
