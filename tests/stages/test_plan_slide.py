"""Tiles of a slide, and slides that give none."""

import os

import numpy as np
import pytest

from scellst_ray.core import schemas
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.thumbnails import read_thumbnail
from scellst_ray.slides.reader import Slide
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.write import WriteShards

MPP = 0.5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mpp_error": "slide 's' in the manifest: mpp 9"}, ("ValueError", "mpp 9")),
        ({"mpp": 7.0}, ("ValueError", "mpp 7 is outside")),
        ({"uri": "/no/such.tif"}, ("FileNotFoundError", "/no/such.tif: no such file")),
    ],
)
def test_a_slide_that_cannot_be_planned_is_one_row(
    tmp_path, synthetic_slide, cells_spec, embed_stage, helpers, changes, reason
):
    rows = plan_slide(helpers.slide_row(synthetic_slide.slide, **changes), cells_spec)
    run = RunFolder(str(tmp_path), "d1g")
    receipts = WriteShards(run)(embed_stage(helpers.find_stage(cells_spec)(rows)))
    (receipt,) = receipts.to_pylist()
    assert (receipt["tile_id"], receipt["num_tiles"], receipt["num_cells"]) == (-1, 0, 0)
    assert (receipt["stage"], receipt["error_type"]) == ("plan", reason[0])
    assert reason[1] in receipt["error"]
    assert receipt["seconds_plan"] >= 0
    record = finish_slide(run, "s", receipts)
    assert (record["status"], record["error"]) == ("failed", receipt["error"])


def test_a_blank_slide_is_empty_and_no_error(tmp_path, cells_spec, embed_stage, helpers):
    blank = np.full((400, 500, 3), 245, np.uint8)
    path = helpers.write_pyramid(tmp_path / "blank.tif", [blank], MPP)
    rows = plan_slide(helpers.slide_row(path), cells_spec)
    run = RunFolder(str(tmp_path / "run"), "d1g")
    receipts = WriteShards(run)(embed_stage(helpers.find_stage(cells_spec)(rows)))
    (receipt,) = receipts.to_pylist()
    assert (receipt["error"], receipt["num_tiles"], receipt["width0"]) == (None, 0, 500)
    assert finish_slide(run, "s", receipts)["status"] == "empty"


def test_tiles_already_done_are_not_planned_again(synthetic_slide, cells_spec, helpers):
    every = plan_slide(helpers.slide_row(synthetic_slide.slide), cells_spec)
    done = [row["tile_id"] for row in every[::2]]
    row = helpers.slide_row(synthetic_slide.slide, done_tiles=done, source=every[0]["source"])
    rest = plan_slide(row, cells_spec)
    boxes = [name for name in schemas.TILES.names if name != "seconds_plan"]
    assert [{k: r.get(k) for k in boxes} for r in rest] == [
        {k: r.get(k) for k in boxes} for r in every[1::2]
    ]


@pytest.mark.parametrize("change", ["touched", "mpp"])
def test_tiles_of_another_file_are_planned_again(
    tmp_path, synthetic_slide, cells_spec, helpers, change
):
    slide = tmp_path / "s.tiff"
    slide.write_bytes(synthetic_slide.slide.read_bytes())
    every = plan_slide(helpers.slide_row(slide), cells_spec)
    again = {"done_tiles": [0, 1, 2], "source": every[0]["source"]}
    assert len(plan_slide(helpers.slide_row(slide, **again), cells_spec)) == len(every) - 3
    if change == "touched":
        os.utime(slide, ns=(1, 1))
    mpp = 0.5 if change == "mpp" else None
    rows = plan_slide(helpers.slide_row(slide, mpp=mpp, **again), cells_spec)
    assert [row["tile_id"] for row in rows] == [row["tile_id"] for row in every]
    assert {row["source"] for row in rows} & {row["source"] for row in every} == set()


