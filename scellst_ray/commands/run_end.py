"""The summary that `extract`, `predict` and `retry` print at their end."""

from collections.abc import Mapping

from rich.console import Console

from scellst_ray.commands.reports import framed_table, line_printer
from scellst_ray.runs.domain_shift import domain_warnings
from scellst_ray.runs.folder import FINISHED
from scellst_ray.runs.records import SlideRecord


def summarise(records: Mapping[str, SlideRecord], out: str) -> int:
    """Print the outcome of a run's slides, with the reasons of failures; return the exit code."""
    console = Console()
    say = line_printer(console)
    counts = dict.fromkeys(("done", "empty", "partial", "failed"), 0)
    for record in records.values():
        counts[record["status"]] += 1
    num_cells = sum(record.get("num_cells", 0) for record in records.values())
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    say(f"{len(records)} slides: {text}; {num_cells:,} cells in {out}")
    for warning in domain_warnings(records):
        say(warning)
    unfinished = {k: r for k, r in sorted(records.items()) if r["status"] not in FINISHED}
    if not unfinished:
        return 0
    rows = [
        (
            slide_id,
            record["status"],
            f"{record['num_failed_tiles']} of {max(1, record['num_tiles'] or 0)}",
            str(record["stage"]),
            f"{record['error_type']}: {record['error']}",
        )
        for slide_id, record in unfinished.items()
    ]
    headings = ("slide", "status", "tiles failed", "stage", "reason")
    console.print(framed_table(headings, rows, "not complete", wide_last=True))
    say("Fix the cause and run the same command again: it does only the missing work.")
    return 1
