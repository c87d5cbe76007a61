"""Estimates of costs equal closed forms."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scellst_ray.preflight.costs import (
    DEFAULTS,
    PlannedCluster,
    Rates,
    RunShape,
    total,
    used,
    wall_s,
    work_of,
)
from scellst_ray.preflight.slide_plans import SlidePlan

SHAPE = RunShape(
    network=True,
    pixels=True,
    crops=True,
    embed=True,
    side_px=1000,
    vector_dims=100,
    tiles_per_task=2,
)
SLIDE = SlidePlan(
    "s", num_tiles=10, tissue_mm2=2.0, core_mm2=4.0, read_mpx=9.0, num_bytes=500, seconds=3.0
)
ONE = {
    "open": 1.0,
    "read": 2.0,
    "network": 3.0,
    "network_gpu": 0.5,
    "segment": 4.0,
    "segment_cell": 0.25,
    "crop": 0.1,
    "embed": 0.2,
    "embed_gpu": 0.01,
    "write": 6.0,
    "finish": 0.05,
    "finish_slide": 7.0,
    "task": 0.5,
    "start": 20.0,
    "start_worker": 6.0,
    "cells_per_mm2": 100.0,
    "cells_per_tissue_mm2": 60.0,
    "cell_bytes": 10.0,
    "stored_cell_bytes": math.nan,
}
RATES = Rates().replaced(ONE, "test")
CPUS = PlannedCluster(cpus=4, gpus=0, workers=4)


def test_the_names_are_those_of_the_defaults():
    assert set(ONE) == set(DEFAULTS)
    assert set(RATES.sources.values()) == {"test"}
    assert set(used(SHAPE, CPUS)) <= set(DEFAULTS)
    assert "network_gpu" in used(SHAPE, PlannedCluster(8, 1, 8))


def test_work_on_cpus_is_rates_times_units():
    work = work_of(SLIDE, RATES, SHAPE, CPUS)
    assert work.cells == 120  # by tissue
    assert work.cpu_s == {
        "plan": 3.0,
        "open": 4.0,  # once by each of four workers
        "read": 18.0,
        "segment": 36.0 + 30.0,
        "crop": pytest.approx(12.0),
        "write": 60.0,
        "task": 2.5,
        "finish": pytest.approx(13.0),
        "network": 30.0,  # whole tiles
        "embed": 24.0,
    }
    assert work.gpu_s == {}
    kept = 120 * (10 + 1.9 * 100)
    assert (work.bytes_kept, work.bytes_written) == (kept, 2 * kept)
    assert work.bytes_read == 500 + kept


def test_on_gpus_networks_are_theirs_and_stages_that_are_not_there_take_nothing():
    work = work_of(SLIDE, RATES, SHAPE, PlannedCluster(cpus=8, gpus=2, workers=8))
    assert work.gpu_s == {"network": 5.0, "embed": pytest.approx(1.2)}
    assert "network" not in work.cpu_s
    bare = replace(SHAPE, network=False, crops=False, embed=False, pixels=False, vector_dims=0)
    work = work_of(SLIDE, RATES, bare, CPUS)
    zero = ("open", "read", "crop", "network", "embed")
    assert [work.cpu_s[name] for name in zero] == [0.0] * 5


def test_cells_by_core_area_where_tissue_tells_nothing_and_as_imported():
    assert work_of(replace(SLIDE, tissue_mm2=None), RATES, SHAPE, CPUS).cells == 400
    by_run = RATES.replaced({"cells_per_tissue_mm2": math.nan}, "run")
    assert work_of(SLIDE, by_run, SHAPE, CPUS).cells == 400
    assert work_of(replace(SLIDE, num_cells=7), RATES, SHAPE, CPUS).cells == 7
    own = replace(RATES, densities={"s": 30.0, "other": 1.0})
    assert work_of(SLIDE, own, SHAPE, CPUS).cells == 60
    stored = RATES.replaced({"stored_cell_bytes": 2.0}, "run")
    assert work_of(SLIDE, stored, SHAPE, CPUS).bytes_kept == 240


def test_a_slide_without_tiles_takes_its_planning():
    empty = work_of(SlidePlan("e", seconds=1.5), RATES, SHAPE, CPUS)
    assert empty.all_cpu_s == 1.5
    bad = work_of(SlidePlan("b", error="no such file"), RATES, SHAPE, CPUS)
    assert (bad.all_cpu_s, bad.tiles, bad.bytes_read) == (0, 0, 0)
    both = total([empty, bad], SHAPE)
    assert both.slides == 0
    # Four workers and the load of two more start on four CPUs.
    assert wall_s(both, RATES, SHAPE, CPUS) == 20 + 6 * (4 + 2) / 4 + 1.5


def test_totals_are_sums_and_crops_are_bounded():
    works = [work_of(SLIDE, RATES, SHAPE, CPUS)] * 3
    everything = total(works, replace(SHAPE, kept_crops=200))
    assert everything.tiles == 30
    assert everything.all_cpu_s == pytest.approx(3 * works[0].all_cpu_s)
    assert everything.bytes_kept == pytest.approx(3 * works[0].bytes_kept + 200 * 3000)


def test_wall_time_of_one_worker_is_everything_in_turn():
    one = PlannedCluster(cpus=1, gpus=0, workers=1)
    works = [work_of(SLIDE, RATES, SHAPE, one)] * 100
    everything = total(works, SHAPE)
    seconds = wall_s(everything, RATES, SHAPE, one)
    # On one CPU nothing overlaps; planning and finishing of one slide count twice.
    assert seconds == pytest.approx(20 + 6 * 3 + everything.all_cpu_s + 3 + 13)


def test_wall_time_is_that_of_what_is_busiest():
    works = [work_of(SLIDE, RATES, SHAPE, PlannedCluster(64, 1, 64))] * 100
    everything = total(works, SHAPE)
    # 100 slides, each with 5 s of network and 61.2 s of embedding and writing on one GPU.
    seconds = wall_s(everything, RATES, SHAPE, PlannedCluster(64, 1, 64))
    assert seconds == pytest.approx(20 + 6120, rel=0.05)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 8), st.integers(1, 300))
def test_more_of_anything_is_never_slower(cpus, more, gpus, num_slides):
    def of(cluster):
        # Each worker opens each slide; this cost of more workers is left out here.
        free = RATES.replaced({"open": 0.0}, "test")
        everything = total([work_of(SLIDE, free, SHAPE, cluster)] * num_slides, SHAPE)
        body = wall_s(everything, free, SHAPE, cluster)
        task_s = (everything.all_cpu_s + everything.all_gpu_s) * 2 / everything.tiles
        return body, task_s

    few, task_s = of(PlannedCluster(cpus, gpus, cpus))
    many, _ = of(PlannedCluster(cpus + more, gpus, cpus + more))
    # The tail grows: with more workers, more of them wait for the last task.
    assert many <= few + task_s
