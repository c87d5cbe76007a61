"""Summary of a run, for people and machines: SUMMARY.md and summary.json in its folder.

Everything in it is read from the folder, so it can be written again at any time.
"""

import importlib.metadata
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

import polars as pl
import yaml

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.core.version import __version__
from scellst_ray.runs.documents import warn_once
from scellst_ray.runs.folder import DATA_FOLDERS, SUMMARY_FILE, SUMMARY_PAGE, read_config
from scellst_ray.runs.records import SlideRecord
from scellst_ray.runs.state import RunState, read_state
from scellst_ray.storage.credentials import redact

NUM_SLOWEST = 5
# Empty slides that SUMMARY.md names; summary.json names all.
NUM_EMPTY = 100
LIBRARIES = ("ray", "torch", "torchvision", "pyarrow", "numpy", "openslide-python", "openslide-bin")
# Parts in which two messages of one cause differ: names in quotes, paths and numbers.
PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[/\\]\S*|0x[0-9a-f]+|\d[\d,.]*")


def write_summary(run_uri: str, records: Mapping[str, SlideRecord] | None = None) -> dict[str, Any]:
    """Write summary.json and SUMMARY.md into a run folder; return the content of summary.json.

    Args:
        run_uri: The run folder.
        records: Records that replace published ones. The driver knows more than is published.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    summary = summarise_state(read_state(run_uri, records=records))
    storage.publish_json(storage.join(run_uri, SUMMARY_FILE), summary)
    storage.publish_text(storage.join(run_uri, SUMMARY_PAGE), markdown(summary))
    return summary


def progress_of(state: RunState) -> dict[str, Any]:
    """Return the progress of a run as JSON: the keys that `status` and the summary share."""
    slides, rate = state.slides, state.rate()
    known = int(slides["num_tiles"].sum())
    return {
        "run": redact(state.run.uri),
        "job": state.run.info.get("identity", {}).get("job"),
        "digest": state.run.folder.digest,
        "slides": {"total": len(slides), **state.counts()},
        "tiles": {
            "done": int(slides["tiles_done"].sum()),
            "failed": int(slides["tiles_failed"].sum()),
            "known": known,
        },
        "num_cells": int(slides["num_cells"].sum()),
        "throughput": {
            "seconds": round(rate.seconds, 3),
            "tiles_per_s": _round_rate(rate.tiles_per_s),
            "cells_per_s": _round_rate(rate.cells_per_s),
        },
        "slowest": slowest(slides),
        "failures": failure_groups(state),
    }


def summarise_state(state: RunState) -> dict[str, Any]:
    """Return the content of summary.json."""
    records = list(state.run.records.values())
    releases = Counter(str(record.get("scellst_ray")) for record in records)
    finished = [str(record["finished"]) for record in records if "finished" in record]
    stages = [f"seconds_{stage}" for stage in schemas.STAGES]
    seconds = state.slides.select(pl.col(stages).sum()).row(0, named=True)
    sizes = {name: storage.sizes(storage.join(state.run.uri, name)) for name in DATA_FOLDERS}
    num_bytes = {name: sum(files.values()) for name, files in sizes.items()}
    slide_bytes = state.slides["bytes"]
    logged = state.times["logged"]
    return progress_of(state) | {
        "format_version": schemas.FORMAT_VERSION,
        "written": _iso(state.now),
        "created": state.run.info.get("created"),
        "first_receipt": _iso(logged.first()),
        "last_receipt": _iso(logged.last()),
        "last_record": max(finished, default=None),
        "seconds": {n.removeprefix("seconds_"): round(float(s), 3) for n, s in seconds.items()},
        "bytes": {
            "slides": None if slide_bytes.null_count() else int(slide_bytes.sum()),
            "run": num_bytes,
        },
        "versions": {"python": platform.python_version(), "scellst_ray": __version__}
        | _libraries(),
        "releases": dict(releases),
        "identity": _redact(state.run.info.get("identity", {})),
        "config": _redact(_config(state.run.uri)),
        "empty": empty_slides(state),
    }


def _config(run_uri: str) -> dict[str, Any]:
    """Return the run's configuration; empty if its file is damaged, which gives a warning."""
    try:
        return read_config(run_uri)
    except storage.DamagedFileError as error:
        warn_once(str(error))
        return {}


def empty_slides(state: RunState) -> list[dict[str, str]]:
    """Return the slides without cells, each with the reason, by slide_id."""
    is_imported = state.run.info.get("identity", {}).get("segmenter") == "imported"
    rows = state.slides.filter(pl.col("status") == "empty").sort("slide_id")
    return [
        {
            "slide_id": row["slide_id"],
            "reason": why_empty(row["num_tiles"] or 0, is_imported=is_imported),
        }
        for row in rows.iter_rows(named=True)
    ]


def why_empty(num_tiles: int, *, is_imported: bool) -> str:
    """Return why a slide with this number of tiles has no cells."""
    if is_imported:
        return "no imported nuclei" if not num_tiles else "no imported nuclei were kept"
    return f"tissue in {num_tiles:,} tiles, but no nuclei" if num_tiles else "no tissue found"


def slowest(slides: pl.DataFrame) -> list[dict[str, Any]]:
    """Return the slides with most worker seconds, and the stage with most of these."""
    by_seconds = slides.filter(pl.col("seconds") > 0).sort(
        "seconds", "slide_id", descending=[True, False]
    )
    rows = []
    for row in by_seconds.head(NUM_SLOWEST).iter_rows(named=True):
        stages = {stage: row[f"seconds_{stage}"] or 0.0 for stage in schemas.STAGES}
        values = {name: row[name] for name in ("slide_id", "num_tiles", "num_cells")}
        longest = max(stages, key=lambda stage: stages[stage])
        rows.append(values | {"seconds": round(row["seconds"], 3), "stage": longest})
    return rows


