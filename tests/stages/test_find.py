"""Nuclei of tiles, found in pixels."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.spatial import cKDTree

from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.write import WriteShards

MPP = 0.5


def points(table):
    return np.stack([table["x0"].to_numpy(), table["y0"].to_numpy()], axis=1)


def test_tissue_without_nuclei_gives_tiles_without_cells(
    tmp_path, cells_spec, embed_stage, helpers
):
    pink = np.full((400, 500, 3), (225, 160, 205), np.uint8)
    path = helpers.write_pyramid(tmp_path / "pink.tif", [pink], MPP)
    rows = helpers.find_stage(cells_spec)(plan_slide(helpers.slide_row(path), cells_spec))
    assert [len(row["cells"]) for row in rows] == [0] * 4
    run = RunFolder(str(tmp_path / "run"), "d1g")
    receipts = WriteShards(run)(embed_stage(rows))
    assert receipts["error"].null_count == 4
    assert receipts["shard"].null_count == 4
    assert finish_slide(run, "s", receipts)["status"] == "empty"


@pytest.mark.parametrize("read_mpp", [0.25, 0.687])
def test_coordinates_do_not_depend_on_the_resolution_read(
    synthetic_slide, cells_spec, helpers, read_mpp
):
    spec = replace(cells_spec, read_mpp=read_mpp, core_px=round(125 / read_mpp))
    rows = helpers.find_stage(spec)(plan_slide(helpers.slide_row(synthetic_slide.slide), spec))
    found = np.concatenate([points(row["cells"]) for row in rows])
    truth = points(pq.read_table(synthetic_slide.truth))
    distance, nearest = cKDTree(truth).query(found)
    close = distance * MPP < 2
    assert close.mean() > 0.6
    # No shift on the average, over all of the slide.
    shift = (found - truth[nearest])[close] * MPP
    assert np.abs(shift.mean(axis=0)).max() < 0.15
