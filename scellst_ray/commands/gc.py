"""`scellst-ray gc`: remove what crashes left in a run folder and nothing will ever read.

That is, and nothing else:

- shards of slides that are all done or empty: their tables are written, a crash kept the shards;
- shards that no receipt names: their worker died before, or their driver before it logged them;
- imported nuclei of slides that are done or empty;
- temporary files of writers that were killed;
- notes of attempts: they mean something only to the driver that began them.

The lease is held meanwhile, so no driver works. A shard that the last good receipt of a tile names
stays, and so do all tables, records, receipts, crops and imported nuclei of unfinished slides.
"""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from scellst_ray.runs.leftovers import KINDS, sweep


@dataclass(frozen=True, kw_only=True)
class GcConfig:
    """Remove what crashes left in a run folder: orphan shards, temporary files, notes."""

    run: str
    """Run folder of `extract` or `predict`; may stand without --run."""
    dry_run: bool = False
    """Only say what would be removed."""


def gc(config: GcConfig) -> int:
    """Remove leftovers and print what they were; return 0.

    Raises:
        LeaseError: a driver works on the run.
    """
    found = sweep(config.run, dry_run=config.dry_run)
    console, done = Console(), "to remove" if config.dry_run else "removed"
    table = Table("what", "files", "bytes", title=done)
    for kind in KINDS:
        sizes = [leftover.num_bytes for leftover in found if leftover.kind == kind]
        table.add_row(kind, f"{len(sizes):,}", f"{sum(sizes):,}")
    console.print(table)
    total = sum(leftover.num_bytes for leftover in found)
    text = f"{config.run}: {done}: {len(found):,} files, {total:,} bytes"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0
