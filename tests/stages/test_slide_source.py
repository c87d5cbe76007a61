"""What makes a slide another one: its file, its mpp, its imported nuclei, its colours."""

import os
from dataclasses import replace

from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.slide_source import present_source


def test_all_that_decides_a_result_is_in_the_source(tmp_path, cells_spec, helpers):
    slide, nuclei = tmp_path / "s.svs", tmp_path / "s.geojson"
    slide.write_bytes(b"pixels")
    nuclei.write_text("[]")
    imported = replace(cells_spec, segmenter="imported")
    row = helpers.slide_row(slide, segmentation=str(nuclei))
    colours = replace(cells_spec, colours={"s": ((0.5,) * 3, (0.1,) * 3)})
    found = {
        present_source(row, cells_spec),
        present_source(row | {"mpp": 0.5}, cells_spec),
        present_source(row | {"mpp": 0.25}, cells_spec),
        present_source(row, imported),
        present_source(row, colours),
        present_source(row, replace(colours, colours={"s": ((0.6,) * 3, (0.1,) * 3)})),
    }
    before = present_source(row, cells_spec)
    nuclei.write_text("[1]")
    assert present_source(row, cells_spec) == before
    found.add(present_source(row, imported))
    os.utime(slide, ns=(1, 1))
    found.add(present_source(row, cells_spec))
    slide.write_bytes(b"others")
    found.add(present_source(row, cells_spec))
    assert None not in found
    assert len(found) == 9
    assert {tuple(map(len, source.split("-"))) for source in found} == {(16, 8, 8)}
    nuclei.unlink()
    assert present_source(row, imported) is None
    slide.unlink()
    assert present_source(row, cells_spec) is None


def test_a_plan_has_the_present_source(synthetic_slide, cells_spec, helpers):
    row = helpers.slide_row(synthetic_slide.slide)
    tiles = plan_slide(row, cells_spec)
    assert {tile["source"] for tile in tiles} == {present_source(row, cells_spec)}
