"""Slides shared out to planners, and slides that cannot be planned."""

import pytest

from scellst_ray.pipelines.packing import unpack
from scellst_ray.pipelines.planned_tiles import PlanTiles, _split_slides


@pytest.mark.parametrize(
    ("num_slides", "planners", "size"), [(5, 2, 1), (64, 2, 4), (100_000, 4, 64)]
)
def test_slides_are_shared_out_to_all_planners(num_slides, planners, size):
    parts = list(_split_slides(list(range(num_slides)), planners))
    assert max(map(len, parts)) == size
    assert [row for part in parts for row in part] == list(range(num_slides))


def test_a_slide_that_ended_too_many_processes_is_one_failed_row():
    planner = PlanTiles.__new__(PlanTiles)
    planner.tiles_per_task = 2
    slide = {"slide_id": "s", "tile_id": -1, "uri": "s.svs"}
    error = {"stage": None, "error_type": "ProcessDied", "error": "slide 's': 3 attempts"}
    (row,) = planner._plan([slide | error], lambda _: pytest.fail("planned again"))
    assert row == slide | error | {"num_tiles": 0}
    (arrived,) = unpack(planner._pad_rows([row]))
    assert arrived["error"] == error["error"]
    assert "padding" not in arrived
