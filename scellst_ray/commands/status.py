"""`scellst-ray status`: where a run stands, while a driver works on it or after."""

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
    """Where a run stands: slides by status, speed, time left, failures; reads its folder only."""

    run: str
    """Run folder of `extract` or `predict`; may stand without --run."""
    json: bool = False
    """Print JSON instead of tables."""
    write: bool = False
    """Also write summary.json and SUMMARY.md into the folder, as the end of a run does."""


def status(config: StatusConfig) -> int:
    """Print where a run stands; return 0."""
    state = read_state(config.run)
    found = status_of(state)
    console = Console()
    if config.json:
        print(json.dumps(found, indent=2))  # noqa: T201 - no console, which would fold lines
    else:
        _show(console, found, state.holder)
    if config.write:
        write_summary(config.run)
        if not config.json:
            text = f"wrote {SUMMARY_FILE} and {SUMMARY_PAGE} into {config.run}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def status_of(state: RunState) -> dict[str, Any]:
    """Return what `status --json` prints: what the summary has, and what only holds now."""
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


def _show(console: Console, found: dict[str, Any], holder: Holder) -> None:
    """Print a status as lines and tables."""
    slides = found["slides"]
    counts = ", ".join(f"{n:,} {name}" for name, n in slides.items() if name != "total")
    lines = [
        f"{found['job'] or 'run'} in {found['run']}: {slides['total']:,} slides: {counts}",
        f"tiles: {tiles_line(found)}; {found['num_cells']:,} cells",
        f"speed: {pace_line(found)}",
        driver_line(holder, datetime.fromisoformat(found["now"])),
    ]
    if holder.may_work:
        now = format_number(found["recent"]["tiles_per_s"])
        left = "?" if found["tiles_left"] is None else f"about {found['tiles_left']:,}"
        eta = "?" if found["eta_s"] is None else _span(found["eta_s"])
        lines.append(f"now: {now} tiles/s, {left} tiles left, {eta} to go")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if found["slowest"]:
        table = Table("slide", "tiles", "cells", "worker s", "most in", title="slowest slides")
        for row in found["slowest"]:
            numbers = (f"{row[name] or 0:,}" for name in ("num_tiles", "num_cells"))
            table.add_row(row["slide_id"], *numbers, format_number(row["seconds"]), row["stage"])
        console.print(table)
    _show_failures(console, found["failures"])


def _show_failures(console: Console, groups: list[dict[str, Any]]) -> None:
    if not groups:
        return
    table = Table(*FAILURE_HEADER[:-1], title="failures, by cause")
    table.add_column(FAILURE_HEADER[-1], overflow="fold", min_width=24)
    for group in groups[:NUM_FAILURES]:
        table.add_row(*map(escape, failure_row(group)))
    console.print(table)
    if len(groups) > NUM_FAILURES:
        console.print(f"and {len(groups) - NUM_FAILURES:,} more: see --json", highlight=False)
    console.print("Mend the cause and run `scellst-ray retry` on the folder.", highlight=False)


def driver_line(holder: Holder, now: datetime) -> str:
    """Say whether a driver works on a run, since when and where."""
    parts = dict.fromkeys(("who", "renewed"), "")
    lease = holder.lease
    if lease is not None:
        acquired = now - datetime.fromisoformat(lease["acquired"])
        renewed = now - datetime.fromisoformat(lease["renewed"])
        who = f"process {lease['pid']} on {lease['host']}"
        who += f", since {lease['acquired']} ({_span(acquired.total_seconds())})"
        parts = {"who": who, "renewed": f"{_span(renewed.total_seconds())} ago"}
    return STATES[holder.state].format(**parts)


def _span(seconds: float) -> str:
    """Return a time as people say it: 0:12:05, or 3 days, 1:00:00."""
    return str(timedelta(seconds=round(max(seconds, 0.0))))
