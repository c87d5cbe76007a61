"""`scellst-ray status`: the progress of a run, while a driver works on it or later."""

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console

from scellst_ray.commands.reports import framed_table, line_printer
from scellst_ray.runs.folder import SUMMARY_FILE, SUMMARY_PAGE
from scellst_ray.runs.state import Holder, RunState, read_state
from scellst_ray.runs.summary import (
    FAILURE_HEADER,
    failure_row,
    format_number,
    pace_line,
    progress_of,
    tiles_line,
    write_summary,
)

NUM_FAILURES = 20
STATES = {
    "none": "no driver works on it",
    "alive": "a driver works on it: {who}, renewed {renewed}",
    "silent": "a driver on another host may work on it: {who}, last renewed {renewed}",
    "dead": "no driver works on it; the last one was killed: {who}, last renewed {renewed}",
}


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Show the progress of a run from its folder: slides by status, speed, time left, failures."""

    run: str
    """Run folder of `extract` or `predict`. The name --run may be left out."""
    json: bool = False
    """Print JSON instead of tables."""
    write: bool = False
    """Write summary.json and SUMMARY.md into the folder too, as the end of a run does."""


def status(config: StatusConfig) -> int:
    """Print the progress of a run; return 0."""
    state = read_state(config.run)
    progress = status_of(state)
    console = Console()
    if config.json:
        print(json.dumps(progress, indent=2))  # noqa: T201 - no console, which would fold lines
    else:
        _show(console, progress, state.holder)
    if config.write:
        write_summary(config.run)
        if not config.json:
            line_printer(console)(f"wrote {SUMMARY_FILE} and {SUMMARY_PAGE} into {config.run}")
    return 0


def status_of(state: RunState) -> dict[str, Any]:
    """Return the document of `status --json`: the summary of the run and its present state."""
    recent, left, eta_s = state.recent_rate(), state.tiles_left(), state.eta_s()
    names = ("host", "pid", "acquired", "renewed", "expires")
    lease: dict[str, object] = {**(state.holder.lease or {})}
    about_driver = {name: lease.get(name) for name in names}
    return progress_of(state) | {
        "now": state.now.isoformat(timespec="milliseconds"),
        "driver": {"state": state.holder.state} | about_driver,
        "recent": asdict(recent) | {"tiles_per_s": recent.tiles_per_s},
        "tiles_left": None if left is None else round(left),
        "eta_s": None if eta_s is None else round(eta_s, 1),
    }


def _show(console: Console, progress: dict[str, Any], holder: Holder) -> None:
    """Print a status as lines and tables."""
    slides = progress["slides"]
    counts = ", ".join(f"{n:,} {name}" for name, n in slides.items() if name != "total")
    lines = [
        f"{progress['job'] or 'run'} in {progress['run']}: {slides['total']:,} slides: {counts}",
        f"tiles: {tiles_line(progress)}; {progress['num_cells']:,} cells",
        f"speed: {pace_line(progress)}",
        driver_line(holder, datetime.fromisoformat(progress["now"])),
    ]
    if holder.may_work:
        now = format_number(progress["recent"]["tiles_per_s"])
        left = "?" if progress["tiles_left"] is None else f"about {progress['tiles_left']:,}"
        eta = "?" if progress["eta_s"] is None else _span(progress["eta_s"])
        lines.append(f"now: {now} tiles/s, {left} tiles left, {eta} to go")
    for line in lines:
        line_printer(console)(line)
    if progress["slowest"]:
        headings = ("slide", "tiles", "cells", "worker s", "most in")
        rows = [
            (
                row["slide_id"],
                *(f"{row[name] or 0:,}" for name in ("num_tiles", "num_cells")),
                format_number(row["seconds"]),
                row["stage"],
            )
            for row in progress["slowest"]
        ]
        console.print(framed_table(headings, rows, "slowest slides"))
    _show_failures(console, progress["failures"])


def _show_failures(console: Console, groups: list[dict[str, Any]]) -> None:
    if not groups:
        return
    rows = [failure_row(group) for group in groups[:NUM_FAILURES]]
    console.print(framed_table(FAILURE_HEADER, rows, "failures, by cause", wide_last=True))
    if len(groups) > NUM_FAILURES:
        console.print(f"and {len(groups) - NUM_FAILURES:,} more: see --json", highlight=False)
    console.print("Fix the cause and run `scellst-ray retry` on the folder.", highlight=False)


def driver_line(holder: Holder, now: datetime) -> str:
    """Return a line that says whether a driver works on a run, since when and where."""
    parts = dict.fromkeys(("who", "renewed"), "")
    lease = holder.lease
    if lease is not None:
        acquired = now - datetime.fromisoformat(lease["acquired"])
        renewed = now - datetime.fromisoformat(lease.get("renewed", lease["acquired"]))
        who = f"process {lease['pid']} on {lease['host']}"
        who += f", since {lease['acquired']} ({_span(acquired.total_seconds())})"
        parts = {"who": who, "renewed": f"{_span(renewed.total_seconds())} ago"}
    return STATES[holder.state].format(**parts)


def _span(seconds: float) -> str:
    """Return a duration as text: 0:12:05, or 3 days, 1:00:00."""
    return str(timedelta(seconds=round(max(seconds, 0.0))))