def test_a_file_that_changes_while_it_is_planned(
    tmp_path, synthetic_slide, cells_spec, helpers, monkeypatch
):
    slide = tmp_path / "s.tiff"
    slide.write_bytes(synthetic_slide.slide.read_bytes())
    real = Slide.overview

    def overview(self, mpp):
        found = real(self, mpp)
        os.utime(slide, ns=(1, 1))
        return found

    monkeypatch.setattr(Slide, "overview", overview)
    (row,) = plan_slide(helpers.slide_row(slide), cells_spec)
    assert (row["tile_id"], row["error_type"]) == (-1, "ChangedFileError")
    assert "run the same command again" in row["error"]


@pytest.mark.parametrize("value", [90, 215, 255])
def test_blank_pictures_of_any_brightness_are_empty(tmp_path, cells_spec, helpers, value):
    blank = np.full((301, 217, 3), value, np.uint8)
    path = helpers.write_pyramid(tmp_path / "blank.tif", [blank], MPP)
    (row,) = plan_slide(helpers.slide_row(path), cells_spec)
    assert (row.get("error"), row["num_tiles"]) == (None, 0)


def test_a_grey_slide_fails_even_where_a_sample_is_blank(tmp_path, cells_spec, helpers):
    grey = np.full((3000, 3000, 3), 245, np.uint8)
    grey[700:1000, 700:1000] = 120  # between the windows that are looked at
    path = helpers.write_pyramid(tmp_path / "grey.tif", [grey], MPP)
    (row,) = plan_slide(helpers.slide_row(path), cells_spec)
    assert row["stage"] == "plan"
    assert "red, green and blue are equal everywhere" in row["error"]


def test_a_slide_that_the_manifest_contradicts_fails_unless_confirmed(
    synthetic_slide, cells_spec, helpers, caplog
):
    row = helpers.slide_row(synthetic_slide.slide, mpp=0.25)
    (failed,) = plan_slide(row, cells_spec)
    assert "0.25 um/px in use, but 0.5 um/px by the file's tags" in failed["error"]
    assert all(
        tile.get("error") is None for tile in plan_slide(row | {"mpp_confirmed": True}, cells_spec)
    )
    assert "but 0.5 um/px by the file's tags" in caplog.text


def test_a_thumbnail_is_kept_if_a_run_wants_one(synthetic_slide, cells_spec, helpers, tmp_path):
    run = RunFolder(str(tmp_path), "d1g")
    row = helpers.slide_row(synthetic_slide.slide, thumbnail_uri=run.thumbnail_uri("s"))
    tiles = plan_slide(row, cells_spec)
    found = read_thumbnail(run, {"slide_id": "s", "source": tiles[0]["source"]})
    with Slide(synthetic_slide.slide) as slide:
        view, frame = slide.overview(8.0)
        assert found.image.shape == view.shape
        assert found.ratio == pytest.approx(frame.ratio_x)
        assert found.image.shape[1] * found.ratio >= slide.width0
    assert np.abs(found.image.astype(int) - view).mean() < 6
    assert [t["tile_id"] for t in tiles] == [
        t["tile_id"] for t in plan_slide(row | {"thumbnail_uri": None}, cells_spec)
    ]


def test_a_blank_slide_keeps_its_thumbnail(cells_spec, helpers, tmp_path):
    path = helpers.write_pyramid(tmp_path / "b.tif", [np.full((40, 50, 3), 245, np.uint8)], MPP)
    run = RunFolder(str(tmp_path), "d1g")
    plan_slide(helpers.slide_row(path, thumbnail_uri=run.thumbnail_uri("s")), cells_spec)
    assert read_thumbnail(run, {"slide_id": "s"}).image.mean() > 240


def test_a_thumbnail_that_cannot_be_kept_costs_no_tile(
    synthetic_slide, cells_spec, helpers, tmp_path, caplog
):
    (tmp_path / "thumbnails").write_text("in the way")
    uri = RunFolder(str(tmp_path), "d1g").thumbnail_uri("s")
    tiles = plan_slide(helpers.slide_row(synthetic_slide.slide, thumbnail_uri=uri), cells_spec)
    assert tiles[0].get("error") is None
    assert "its thumbnail was not kept" in caplog.text
