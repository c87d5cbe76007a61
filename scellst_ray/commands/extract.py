"""The command `extract`, and the summary that runs print at their end."""

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scellst_ray.commands.progress import shown_progress
from scellst_ray.pipelines.extract import extract
from scellst_ray.runs.domain_shift import domain_warnings
from scellst_ray.runs.folder import FINISHED
from scellst_ray.runs.records import SlideRecord
from scellst_ray.stages.config import ExtractConfig


def run_extract(config: ExtractConfig) -> int:
    """Run `extract`; 0 only if every slide is done or empty."""
    with shown_progress() as report:
        records = extract(config, report)
    return summarise(records, config.out)


def summarise(records: Mapping[str, SlideRecord], out: str) -> int:
    """Print what became of the slides, with the reasons of failures; return the exit code."""
    console = Console()
    counts = dict.fromkeys(("done", "empty", "partial", "failed"), 0)
    for record in records.values():
        counts[record["status"]] += 1
    num_cells = sum(record["num_cells"] for record in records.values())
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    line = f"{len(records)} slides: {text}; {num_cells:,} cells in {out}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    for text in domain_warnings(records):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    bad = {k: r for k, r in sorted(records.items()) if r["status"] not in FINISHED}
    if bad:
        table = Table("slide", "status", "tiles failed", "stage", title="not complete")
        table.add_column("reason", overflow="fold", min_width=24)
        for slide_id, record in bad.items():
            tiles = f"{record['num_failed_tiles']} of {max(1, record['num_tiles'] or 0)}"
            reason = f"{record['error_type']}: {record['error']}"
            table.add_row(slide_id, record["status"], tiles, record["stage"], escape(reason))
        console.print(table)
        console.print(
            "Mend the cause and run the same command again: it does only what is missing."
        )
    return 1 if bad else 0
