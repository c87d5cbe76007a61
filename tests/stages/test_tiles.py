"""Errors as values of rows, and boxes as columns."""

import numpy as np
import pytest

from scellst_ray.core import schemas
from scellst_ray.core.geometry import Box
from scellst_ray.stages.tiles import box_columns, box_of, guarded, todo


@pytest.mark.parametrize("kind", [MemoryError, np._core._exceptions._ArrayMemoryError])
def test_lack_of_memory_is_one_kind_of_error_and_says_what_to_do(kind):
    row = {"slide_id": "s", "tile_id": 3}
    with guarded(row, "read"):
        raise kind if kind is MemoryError else kind((9,), np.dtype("u1"))
    assert (row["stage"], row["error_type"]) == ("read", "MemoryError")
    assert "memory_gb" in row["error"]


def test_an_error_becomes_a_value_and_seconds_are_noted():
    row = {"slide_id": "s", "tile_id": 3, "num_tiles": 9}
    with guarded(row, "crop"):
        row["num_cells"] = 4
    assert row.keys() == {"slide_id", "tile_id", "num_tiles", "num_cells", "seconds_crop"}
    error = ValueError("no crops")
    error.add_note("in test")
    with guarded(row, "embed"):
        raise error
    assert (row["stage"], row["error_type"], row["error"]) == (
        "embed",
        "ValueError",
        "no crops in test",
    )
    assert row["seconds_embed"] >= 0


def test_rows_with_work_left_have_a_tile_and_no_error():
    fine, empty, failed = {"num_tiles": 2}, {"num_tiles": 0}, {"num_tiles": 2, "error": "x"}
    assert todo([fine, empty, failed]) == [fine]


def test_boxes_are_columns_and_back():
    core, read = Box(10, 20, 30, 40), Box(5, 15, 40, 50)
    row = box_columns(core, read)
    assert (
        list(row)
        == [name for name in schemas.TILES.names if name.startswith(("core", "read_"))][-8:]
    )
    assert (box_of(row, "core"), box_of(row, "read")) == (core, read)


def test_an_error_is_stored_without_the_signature_of_a_redirect():
    row = {"slide_id": "s", "tile_id": 3}
    with guarded(row, "read"):
        message = "404, url='https://host/a.svs?X-Amz-Signature=hunter2'"
        raise RuntimeError(message)
    assert row["error"] == "404, url='https://host/a.svs'"
