"""Progress of a run, as a driver counts it and reports it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from scellst_ray.runs.records import SlideRecord


@dataclass
class Progress:
    """The progress of a run: counts of tiles with a receipt, and records of finished slides.

    Attributes:
        num_tiles_known: Number of tiles of the slides planned so far.
        num_cells_before: The part of `num_cells` that an earlier driver found.
        started: Start of this driver, in seconds of the monotonic clock.
    """

    num_slides: int
    records: dict[str, SlideRecord] = field(default_factory=dict)
    num_tiles: int = 0
    num_tiles_known: int = 0
    num_cells: int = 0
    num_cells_before: int = 0
    started: float = field(default_factory=time.monotonic)


Report = Callable[[Progress], None]
