"""The report of `evaluate encoder`: tables on the console, report.json, report.md, gallery.png."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console

from scellst_ray import storage
from scellst_ray.commands.reports import line_printer, markdown_table, score_table
from scellst_ray.core.version import __version__
from scellst_ray.evaluation.encoder.config import EvaluateEncoderConfig
from scellst_ray.evaluation.encoder.evaluate import EncoderEvaluation, evaluate_encoder
from scellst_ray.evaluation.encoder.galleries import gallery

# Title, headings and rows of a table.
Rows = tuple[str, Sequence[str], Sequence[Sequence[str]]]
SCORES = {"probe": "linear probe", "knn": "nearest cells"}


def run_evaluate_encoder(config: EvaluateEncoderConfig) -> int:
    """Run `evaluate encoder`: print tables, write `out`; return 0."""
    console = Console()
    say = line_printer(console)
    evaluation = evaluate_encoder(config, say)
    for title, headings, rows in tables(evaluation, config):
        console.print(score_table(headings, rows, title))
    for note in evaluation.notes:
        say(f"note: {note}")
    if config.out is not None:
        write(config.out, evaluation, config)
        say(f"wrote {config.out}")
    return 0


def tables(evaluation: EncoderEvaluation, config: EvaluateEncoderConfig) -> list[Rows]:
    """Return the tables as text: scores, differences, recall by type, batch effect."""
    names = [str(name) for name in np.unique(evaluation.cells.types_N)]
    return [
        (
            "balanced accuracy on held-out slides (95 % interval over slides)",
            ("encoder", "length", *SCORES.values()),
            [
                [name, str(row["dim"]), *[_with_interval(row[key]) for key in SCORES]]
                for name, row in evaluation.scores.items()
            ],
        ),
        (
            f"{config.encoder} minus each other encoder, on the same cells",
            ("other", *SCORES.values()),
            [
                [name, *[_with_interval(row[key], sign="+") for key in SCORES]]
                for name, row in evaluation.differences.items()
            ],
        ),
        (
            "linear probe, recall by type",
            ("encoder", *names),
            [
                [name, *[f"{row['probe']['recall'][kind]:.3f}" for kind in names]]
                for name, row in evaluation.scores.items()
            ],
        ),
        (
            f"the {config.neighbours} nearest cells (share expected by chance)",
            ("encoder", "of the same slide", "of the same type, in other slides"),
            [[name, *_purity(row["purity"])] for name, row in evaluation.scores.items()],
        ),
    ]


def write(out: str, evaluation: EncoderEvaluation, config: EvaluateEncoderConfig) -> None:
    """Write report.json, report.md and gallery.png below `out`."""
    types_N, groups_N = evaluation.cells.types_N, evaluation.cells.groups_N
    counts = {
        str(group): {
            str(kind): int((types_N[groups_N == group] == kind).sum())
            for kind in np.unique(types_N[groups_N == group])
        }
        for group in np.unique(groups_N)
    }
    report: dict[str, Any] = {"encoders": evaluation.scores, "differences": evaluation.differences}
    report |= {"cells": counts, "notes": evaluation.notes, "config": asdict(config)}
    storage.publish_json(storage.join(out, "report.json"), report | {"scellst_ray": __version__})
    storage.publish_text(storage.join(out, "report.md"), markdown(evaluation, config, counts))
    title = f"{config.encoder}: cells and their nearest in other slides"
    storage.publish(
        storage.join(out, "gallery.png"),
        lambda path: gallery(
            path, evaluation.cells.crops_NHWC, types_N, groups_N, evaluation.retrieved, title
        ),
    )


def markdown(
    evaluation: EncoderEvaluation, config: EvaluateEncoderConfig, counts: dict[str, dict[str, int]]
) -> str:
    """Return the report as Markdown."""
    chance = 1 / len(np.unique(evaluation.cells.types_N))
    about = (
        f"{len(evaluation.cells.types_N):,} cells of {len(counts)} slides. Each slide is scored by "
        "a probe, or by neighbours, of the other slides. Every type counts the same, so chance is "
        f"{chance:.3f}. `colours` are 18 statistics of the crop's red, green and blue. An encoder "
        "with a higher score than `colours` sees more than stain."
    )
    lines = [f"# Encoder {config.encoder}", "", about, ""]
    for title, headings, rows in tables(evaluation, config):
        lines += [f"## {title}", "", *markdown_table(headings, rows, with_numbers=True), ""]
    kinds = sorted({kind for row in counts.values() for kind in row})
    cells = [[name, *[str(row.get(kind, 0)) for kind in kinds]] for name, row in counts.items()]
    lines += ["## cells", "", *markdown_table(["slide", *kinds], cells, with_numbers=True)]
    lines += ["", *[f"- {note}" for note in evaluation.notes], "", "![gallery](gallery.png)", ""]
    return "\n".join(lines)


def _with_interval(score: dict[str, Any], sign: str = "") -> str:
    low, high = score["interval_slides"]
    value = score["balanced_accuracy"]
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def _purity(row: dict[str, float]) -> list[str]:
    """Return both shares, each with the share expected by chance."""
    return [
        f"{row['same_slide']:.3f} ({row['same_slide_chance_of_type']:.3f})",
        f"{row['same_type']:.3f} ({row['same_type_chance']:.3f})",
    ]
