"""A watch that stops a run when slide after slide fails on one GPU, to save the cohort."""

import socket
from collections.abc import Sequence

from scellst_ray.stages.rows import AttemptedRow

SLIDES_OF_BROKEN_GPU = 3
STAGES = ("network", "embed")


class GpuError(RuntimeError):
    """Error of a GPU on which slide after slide failed."""


class GpuWatch:
    """The slides that failed in a network one after another, on one worker's GPU.

    A failure may be the fault of a tile or of its slide. If no tile of three slides succeeds, the
    GPU is at fault.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        """Start without failed slides; a worker without a GPU never counts any."""
        self.on_gpu = on_gpu
        self.failed_slides: list[str] = []

    def look(self, rows: Sequence[AttemptedRow]) -> None:
        """Count the slides of rows that went through a stage, or were given up.

        Raises:
            GpuError: three slides have failed one after another.
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
                "out, give it smaller tiles (core_px), or run with gpus: false. Then run the same "
                "command: finished slides stay"
            )
            raise GpuError(message)
