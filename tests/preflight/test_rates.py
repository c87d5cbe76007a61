"""Rates from earlier runs: runs with known rates give these rates back."""

import math

import numpy as np
import pytest

from scellst_ray import storage
from scellst_ray.preflight.costs import Rates
from scellst_ray.preflight.rates import split_segment, with_runs
from scellst_ray.runs.folder import RunFolder

IDENTITY = {"segmenter": "hematoxylin", "encoder": "random:0", "core_px": 900, "halo_px": 50}
TRUE = {"read": 0.1, "segment": 0.5, "crop": 1e-4, "embed": 2e-3, "write": 0.05}
SEGMENT_CELL = 1e-3


def write_run(folder, gpus=None, num_slides=8):
    """Write records of slides that are all tissue, 2 x 1 tiles to 9 x 8, with the true rates."""
    run = RunFolder(str(folder), "d")
    storage.publish_json(
        f"{run.uri}/run.json", {"digest": "d", "identity": IDENTITY, "format_version": 1}
    )
    storage.publish_text(f"{run.uri}/config.yaml", f"gpus: {'null' if gpus is None else gpus}\n")
    for number in range(num_slides):
        columns, rows = number + 2, number + 1
        width, height = columns * 900, rows * 900
        mpx = (width + columns * 100) * (height + rows * 100) / 1e6
        tiles, cells = columns * rows, 100 * (number % 3) * columns * rows + 10
        seconds = {
            "plan": 1.0,
            "read": TRUE["read"] * mpx,
            "network": 0.0,
            "segment": TRUE["segment"] * mpx + SEGMENT_CELL * cells,
            "crop": TRUE["crop"] * cells,
            "embed": TRUE["embed"] * cells,
            "write": TRUE["write"] * tiles,
        }
        record = {"slide_id": f"s{number}", "status": "done", "seconds": seconds}
        record |= {"num_tiles": tiles, "num_failed_tiles": 0, "num_cells": cells}
        record |= {"width0": 2 * width, "height0": 2 * height, "mpp": 0.25, "read_mpp": 0.5}
        storage.publish_text(run.cells_uri(record["slide_id"]), "x" * 3 * cells)
        storage.publish_json(run.record_uri(record["slide_id"]), record | {"tables": ["CELLS"]})
    return run


def test_known_rates_come_back(tmp_path):
    write_run(tmp_path)
    rates, notes = with_runs(Rates(), [str(tmp_path)], IDENTITY, on_gpu=False)
    assert notes == []
    for name, value in (TRUE | {"segment_cell": SEGMENT_CELL, "stored_cell_bytes": 3.0}).items():
        assert rates.values[name] == pytest.approx(value), name
        assert rates.sources[name] == f"run {tmp_path}"
    cells = sum(100 * (n % 3) * (n + 2) * (n + 1) + 10 for n in range(8))
    mm2 = sum((n + 2) * (n + 1) for n in range(8)) * 0.45**2
    assert rates.values["cells_per_mm2"] == pytest.approx(cells / mm2)
    assert rates.values["open"] == 0  # it is part of reading
    assert rates.sources["finish"] == rates.sources["network"] == "default"


def test_runs_add_up_and_gpus_keep_their_own(tmp_path):
    write_run(tmp_path / "a", gpus="true")
    write_run(tmp_path / "b", gpus="true")
    uris = [str(tmp_path / name) for name in "ab"]
    rates, _ = with_runs(Rates(), uris, IDENTITY | {"encoder": "other"}, on_gpu=True)
    assert rates.values["embed_gpu"] == pytest.approx(TRUE["embed"])
    assert rates.sources["embed"] == "default"


def test_what_differs_or_is_unknown_is_noted(tmp_path):
    write_run(tmp_path)
    _, notes = with_runs(Rates(), [str(tmp_path)], {"encoder": "imagenet"}, on_gpu=True)
    assert any("encoder was random:0, and now is imagenet" in note for note in notes)
    assert any("unknown whether it used GPUs" in note for note in notes)


def test_a_run_with_nothing_done_is_refused(tmp_path):
    write_run(tmp_path, num_slides=0)
    with pytest.raises(ValueError, match="no slide of this run is finished"):
        with_runs(Rates(), [str(tmp_path)], {}, on_gpu=False)
    with pytest.raises(FileNotFoundError, match="no run of scellst_ray"):
        with_runs(Rates(), [str(tmp_path / "nothing")], {}, on_gpu=False)


def test_segmenting_is_split_only_where_both_rates_can_be_known():
    mpx, cells = np.array([1.0, 1, 1, 0.5, 1, 0.2]), np.array([0.0, 500, 100, 30, 900, 5])
    seconds = 0.2 * mpx + 4e-4 * cells
    found = split_segment(seconds, mpx, cells)
    assert found == pytest.approx({"segment": 0.2, "segment_cell": 4e-4})
    few = split_segment(seconds[:3], mpx[:3], cells[:3])
    assert few == {"segment": pytest.approx(seconds[:3].sum() / 3), "segment_cell": 0.0}
    assert split_segment(seconds, mpx, 500 * mpx)["segment_cell"] == 0
    assert split_segment(np.zeros(3), mpx[:3], cells[:3]) == {}
    # A rate is never negative, and the sum of seconds does not change.
    odd = split_segment(np.array([1.0, 0.1, 1, 1, 1, 1]), np.ones(6), cells)
    assert min(odd.values()) >= 0
    assert odd["segment"] * 6 + odd["segment_cell"] * cells.sum() == pytest.approx(5.1)
    assert not any(math.isnan(value) for value in odd.values())
