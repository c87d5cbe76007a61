"""The progress of a run: bars on a terminal, elsewhere a log line every 30 s."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from scellst_ray.pipelines.progress import Progress as RunProgress
from scellst_ray.pipelines.progress import Report

LOG_EVERY_S = 30.0
logger = logging.getLogger("scellst_ray")


@contextmanager
def shown_progress() -> Iterator[Report]:
    """Yield a function that shows the progress of a run, until the `with` block ends."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield log_lines()
        return
    columns = (
        TextColumn("{task.description:>7}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        slides = bars.add_task("slides", total=None, note="")
        tiles = bars.add_task("tiles", total=None, note="")

        def show(progress: RunProgress) -> None:
            bars.update(slides, total=progress.num_slides, completed=len(progress.records))
            # Only tiles of planned slides are known, so the total grows while slides are planned.
            note = f"{progress.num_cells:,} cells, {cells_per_second(progress):,.0f} cells/s"
            known = progress.num_tiles_known or None
            bars.update(tiles, total=known, completed=progress.num_tiles, note=note)

        yield show


def log_lines(every_s: float = LOG_EVERY_S) -> Report:
    """Return a function that logs the first change, then at most one line in `every_s` seconds."""
    last = [-every_s]

    def log(progress: RunProgress) -> None:
        now = time.monotonic()
        complete = len(progress.records) == progress.num_slides
        if now - last[0] < every_s and not complete:
            return
        last[0] = now
        logger.info(
            "slides %d of %d, tiles %d of %d known, %s cells, %.0f cells/s",
            len(progress.records),
            progress.num_slides,
            progress.num_tiles,
            progress.num_tiles_known,
            f"{progress.num_cells:,}",
            cells_per_second(progress),
        )

    return log


def cells_per_second(progress: RunProgress) -> float:
    """Return the mean rate of this process, without cells of an earlier one."""
    elapsed = max(time.monotonic() - progress.started, 1e-9)
    return (progress.num_cells - progress.num_cells_before) / elapsed
