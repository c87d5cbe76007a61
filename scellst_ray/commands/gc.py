"""`scellst-ray gc`: remove what crashes left in a run folder and nothing will ever read.

It removes these files and nothing else:

- shards (tables of some tiles) of slides that are all done or empty. Their tables are written, and
  a crash kept the shards;
- shards that no receipt (the log entry of a tile) names. Their worker died before it sent one, or
  their driver before it logged it;
- imported nuclei of slides that are done or empty;
- temporary files of writers that were killed;
- notes of attempts, which only the driver that began them can use.

The command holds the run's lease, so no driver works on it. A shard that the last good receipt of a
tile names stays. So do all tables, records, receipts and crops, and imported nuclei of unfinished
slides.
"""

from dataclasses import dataclass

from rich.console import Console

from scellst_ray.commands.reports import framed_table, line_printer
from scellst_ray.runs.leftovers import KINDS, sweep


@dataclass(frozen=True, kw_only=True)
class GcConfig:
    """Remove what crashes left in a run folder: orphan shards, temporary files, notes."""

    run: str
    """Run folder of `extract` or `predict`. The name --run may be left out."""
    dry_run: bool = False
    """Only print what would be removed."""


def gc(config: GcConfig) -> int:
    """Remove leftovers and print their numbers and sizes; return 0.

    Raises:
        LeaseError: a driver works on the run.
    """
    leftovers = sweep(config.run, dry_run=config.dry_run)
    console, done = Console(), "to remove" if config.dry_run else "removed"
    rows = []
    for kind in KINDS:
        sizes = [leftover.num_bytes for leftover in leftovers if leftover.kind == kind]
        rows.append((kind, f"{len(sizes):,}", f"{sum(sizes):,}"))
    console.print(framed_table(("what", "files", "bytes"), rows, done))
    total = sum(leftover.num_bytes for leftover in leftovers)
    line_printer(console)(f"{config.run}: {done}: {len(leftovers):,} files, {total:,} bytes")
    return 0
