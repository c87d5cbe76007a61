"""Rates of a sample are the seconds of its receipts per unit of work."""

import importlib
from dataclasses import replace

import pytest

from scellst_ray.preflight import calibration
from scellst_ray.preflight.calibration import calibrate
from scellst_ray.preflight.costs import DEFAULTS
from scellst_ray.preflight.slide_plans import plan_one
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.stages.rows import slide_row

# Read before the fixture below replaces them.
WORKER_MODULES, COMMAND_MODULES = calibration.WORKER_MODULES, calibration.COMMAND_MODULES
START_RAY = calibration.START_RAY


@pytest.fixture(autouse=True)
def light_start(monkeypatch):
    """Import no modules and start no Ray in child processes, which takes seconds."""
    monkeypatch.setattr(calibration, "WORKER_MODULES", ())
    monkeypatch.setattr(calibration, "START_RAY", "print('started')")


@pytest.fixture(scope="module")
def tiles(synthetic_slide, cells_spec):
    plan = plan_one(slide_row(SlideRow("s", str(synthetic_slide.slide), None)), cells_spec, keep=6)
    return list(plan.sample)


def test_the_modules_of_child_processes_exist():
    for name in (*WORKER_MODULES, *COMMAND_MODULES):
        assert importlib.import_module(name).__name__ == name
    assert callable(importlib.import_module(COMMAND_MODULES[0]).ray_session)
    compile(START_RAY, "START_RAY", "exec")


def test_rates_of_a_sample(tiles, cells_spec):
    before = [dict(tile) for tile in tiles]
    sample = calibrate(tiles, replace(cells_spec, encoder="none"), 2, on_gpu=False)
    assert tiles == before
    assert (sample.num_tiles, sample.errors) == (len(tiles), [])
    assert 0 < sample.share <= 1
    assert set(sample.rates) <= set(DEFAULTS)
    expected = {"read", "open", "segment", "segment_cell", "write", "cells_per_mm2"}
    expected |= {"cells_per_tissue_mm2", "stored_cell_bytes", "start", "start_worker"}
    assert expected <= set(sample.rates)
    assert not {"embed", "network", "finish"} & set(sample.rates)
    assert all(value >= 0 for value in sample.rates.values())
    # With one slide, its density equals the density of all slides.
    assert sample.densities == {"s": pytest.approx(sample.rates["cells_per_tissue_mm2"])}
    # The tiles cover the whole slide; its tissue has 2,500 nuclei per mm2.
    assert 300 < sample.rates["cells_per_mm2"] < 3000
    assert 100 < sample.rates["stored_cell_bytes"] < 3000


def test_embeddings_are_measured_by_the_cell(tiles, cells_spec):
    spec = replace(cells_spec, encoder="random:0:resnet18")
    sample = calibrate(tiles[:2], spec, 2, on_gpu=False)
    assert sample.rates["embed"] > 0
    assert sample.rates["crop"] > 0
    vectors = 2 * 512
    assert sample.rates["stored_cell_bytes"] > 0.7 * vectors


def test_bad_tiles_are_left_out_and_reported(tiles, cells_spec):
    spec = replace(cells_spec, encoder="none")
    bad = [tile | {"uri": "gone.tiff", "slide_id": "bad"} for tile in tiles[:2]]
    sample = calibrate([*tiles, *bad], spec, 2, on_gpu=False)
    assert sample.num_tiles == len(tiles)
    assert len(sample.errors) == 2
    assert all("gone.tiff" in error for error in sample.errors)
    with pytest.raises(ValueError, match="all 2 tiles of the sample failed"):
        calibrate(bad, spec, 2, on_gpu=False)
    with pytest.raises(ValueError, match="no slide of this cohort has a tile"):
        calibrate([], spec, 2, on_gpu=False)


def test_a_ray_that_does_not_start_is_reported(tiles, cells_spec, monkeypatch):
    monkeypatch.setattr(calibration, "START_RAY", "raise SystemExit('no room')")
    with pytest.raises(ValueError, match="Ray does not start on this machine"):
        calibrate(tiles[:1], replace(cells_spec, encoder="none"), 2, on_gpu=False)
