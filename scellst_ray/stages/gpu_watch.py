"""When slide after slide fails on one GPU: the run is stopped, rather than turned into failures."""

import socket
from collections.abc import Sequence

from scellst_ray.stages.rows import AttemptedRow

SLIDES_OF_BROKEN_GPU = 3
STAGES = ("network", "embed")


class GpuError(RuntimeError):
    """A GPU that fails slide after slide."""


class GpuWatch:
    """Which slides have failed in a network, in a row and on one worker's GPU.

    Tiles may be at fault, and slides; hardly three slides without one tile that succeeds between.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        """Start with none; a worker without a GPU never has any."""
        self.on_gpu = on_gpu
        self.failed_slides: list[str] = []

    def look(self, rows: Sequence[AttemptedRow]) -> None:
        """Take note of rows that went through a stage, or were given up.

        Raises:
            GpuError: too many slides have failed.
        """
        if any(row.get("error") is None for row in rows):
            self.failed_slides = []
            return
        for row in rows:
            if self.on_gpu and row.get("stage") in STAGES:
                self._add(row)

    def _add(self, row: AttemptedRow) -> None:
        if row["slide_id"] not in self.failed_slides:
            self.failed_slides.append(row["slide_id"])
        if len(self.failed_slides) >= SLIDES_OF_BROKEN_GPU:
            message = (
                f"{socket.gethostname()}: no tile of {len(self.failed_slides)} slides in a row "
                f"({', '.join(self.failed_slides)}) got through stage {row['stage']} on its GPU; "
                f"the last: {row['error_type']}: {row['error']}; check that GPU, leave the node "
                "out, give it smaller tiles (core_px), or run with gpus: false. Run the same "
                "command then: what is finished stays"
            )
            raise GpuError(message)
