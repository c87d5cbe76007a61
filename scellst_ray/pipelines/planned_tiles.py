"""TILES: the first part of the Ray Data pipeline, from slides to the tiles that workers take."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy

from scellst_ray.core.logs import log_to_stderr
from scellst_ray.pipelines import attempts
from scellst_ray.pipelines.packing import PADDING, stamp_queued
from scellst_ray.pipelines.ray_internals import dataset_of, padding_bytes
from scellst_ray.stages.rows import AttemptedSlide, PendingSlide, TileRow
from scellst_ray.stages.tiles import PLANNED, CellsSpec

SLIDES_PER_PLAN, TASKS_PER_PLANNER = 64, 8
SLIDES = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("slide_id", "uri", "mpp_error")),
        *(pa.field(name, pa.string()) for name in ("segmentation", "imported_uri", "source")),
        pa.field("thumbnail_uri", pa.string()),
        pa.field("mpp", pa.float64()),
        pa.field("mpp_confirmed", pa.bool_()),
        pa.field("done_tiles", pa.list_(pa.int64())),
    ]
)
Plan = Callable[[PendingSlide, CellsSpec], list[TileRow]]


def plan_dataset(
    rows: list[PendingSlide],
    planners: int,
    how: dict[str, Any],
    elsewhere: dict[str, str] | None = None,
) -> ray.data.Dataset:
    """Return the lazy first part of the pipeline: slides to TILES.

    Args:
        rows: Slides, as `plan_slide` takes them.
        planners: Largest number of actors.
        how: Arguments of `PlanTiles`.
        elsewhere: Ray's label selector of the nodes that may be used; None: all.
    """
    slides = [_make_slide_table(part) for part in _split_slides(rows, planners)]
    return dataset_of(slides).map_batches(
        PlanTiles,
        fn_constructor_kwargs=how,
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=planners),
        # Without a CPU slot: the workers hold all slots, and planning would wait forever.
        num_cpus=0,
        label_selector=elsewhere,
    )


def _split_slides(rows: list[PendingSlide], planners: int) -> Iterator[list[PendingSlide]]:
    """Yield the slides of each planning task.

    A task has so few slides that all planners have work and little is lost with a planner.
    """
    size = max(1, min(SLIDES_PER_PLAN, len(rows) // (TASKS_PER_PLANNER * planners)))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _make_slide_table(rows: list[PendingSlide]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SLIDES)


class PlanTiles:
    """Actor that plans slides one at a time. Ray Data maps it over the manifest."""

    def __init__(
        self,
        spec: CellsSpec,
        session: str,
        limits: attempts.Limits,
        plan: Plan,
        tiles_per_task: int,
    ) -> None:
        """Take the settings.

        Args:
            spec: Settings of the computation.
            session: Folder for the notes of attempts.
            limits: Limits of number and time of the attempts at a slide.
            plan: Plans one slide, as `plan_slide`.
            tiles_per_task: Number of tiles that a worker takes at a time.
        """
        log_to_stderr(logging.WARNING)
        self.spec, self.plan, self.tiles_per_task = spec, plan, tiles_per_task
        self.attempts = attempts.attempts_of_actor(
            session, limits.max_attempts, limits.plan_timeout_s
        )

    def __call__(self, batch: pa.Table) -> Iterable[pa.Table]:
        """Yield the tiles of a batch of slides, in blocks of one task each."""
        waiting: list[TileRow] = []
        for slide in batch.to_pylist():
            row: AttemptedSlide = slide | {"tile_id": -1}
            (tiles,) = self.attempts.run_guarded([row], self._plan)
            waiting += tiles
            while len(waiting) >= self.tiles_per_task:
                yield self._pad_rows(waiting[: self.tiles_per_task])
                waiting = waiting[self.tiles_per_task :]
        if waiting:
            yield self._pad_rows(waiting)

    def _plan(self, rows: list[AttemptedSlide], begins: Callable[[str], None]) -> list[TileRow]:
        (row,) = rows
        if row.get("error") is not None:
            failed: TileRow = {
                "slide_id": row["slide_id"],
                "tile_id": row["tile_id"],
                "num_tiles": 0,
                "uri": row["uri"],
                "stage": row.get("stage"),
                "error_type": row.get("error_type"),
                "error": row.get("error"),
            }
            return [failed]
        begins("plan")
        return self.plan(row, self.spec)

    def _pad_rows(self, rows: list[TileRow]) -> pa.Table:
        tiles = pa.Table.from_pylist(stamp_queued(rows), schema=PLANNED)
        num_bytes = padding_bytes(self.tiles_per_task, tiles.nbytes)
        padding = [bytes(num_bytes), *[b""] * (len(tiles) - 1)]
        return tiles.append_column(PADDING, pa.array(padding, pa.binary()))
