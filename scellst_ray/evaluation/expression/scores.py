"""Scores of predicted expression per gene, with bootstrap intervals, for several models.

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
# pcc: Pearson's r. pcc_given_depth: Pearson's r with the log of total counts partialled out, only
# where the depth of each row is known. scc: Spearman's rho.
METRICS = ("pcc", "pcc_given_depth", "scc", "rmse", "mae")
# The model itself, and its predictions shuffled over the slide, which give the score of chance.
OURS, SHUFFLED = "ours", "ours_shuffled"


@dataclass(frozen=True)
class Truth:
    """Measured expression.

    Attributes:
        values_SG: Expression, in the units of the predictions.
        log_depth_S: Log of the total counts of each row; None if unknown.
        genes: G names.
    """

    values_SG: NDArray[np.floating]
    log_depth_S: Array | None
    genes: list[str]


@dataclass(frozen=True)
class Bootstrap:
    """Settings of bootstrap intervals.

    Attributes:
        num_draws: Number of draws; 0 for no intervals.
        seed: Seed of the draws. All models have the same draws, so differences are paired.
    """

    num_draws: int = 200
    seed: int = 0


@dataclass(frozen=True)
class ModelScores:
    """Scores of one model, by metric.

    Attributes:
        by_gene: [G]; NaN where no correlation exists, for example of a constant prediction.
        by_draw: [R, G], the scores on every draw of rows.
    """

    by_gene: dict[str, Array]
    by_draw: dict[str, Array]


def measured_columns(panel: list[str], measured: list[str], source: str) -> NDArray[np.int64]:
    """Return the columns of the panel whose genes were measured, ascending.

    Args:
        panel: Genes of the head.
        measured: Genes of spots or cells.
        source: Name of the spots or cells in messages, in the plural.

    Raises:
        ValueError: none of the genes was measured.
    """
    names = set(measured)
    columns = np.array([i for i, gene in enumerate(panel) if gene in names], np.int64)
    if not len(columns):
        message = (
            f"{source} share no gene with the head: it predicts {panel[:3]}, they have "
            f"{measured[:3]}. Use one naming (symbols or Ensembl ids) and one species."
        )
        raise ValueError(message)
    return columns


def score_models(
    predictions: Mapping[str, NDArray[np.floating]], truth: Truth, bootstrap: Bootstrap
) -> dict[str, ModelScores]:
    """Score every model [S, G] on the same rows, genes and draws.

    If OURS is among the models, SHUFFLED is scored, too.

    Raises:
        ValueError: shapes differ.
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
    """Return means over genes with intervals, for JSON (None where there is no number).

    Returns:
        By metric:

        - `mean`, `median`: over genes.
        - `genes`: number of genes that have the score.
        - `over_rows`: 95 % interval of the mean over draws of spots or cells of this slide.
        - `over_genes`: 95 % interval of the mean over draws of genes.
        - `above_0`: share of genes above 0, for correlations only.
    """
    result = {}
    for metric in METRICS:
        if metric not in scores.by_gene:
            continue
        values_G = scores.by_gene[metric]
        scored = values_G[~np.isnan(values_G)]
        row: dict[str, Any] = {
            "mean": number(scored.mean()) if len(scored) else None,
            "median": number(np.median(scored)) if len(scored) else None,
            "genes": len(scored),
        }
        if bootstrap.num_draws and len(scored):
            genes_RG = draws(len(scored), bootstrap.num_draws, bootstrap.seed)
            row["over_genes"] = _numbers(interval(scored[genes_RG].mean(axis=1)))
            row["over_rows"] = _numbers(interval(mean_over_genes(scores.by_draw[metric])))
        if metric not in ("rmse", "mae"):
            row["above_0"] = number((scored > 0).mean()) if len(scored) else None
        result[metric] = row
    return result


def difference(one: ModelScores, other: ModelScores, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return the means of `one` minus those of `other` by metric, with paired intervals."""
    result = {}
    for metric in METRICS:
        if metric not in one.by_gene:
            continue
        gap_G = one.by_gene[metric] - other.by_gene[metric]
        scored = gap_G[~np.isnan(gap_G)]
        if not len(scored):
            continue
        row: dict[str, Any] = {"mean": number(scored.mean())}
        if bootstrap.num_draws:
            genes_RG = draws(len(scored), bootstrap.num_draws, bootstrap.seed)
            row["over_genes"] = _numbers(interval(scored[genes_RG].mean(axis=1)))
            gap_RG = one.by_draw[metric] - other.by_draw[metric]
            row["over_rows"] = _numbers(interval(mean_over_genes(gap_RG)))
        result[metric] = row
    return result


def gene_table(scores: ModelScores) -> dict[str, Any]:
    """Return scores by gene for JSON: each metric, with metric_low and metric_high if drawn."""
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
    """Return a number rounded to 5 decimals; None for NaN, since JSON has no NaN."""
    return None if np.isnan(value) else round(float(value), 5)


def _numbers(values: Array) -> list[float | None]:
    return [number(value) for value in values]
