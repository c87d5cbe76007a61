"""What `plan` says beforehand against what a run then does."""

import pyarrow.compute as pc
import pytest

from scellst_ray.pipelines.extract import extract
from scellst_ray.preflight import calibration
from scellst_ray.preflight.config import PlanConfig
from scellst_ray.preflight.plan import make_plan
from scellst_ray.preflight.slide_plans import by_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.stages.config import ExtractConfig

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
plan_config = PlanConfig.from_flags
TILES = {"core_px": 96, "halo_px": 32, "encoder": "random:0:resnet18", "gpus": False}


def test_tiles_are_those_of_the_run_and_its_records_tell_the_next_plan(
    small_cohort, tmp_path, monkeypatch
):
    monkeypatch.setattr(calibration, "WORKER_MODULES", ())
    monkeypatch.setattr(calibration, "START_RAY", "print('started')")
    manifest = tmp_path / "manifest.csv"
    rows = small_cohort.read_text().replace(",s", f",{small_cohort.parent}/s")
    manifest.write_text(rows + "gone,gone.tiff\n")
    planned = plan_config(manifest=str(manifest), processes=1, calibrate=1000, workers=2, **TILES)
    plan = make_plan(planned)
    out = tmp_path / "run"
    records = extract(ExtractConfig(manifest=str(manifest), out=str(out), memory_gb=0.5, **TILES))

    receipts = RunFolder(str(out), "").receipts()
    done = receipts.filter(pc.greater_equal(receipts["tile_id"], 0))
    names = ("slide_id", "tile_id", "num_tiles", "mpp", "read_mpp", "width0", "height0")
    of_run = {tuple(row[n] for n in names) for row in done.select(names).to_pylist()}
    sampled = [tile for slide in plan.slides for tile in slide.sample]
    assert {tuple(tile[n] for n in names) for tile in sampled} == of_run
    assert len(of_run) == plan.total.tiles
    for slide in plan.slides[:2]:
        assert slide.num_tiles == records[slide.slide_id]["num_tiles"] > 0
    gone = plan.slides[2]
    assert "no such file" in gone.error
    assert records["gone"]["status"] == "failed"
    # Every tile was in the sample: cells are known but for those that two tiles share at a seam.
    num_cells = sum(record["num_cells"] for record in records.values())
    assert plan.total.cells == pytest.approx(num_cells, rel=0.1)
    assert list(by_slide(plan.slides)) == sampled

    again = make_plan(
        plan_config(manifest=str(manifest), processes=1, from_run=[str(out)], workers=2, **TILES)
    )
    finished = [record for record in records.values() if record["status"] == "done"]
    for stage in ("read", "segment", "embed", "write"):
        seconds = sum(record["seconds"][stage] for record in finished)
        # Records hold no boxes of tiles. With few tiles, those at the edge matter.
        assert again.total.cpu_s[stage] == pytest.approx(seconds, rel=0.5), stage
    assert again.total.cells == pytest.approx(num_cells, rel=0.5)
    sizes = [(out / "cells" / f"s{number}.parquet").stat().st_size for number in range(2)]
    assert again.total.bytes_kept == pytest.approx(sum(sizes), rel=0.5)
