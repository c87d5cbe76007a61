"""The report of `evaluate expression`: tables on the console and as Markdown, scores as JSON."""

from dataclasses import asdict
from typing import Any

from rich.console import Console

from scellst_ray import storage
from scellst_ray.commands.reports import (
    format_score,
    line_printer,
    markdown_table,
    score_table,
)
from scellst_ray.core.version import __version__
from scellst_ray.evaluation.expression.config import EvaluateExpressionConfig
from scellst_ray.evaluation.expression.evaluate import Comparison, Evaluation, evaluate_expression
from scellst_ray.evaluation.expression.scores import (
    METRICS,
    OURS,
    Bootstrap,
    difference,
    gene_table,
    number,
    summary,
)

HEADINGS = {
    "pcc": "PCC",
    "pcc_given_depth": "PCC given depth",
    "scc": "SCC",
    "rmse": "rMSE",
    "mae": "MAE",
}
ALL = "all"
ABOUT = (
    "The tables show means over genes, and in brackets 95 % intervals over rows (spots or cells) "
    "of the slide. PCC given depth is the PCC with the log of total counts partialled out. rMSE "
    "and MAE are in units of the training slides' gene ranges. `mean` predicts the mean "
    "expression of the training spots, so it correlates with nothing. `colour_ridge` is a ridge "
    "regression on the colours of each spot's disc. `ours_shuffled` gives each row of the slide "
    "our prediction for another row."
)


def run_evaluate_expression(config: EvaluateExpressionConfig) -> int:
    """Run `evaluate expression`: print tables, write `out` and its Markdown; return 0."""
    evaluation = evaluate_expression(config)
    report = as_dict(evaluation, config)
    console = Console()
    say = line_printer(console)
    for slide_id, levels in report["slides"].items():
        for level, part in levels.items():
            headings, rows = _rows(part)
            console.print(score_table(headings, rows, _title(slide_id, level, part)))
    for level, models in report[ALL].items():
        for name, scores in models.items():
            text = ", ".join(f"{HEADINGS[m]} {format_score(value)}" for m, value in scores.items())
            say(f"all slides, {level}, {name}: {text}")
    for note in evaluation.notes:
        say(f"note: {note}")
    if config.out is not None:
        storage.publish_json(config.out, report)
        page = f"{config.out.removesuffix('.json')}.md"
        storage.publish_text(page, markdown(report))
        say(f"wrote {config.out} and {page}")
    return 0


def as_dict(evaluation: Evaluation, config: EvaluateExpressionConfig) -> dict[str, Any]:
    """Return the report as a JSON document: by slide and level, and the mean over slides."""
    slides = {
        slide_id: {part.level: _comparison(part, config.bootstrap()) for part in parts}
        for slide_id, parts in evaluation.slides.items()
    }
    return {
        "slides": slides,
        ALL: _means(slides),
        "notes": evaluation.notes,
        "config": asdict(config),
        "scellst_ray": __version__,
    }


def _comparison(part: Comparison, bootstrap: Bootstrap) -> dict[str, Any]:
    ours = part.scores[OURS]
    return {
        **part.about,
        "genes": len(part.genes),
        "models": {name: summary(scores, bootstrap) for name, scores in part.scores.items()},
        "ours_minus": {
            name: difference(ours, scores, bootstrap)
            for name, scores in part.scores.items()
            if name != OURS
        },
        "by_gene": {
            "gene": part.genes,
            **{name: gene_table(scores) for name, scores in part.scores.items()},
        },
    }


def _means(slides: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the mean over slides of each level's, model's and metric's mean over genes."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for levels in slides.values():
        for level, part in levels.items():
            for name, scores in part["models"].items():
                for metric, score in scores.items():
                    if score["mean"] is not None:
                        by_metric = values.setdefault(level, {}).setdefault(name, {})
                        by_metric.setdefault(metric, []).append(score["mean"])
    return {
        level: {
            name: {metric: number(sum(v) / len(v)) for metric, v in scores.items()}
            for name, scores in models.items()
        }
        for level, models in values.items()
    }


def _rows(part: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings, and one row of text for each model and for its difference from ours."""
    metrics = [m for m in METRICS if any(m in scores for scores in part["models"].values())]
    rows = [
        [name, *[_with_interval(scores.get(metric)) for metric in metrics]]
        for name, scores in part["models"].items()
    ]
    rows += [
        [f"{OURS} - {name}", *[_with_interval(scores.get(metric)) for metric in metrics]]
        for name, scores in part["ours_minus"].items()
        if scores and name != f"{OURS}_shuffled"
    ]
    return ["model", *[HEADINGS[metric] for metric in metrics]], rows


def _title(slide_id: str, level: str, part: dict[str, Any]) -> str:
    return f"{slide_id}: {part.get('pairs', part.get(level)):,} {level}, {part['genes']} genes"


def markdown(report: dict[str, Any]) -> str:
    """Return the tables of a report as Markdown."""
    lines = ["# Predicted against measured expression", "", ABOUT, ""]
    for slide_id, levels in report["slides"].items():
        for level, part in levels.items():
            headings, rows = _rows(part)
            lines += [f"## {_title(slide_id, level, part)}", ""]
            lines += [*markdown_table(headings, rows, with_numbers=True), ""]
    lines += [f"- {note}" for note in report["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def _with_interval(score: dict[str, Any] | None) -> str:
    """Return a mean and its interval over rows as text."""
    if score is None or score["mean"] is None:
        return "-"
    if "over_rows" not in score:
        return format_score(score["mean"])
    low, high = score["over_rows"]
    return f"{format_score(score['mean'])} [{format_score(low)}, {format_score(high)}]"
