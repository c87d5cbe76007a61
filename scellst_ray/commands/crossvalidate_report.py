"""The report of `crossvalidate`: tables on the console and as Markdown, one table of results."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import polars as pl
from rich.console import Console

from scellst_ray import storage
from scellst_ray.commands.crossvalidate import Grid, crossvalidate
from scellst_ray.commands.reports import (
    format_score,
    framed_table,
    line_printer,
    markdown_table,
)
from scellst_ray.commands.training_configs import CrossvalidateConfig
from scellst_ray.core.version import __version__
from scellst_ray.evaluation.crossvalidation.trial import MODELS
from scellst_ray.evaluation.expression.scores import METRICS
from scellst_ray.runs.lease import hold_lease

SETTINGS = {"panel": pl.String, "loss": pl.String}
INTERVALS = ("pcc_low", "pcc_high", "pcc_given_depth_low", "pcc_given_depth_high")
RESULTS: dict[str, Any] = {
    "trial": pl.String,
    "fold": pl.String,
    "train_slides": pl.String,
    "test_slide": pl.String,
    **SETTINGS,
    "seed": pl.Int64,
    "model": pl.String,
    **dict.fromkeys((*METRICS, *INTERVALS), pl.Float64),
    "num_spots": pl.Int64,
    "num_genes": pl.Int64,
    "num_epochs": pl.Int64,
    "fit_seconds": pl.Float64,
    "seconds": pl.Float64,
}
NOTES = """\
PCC is the Pearson correlation of predicted and measured expression over the spots of a slide. The
slide had no part in training or in the choice of genes. PCC is computed by gene, then averaged over
genes, then over slides and seeds. The spread is the standard deviation over slides. PCC given depth
has the log of the spots' total counts partialled out. Model `colour_ridge` is a ridge regression on
18 colour statistics of each spot's disc. `mean` predicts the mean of the training spots, which
correlates with nothing. `ours_shuffled` gives our predictions to the wrong spots.
"""


def run_crossvalidate(config: CrossvalidateConfig) -> int:
    """Run `crossvalidate`: print and write its tables; return 0 only if every trial is done."""
    console, started = Console(), time.monotonic()
    say = line_printer(console)
    with hold_lease(storage.absolute(config.out)):
        grid = crossvalidate(config, say)
        if grid.results:
            write_results(config, grid, time.monotonic() - started)
    if grid.results:
        rows = _rows(summary(results_table(grid)))
        console.print(framed_table(HEADINGS, rows, TITLE))
        for name in ("results.md", "results.parquet", "genes.parquet"):
            say(f"  {storage.join(config.out, name)}")
    for name, error in grid.failures.items():
        say(f"failed: {name}: {error}")
    if grid.failures:
        say("Fix the cause and run the same command again: it does only the missing work.")
    return 1 if grid.failures else 0


def results_table(grid: Grid) -> pl.DataFrame:
    """Return one row per trial, test slide and model: see RESULTS."""
    rows = []
    for result in grid.results:
        for test_slide, scores in result["scores"].items():
            for model, values in scores["models"].items():
                row = result | values | {"test_slide": test_slide, "model": model}
                row |= {
                    "train_slides": ",".join(result["train_slides"]),
                    "num_spots": scores["num_spots"],
                    "num_genes": len(scores["genes"]),
                    "num_epochs": result["fit"]["num_epochs"],
                    "fit_seconds": result["fit"]["seconds"],
                }
                rows.append({name: row.get(name) for name in RESULTS})
    return pl.DataFrame(rows, schema=RESULTS)


def genes_table(grid: Grid) -> pl.DataFrame:
    """Return one row per trial, test slide, model and gene with its correlations."""
    frames = []
    for result in grid.results:
        for test_slide, scores in result["scores"].items():
            for model, values in scores["models"].items():
                columns = {"gene": scores["genes"], **values["by_gene"]}
                types = dict.fromkeys(values["by_gene"], pl.Float64)
                frame = pl.DataFrame(columns, schema={"gene": pl.String, **types})
                names = {"trial": result["trial"], "test_slide": test_slide, "model": model}
                frames.append(
                    frame.select(*(pl.lit(v).alias(k) for k, v in names.items()), pl.all())
                )
    return pl.concat(frames)


def summary(results: pl.DataFrame) -> pl.DataFrame:
    """Return, by panel, loss and model, means over slides and seeds, and their spread.

    Columns: pcc, pcc_sd (over slides, each the mean over trials), pcc_given_depth,
    pcc_given_depth_sd, scc, rmse, num_slides, num_trials.
    """
    keys = [*SETTINGS, "model"]
    by_slide = results.group_by(*keys, "test_slide", maintain_order=True).agg(
        pl.col("pcc", "pcc_given_depth", "scc", "rmse").mean(), pl.len().alias("num_trials")
    )
    means = by_slide.group_by(*keys, maintain_order=True).agg(
        pl.col("pcc", "pcc_given_depth", "scc", "rmse").mean(),
        pl.col("pcc", "pcc_given_depth").std().name.suffix("_sd"),
        pl.len().alias("num_slides"),
        pl.col("num_trials").sum(),
    )
    order = pl.col("model").replace_strict({name: i for i, name in enumerate(MODELS)})
    return means.sort(*SETTINGS, order, maintain_order=True)


def write_results(config: CrossvalidateConfig, grid: Grid, seconds: float) -> None:
    """Write results.parquet, genes.parquet, results.md and crossvalidate.json below `out`."""
    results = results_table(grid)
    storage.publish_table(storage.join(config.out, "results.parquet"), results.to_arrow())
    storage.publish_table(storage.join(config.out, "genes.parquet"), genes_table(grid).to_arrow())
    storage.publish_text(storage.join(config.out, "results.md"), markdown(config, results, grid))
    info = {
        "config": asdict(config),
        "num_trials": len(grid.results),
        "num_done_before": grid.num_done_before,
        "failures": grid.failures,
        "seconds_of_this_command": seconds,
        "num_slots": grid.num_slots,
        "scellst_ray": __version__,
    }
    storage.publish_json(storage.join(config.out, "crossvalidate.json"), info)


TITLE = "unseen slides: mean over genes, slides and seeds (± over slides)"
HEADINGS = ("panel", "loss", "model", "PCC", "PCC given depth", "SCC", "slides", "trials")


def _rows(means: pl.DataFrame) -> list[list[str]]:
    return [
        [
            row["panel"],
            row["loss"],
            row["model"],
            _spread(row, "pcc"),
            _spread(row, "pcc_given_depth"),
            format_score(row["scc"]),
            str(row["num_slides"]),
            str(row["num_trials"]),
        ]
        for row in means.iter_rows(named=True)
    ]


def _spread(row: Mapping[str, Any], name: str) -> str:
    spread = row[f"{name}_sd"]
    return format_score(row[name]) + (
        "" if spread is None or row[name] is None else f" ± {spread:.3f}"
    )


def markdown(config: CrossvalidateConfig, results: pl.DataFrame, grid: Grid) -> str:
    """Return the report as text: the summary, then every trial and slide."""
    lines = [f"# Cross-validation: {config.protocol}", ""]
    lines += markdown_table(HEADINGS, _rows(summary(results)))
    lines += ["", NOTES]
    if grid.failures:
        lines += [f"{len(grid.failures)} trials failed and are not in these tables.", ""]
    headings = ("test slide", "fold", "panel", "loss", "seed", "model", "PCC", "given depth")
    rows = [
        [
            *(str(row[name]) for name in ("test_slide", "fold", "panel", "loss", "seed", "model")),
            _within(row, "pcc"),
            _within(row, "pcc_given_depth"),
        ]
        for row in results.sort("test_slide", maintain_order=True).iter_rows(named=True)
    ]
    lines += ["## By slide", "", *markdown_table(headings, rows)]
    return "\n".join([*lines, ""])


def _within(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    between = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
    return format_score(row[name]) + between
