"""Pixels of tiles, and slides that cannot be read."""

import numpy as np
import pytest

from scellst_ray.runs.folder import RunFolder
from scellst_ray.slides.reader import Slide
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.read import OpenSlides, Read
from scellst_ray.stages.write import WriteShards


def test_a_tile_that_cannot_be_read_costs_no_other(
    tmp_path, synthetic_slide, cells_spec, segmented_rows, embed_stage, monkeypatch, helpers
):
    rows = plan_slide(helpers.slide_row(synthetic_slide.slide), cells_spec)
    bad = rows[1]
    real = Slide.read

    def read(self, box, mpp):
        if (box.x0, box.y0) == (bad["read_x0"], bad["read_y0"]):
            error = OSError("bad sector")
            error.add_note("in test")
            raise error
        return real(self, box, mpp)

    monkeypatch.setattr(Slide, "read", read)
    run = RunFolder(str(tmp_path), "d1g")
    segmented = helpers.find_stage(cells_spec)(rows)
    assert segmented[1]["error_type"] == "OSError"
    # The other tiles used a slide opened again, and found the same nuclei as without the failure.
    for row, expected in zip(segmented, segmented_rows(), strict=True):
        if row is not segmented[1]:
            assert row["cells"].equals(expected["cells"])
    for row in segmented[:3:2]:
        row |= {"cells": row["cells"].slice(0, 6), "crops": row["crops"][:6]}
    receipts = WriteShards(run)(embed_stage(segmented[:3])).to_pylist()
    assert [r["error"] for r in receipts] == [None, "bad sector in test", None]
    assert (receipts[1]["stage"], receipts[1]["error_type"]) == ("read", "OSError")
    assert (receipts[1]["num_cells"], receipts[1]["shard"]) == (0, None)
    assert receipts[0]["num_cells"] == len(segmented[0]["cells"])


def test_the_last_two_slides_stay_open(synthetic_slide, helpers, tmp_path):
    image = np.full((64, 64, 3), 200, np.uint8)
    uris = [str(helpers.write_pyramid(tmp_path / f"{n}.tif", [image], 0.5)) for n in range(3)]
    slides = OpenSlides()
    first, second = (slides.get(uri, 0.5) for uri in uris[:2])
    assert slides.get(uris[0], 0.5) is first
    slides.get(uris[2], 0.5)
    assert slides.get(uris[1], 0.5) is second
    assert slides.get(uris[0], 0.5) is not first
    slides.drop(uris[0], 0.5)
    slides.drop(str(synthetic_slide.slide), 0.5)


@pytest.mark.parametrize("when", ["before it is opened", "while it is read"])
def test_tiles_of_a_file_that_changed_fail(tmp_path, synthetic_slide, cells_spec, helpers, when):
    slide = tmp_path / "s.tiff"
    slide.write_bytes(synthetic_slide.slide.read_bytes())
    rows = plan_slide(helpers.slide_row(slide), cells_spec)
    read = Read(cells_spec)
    first, rest = ([], rows) if when == "before it is opened" else (rows[:2], rows[2:])
    assert [row.get("error") for row in read(first)] == [None] * len(first)
    content = bytearray(slide.read_bytes())
    content[len(content) // 2 :] = content[len(content) // 2 :][::-1]  # as many bytes
    slide.write_bytes(content)
    for row in read(rest):
        assert (row["stage"], row["error_type"]) == ("read", "ChangedFileError")
        assert "the file changed while the run was reading it; run the same command" in row["error"]
        assert "image" not in row
    assert all("image" in row for row in first)
