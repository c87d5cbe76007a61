"""The report of `evaluate segmentation`: tables on the console, a file of scores."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table

from scellst_ray import storage
from scellst_ray.commands.reports import format_score, line_printer, score_table
from scellst_ray.core.version import __version__
from scellst_ray.evaluation.segmentation.config import EvaluateSegmentationConfig
from scellst_ray.evaluation.segmentation.evaluate import Evaluation, evaluate_segmentation
from scellst_ray.evaluation.segmentation.image_scores import as_dict

ALL = "all"
HEADINGS = {"num_true": "true", "num_predicted": "found", "precision": "prec."}
CENTROID_SCORES = ("num_true", "num_predicted", "f1", "precision", "recall")
MASK_SCORES = (*CENTROID_SCORES, "sq", "pq", "aji")
TYPE_SCORES = ("num_true", "num_predicted", "detected", "f1", "precision", "recall", "pq")


def run_evaluate_segmentation(config: EvaluateSegmentationConfig) -> int:
    """Run `evaluate segmentation`: print tables, write `out`; return 0."""
    result = evaluate_segmentation(config)
    rows = {
        n: as_dict(s, typed=result.typed) for n, s in (*result.images.items(), (ALL, result.all))
    }
    console = Console()
    say = line_printer(console)
    for part, title, scores in (
        ("masks", "masks, IoU above 0.5; all: sums and means", MASK_SCORES),
        ("centroids", f"centroids within {config.radius_um:g} um; all: sums", CENTROID_SCORES),
    ):
        parts = {name: row[part] for name, row in rows.items() if part in row}
        if parts:
            console.print(_table("image", title, parts, scores))
    if rows[ALL].get("types"):
        title = "types, over all images"
        console.print(_table("type", title, rows[ALL]["types"], TYPE_SCORES))
    for note in result.notes:
        say(f"note: {note}")
    if config.out is not None:
        _write(config.out, rows, result, config)
        say(f"wrote {config.out}")
    return 0


def _table(
    first: str, title: str, rows: Mapping[str, Mapping[str, Any]], names: tuple[str, ...]
) -> Table:
    """Return a table of scores, one row each, without columns that no row has."""
    shown = [name for name in names if any(name in row for row in rows.values())]
    headings = [name.upper() if len(name) < 4 else HEADINGS.get(name, name) for name in shown]
    texts = [[name, *[format_score(row.get(key)) for key in shown]] for name, row in rows.items()]
    return score_table([first, *headings], texts, title)


def _write(
    out: str,
    rows: Mapping[str, Mapping[str, Any]],
    result: Evaluation,
    config: EvaluateSegmentationConfig,
) -> None:
    """Write the scores: nested as JSON, or one row per image as CSV."""
    if out.endswith(".json"):
        images = {name: row for name, row in rows.items() if name in result.images}
        text = {
            "images": images,
            ALL: rows[ALL],
            "notes": result.notes,
            "config": asdict(config),
        }
        storage.publish_json(out, text | {"scellst_ray": __version__})
        return
    flat = [{"slide_id": name} | _flat(row) for name, row in rows.items()]
    table = pl.DataFrame(flat, infer_schema_length=None)
    storage.publish_text(out, table.write_csv())


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict, with keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