def failure_groups(state: RunState) -> list[dict[str, Any]]:
    """Return the failures by cause, the most frequent first, with an example of each."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    slides: dict[tuple[str, ...], set[str]] = {}
    for row in state.failures.iter_rows(named=True):
        error = redact(str(row["error"]))
        kind = {name: str(row[name]) for name in ("stage", "error_type")}
        # A message may name the slide without quotes.
        key = (*kind.values(), PARTICULARS.sub("*", error.replace(row["slide_id"], "*")))
        example = {"slide_id": row["slide_id"], "tile_id": row["tile_id"], "error": error}
        group = groups.setdefault(key, kind | {"num_tiles": 0, "example": example})
        group["num_tiles"] += row["tile_id"] is not None and row["tile_id"] >= 0
        slides.setdefault(key, set()).add(row["slide_id"])
    counted = [group | {"num_slides": len(slides[key])} for key, group in groups.items()]
    return sorted(counted, key=lambda group: (-group["num_slides"], -group["num_tiles"]))


def markdown(summary: dict[str, Any]) -> str:
    """Return a summary as a page of Markdown."""
    slides = summary["slides"]
    title = f"{summary['job'] or 'run'} of {slides['total']:,} slides"
    counts = ", ".join(f"{n:,} {status}" for status, n in slides.items() if status != "total")
    lines = [
        f"# {title}",
        f"{counts}.",
        "",
        f"- run: `{summary['run']}`, digest `{summary['digest']}`",
        f"- tiles: {tiles_line(summary)}",
        f"- cells: {summary['num_cells']:,}",
        f"- throughput: {pace_line(summary)}",
        f"- created: {summary['created']}",
        f"- receipts: from {summary['first_receipt']} to {summary['last_receipt']}",
        f"- last record: {summary['last_record']}",
        f"- slides read: {format_number(summary['bytes']['slides'])} bytes; run folder: "
        + ", ".join(f"{k} {v:,}" for k, v in summary["bytes"]["run"].items() if v),
        "- versions: " + ", ".join(f"{k} {v}" for k, v in summary["versions"].items()),
        *_tables(summary),
        "",
        "## Configuration",
        "```yaml",
        yaml.safe_dump(summary["config"], sort_keys=False).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def tiles_line(progress: dict[str, Any]) -> str:
    """Return a line of text with the number of tiles that are done."""
    tiles = progress["tiles"]
    return f"{tiles['done']:,} of {tiles['known']:,} known, {tiles['failed']:,} failed"


def pace_line(progress: dict[str, Any]) -> str:
    """Return a line of text with the speed of a run."""
    rate = [
        format_number(progress["throughput"][name])
        for name in ("tiles_per_s", "cells_per_s", "seconds")
    ]
    return "{} tiles/s, {} cells/s, over {} s of receipts".format(*rate)


def _tables(summary: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the tables of a summary; a table without rows is left out."""
    total = sum(summary["seconds"].values())
    rows: list[tuple[str, ...]]
    rows = [(s, f"{v:,.1f}", f"{v / total:.0%}") for s, v in summary["seconds"].items() if v]
    yield from _table("Worker seconds", ("stage", "seconds", "share"), rows)
    names = ("slide_id", "num_tiles", "num_cells", "seconds", "stage")
    rows = [tuple(str(slide[name]) for name in names) for slide in summary["slowest"]]
    yield from _table("Slowest slides", ("slide", "tiles", "cells", "seconds", "most in"), rows)
    empty = summary["empty"]
    rows = [(slide["slide_id"], slide["reason"]) for slide in empty[:NUM_EMPTY]]
    if len(empty) > NUM_EMPTY:
        rows.append((f"... and {len(empty) - NUM_EMPTY:,} more", "see summary.json"))
    yield from _table("Empty slides", ("slide", "reason"), rows)
    rows = [failure_row(group) for group in summary["failures"]]
    yield from _table("Failures", FAILURE_HEADER, rows)


FAILURE_HEADER = ("slides", "tiles", "stage", "example", "reason")


def failure_row(group: dict[str, Any]) -> tuple[str, ...]:
    """Return a group of failures as the columns of FAILURE_HEADER."""
    example = group["example"]
    tile = example["tile_id"] is not None and example["tile_id"] >= 0
    place = example["slide_id"] + (f" tile {example['tile_id']}" if tile else "")
    reason = f"{group['error_type']}: {example['error']}"
    return f"{group['num_slides']:,}", f"{group['num_tiles']:,}", group["stage"], place, reason


def _table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    if not rows:
        return
    yield from ("", f"## {title}")
    for row in (header, ("---",) * len(header), *rows):
        # A bar would end the cell, and a line break would end the table.
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in row)
        yield f"| {' | '.join(cells)} |"


def format_number(value: float | None) -> str:
    """Return a number with thousands separators, small ones to 3 digits; '?' for None."""
    if value is None:
        return "?"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _round_rate(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _iso(when: Any) -> str | None:  # noqa: ANN401 - a value of a column of times
    return when.isoformat(timespec="milliseconds") if isinstance(when, datetime) else None


def _libraries() -> dict[str, str]:
    """Return the versions of libraries, without importing them."""
    versions = {}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _redact(value: Any) -> Any:  # noqa: ANN401 - any value of a configuration
    """Return a configuration without credentials in its URIs."""
    if isinstance(value, dict):
        return {key: _redact(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_redact(part) for part in value]
    return redact(value) if isinstance(value, str) else value
