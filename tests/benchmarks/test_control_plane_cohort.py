"""The cohort that benchmarks/control_plane.py makes up, and how it shares out CPU time."""

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from scellst_ray.stages.tiles import MAX_CELLS_PER_TILE, box_of
from tests.support.paths import ROOT

FILE = ROOT / "benchmarks" / "control_plane.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_control_plane", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _slide(number, done=()):
    return {"slide_id": f"s{number:06d}", "uri": f"{number}.svs", "done_tiles": list(done)}


def test_slides_have_a_hundred_tiles_on_average(bench):
    assert np.mean([bench.tiles_of(number) for number in range(9)]) == 100
    assert len({bench.tiles_of(number) for number in range(9)}) > 3


def test_a_plan_covers_the_slide_once_and_leaves_out_what_is_done(bench, cells_spec):
    spec = replace(cells_spec, core_px=bench.CORE_PX, halo_px=bench.HALO_PX)
    tiles = bench.plan(_slide(5), spec)
    assert [row["tile_id"] for row in tiles] == list(range(bench.tiles_of(5)))
    cores = [box_of(row, "core") for row in tiles]
    assert len(set(cores)) == len(cores)
    area0 = sum(core.w0 * core.h0 for core in cores)
    assert area0 == tiles[0]["width0"] * tiles[0]["height0"]
    rest = bench.plan(_slide(5, done=range(3, len(tiles))), spec)
    assert [row["tile_id"] for row in rest] == [0, 1, 2]
    assert {row["num_tiles"] for row in rest} == {len(tiles)}


def test_every_tile_gets_cells_with_ids_of_its_own(bench, cells_spec):
    spec = replace(cells_spec, core_px=bench.CORE_PX, halo_px=bench.HALO_PX)
    rows = bench.plan(_slide(0), spec)[:4]
    rows[1] |= {"error": "as it happens"}
    found = bench.find(rows)
    assert "cells" not in found[1]
    for row in (found[0], found[2], found[3]):
        tile_ids = np.array(row["cells"]["cell_id"]) // MAX_CELLS_PER_TILE
        assert tile_ids.tolist() == [row["tile_id"]] * bench.CELLS_PER_TILE


def test_cpu_time_is_that_since_the_first_tiles_by_kind_of_process(bench):
    watch = SimpleNamespace(
        cpu_s_at_start={1: ("driver", 10.0), 2: ("workers", 4.0)},
        cpu_s={1: ("driver", 12.5), 2: ("workers", 7.0), 3: ("workers", 2.0), 4: ("gcs", 1.0)},
    )
    found = bench.Watch.cpu_by_part(watch)
    assert found == {"driver": 2.5, "gcs": 1.0, "workers": 5.0}
