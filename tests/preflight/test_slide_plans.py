"""Planned tiles equal those of the run; slides with errors have a plan, too."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scellst_ray.preflight.slide_plans import by_slide, header_of, plan_one, plan_slides
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.slides.reader import Slide
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.rows import slide_row
from scellst_ray.stages.tiles import box_of


@pytest.fixture(scope="module")
def cohort(synthetic_slide, tmp_path_factory):
    """Return a slide, a coarser copy, a blank slide, a file cut off, and a missing file."""
    folder = tmp_path_factory.mktemp("slides")
    Image.new("RGB", (400, 300), "white").save(folder / "blank.png")
    (folder / "cut.tiff").write_bytes(synthetic_slide.slide.read_bytes()[:5000])
    uri = str(synthetic_slide.slide)
    return [
        SlideRow("fine", uri, None),
        SlideRow("coarse", uri, 0.8, mpp_confirmed=True),
        SlideRow("blank", str(folder / "blank.png"), 0.5),
        SlideRow("cut", str(folder / "cut.tiff"), 0.5),
        SlideRow("gone", str(folder / "gone.tiff"), None),
        SlideRow("odd", uri, None, "slide 'odd' in the manifest: mpp 'x' is not a number"),
    ]


def test_tiles_are_those_of_plan_slide_and_bad_slides_are_rows(cohort, cells_spec):
    reported = []
    plans = plan_slides(cohort, cells_spec, keep=1000, processes=1, report=reported.append)
    assert reported == [1, 2, 3, 4, 5, 6]
    assert [plan.slide_id for plan in plans] == [slide.slide_id for slide in cohort]
    for slide, plan in zip(cohort[:2], plans, strict=False):
        rows = plan_slide(slide_row(slide), cells_spec)
        rows[-1].pop("seconds_plan")
        sample = [
            {name: value for name, value in tile.items() if name not in ("key", "tissue_mm2")}
            for tile in sorted(plan.sample, key=lambda tile: tile["tile_id"])
        ]
        assert sample == rows
        assert plan.num_tiles == len(rows) == rows[0]["num_tiles"]
        core_px2 = sum(row["core_w0"] * row["core_h0"] for row in rows)
        assert plan.core_mm2 == pytest.approx(core_px2 * plan.mpp**2 / 1e6)
        assert plan.tissue_mm2 == pytest.approx(sum(t["tissue_mm2"] for t in plan.sample), rel=0.1)
        assert 0 < plan.tissue_mm2 <= plan.width0 * plan.height0 * plan.mpp**2 / 1e6
        assert plan.num_bytes == Path(slide.uri).stat().st_size
        assert plan.seconds > 0
    blank = plans[2]
    assert (blank.num_tiles, blank.tissue_mm2, blank.error) == (0, 0.0, None)
    for plan, part in zip(plans[3:], ("cut.tiff", "no such file", "not a number"), strict=True):
        assert part in plan.error
        assert plan.num_tiles == 0


def test_pixels_read_are_those_that_are_read(cohort, cells_spec):
    plan = plan_one(slide_row(cohort[1]), replace(cells_spec, core_px=200), keep=1000)
    with Slide(Path(cohort[1].uri), mpp=cohort[1].mpp) as slide:
        images = [slide.read(box_of(tile, "read"), tile["read_mpp"])[0] for tile in plan.sample]
    read_mpx = sum(image.shape[0] * image.shape[1] for image in images) / 1e6
    assert plan.read_mpx == pytest.approx(read_mpx, rel=0.02)


def test_a_sample_is_of_all_tiles_alike(cohort, cells_spec):
    spec = replace(cells_spec, core_px=64, halo_px=8)
    everything = plan_slides(cohort[:2], spec, keep=10_000, processes=1)
    few = plan_slides(cohort[:2], spec, keep=20, processes=1)
    assert sum(len(plan.sample) for plan in few) == 20
    keys = sorted(tile["key"] for plan in everything for tile in plan.sample)
    assert sorted(tile["key"] for tile in by_slide(few)) == keys[:20]
    assert len(keys) == sum(plan.num_tiles for plan in everything) > 100
    # Keys look random: they favour no part of a slide.
    tile_ids = [tile["tile_id"] for tile in sorted(by_slide(everything), key=lambda t: t["key"])]
    assert abs(np.corrcoef(tile_ids, range(len(tile_ids)))[0, 1]) < 0.35


def test_headers(cohort):
    assert header_of(slide_row(cohort[1]))["mpp"] == 0.8
    assert "cut.tiff" in header_of(slide_row(cohort[3]))["error"]
    assert "not a number" in header_of(slide_row(cohort[5]))["error"]
