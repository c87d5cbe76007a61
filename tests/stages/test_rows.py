"""Rows of tiles have the fields that the tables say, no more and no fewer."""

from typing import get_type_hints

from scellst_ray.core import schemas
from scellst_ray.pipelines.packing import ARRAYS
from scellst_ray.pipelines.planned_tiles import SLIDES
from scellst_ray.stages.rows import (
    SECONDS_OF_STAGE,
    AttemptedRow,
    AttemptedSlide,
    PendingSlide,
    TileRow,
)
from scellst_ray.stages.tiles import PLANNED

BETWEEN_STAGES = {"cells", "frame", *ARRAYS}


def test_a_tile_has_the_fields_of_tiles_and_receipts():
    stored = {*PLANNED.names, *schemas.RECEIPTS.names}
    assert set(TileRow.__annotations__) - {"seconds_open"} == stored | BETWEEN_STAGES


def test_a_tile_needs_what_no_receipt_lacks():
    never_null = {field.name for field in schemas.TILES if not field.nullable}
    assert TileRow.__required_keys__ == never_null


def test_types_are_those_of_the_columns():
    kinds = {"string": str, "int32": int, "int64": int, "float": float, "double": float}
    hints = get_type_hints(TileRow)
    for field in [*PLANNED, *schemas.RECEIPTS]:
        kind = kinds[str(field.type)]
        assert hints[field.name] in (kind, kind | None), field.name


def test_a_slide_to_plan_has_the_columns_that_ray_carries():
    assert set(PendingSlide.__annotations__) == set(SLIDES.names)
    assert PendingSlide.__required_keys__ == set(SLIDES.names)
    assert AttemptedRow.__required_keys__ <= AttemptedSlide.__required_keys__


def test_every_stage_has_its_seconds():
    assert {*schemas.STAGES, "open"} == set(SECONDS_OF_STAGE)
    assert all(name == f"seconds_{stage}" for stage, name in SECONDS_OF_STAGE.items())
    assert set(SECONDS_OF_STAGE.values()) <= TileRow.__optional_keys__
