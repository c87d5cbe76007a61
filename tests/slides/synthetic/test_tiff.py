import dataclasses

import numpy as np
import openslide
import pytest

from scellst_ray.slides.synthetic import slide as synthetic
from scellst_ray.slides.synthetic.tiff import level_sizes
from tests.support.small_tissue import SMALL


@pytest.mark.parametrize("mpp", [0.25, 0.31, 0.4537, 0.5, 0.687])
def test_openslide_opens_it_with_its_mpp(tmp_path, mpp):
    config = dataclasses.replace(SMALL, width_um=310.0, height_um=170.0, mpp=mpp)
    paths = synthetic.write_synthetic_slide(tmp_path, config, name="s")
    with openslide.OpenSlide(paths.slide) as slide:
        assert slide.dimensions == (config.width0, config.height0)
        # OpenSlide holds the resolution tag as float32.
        for axis in "xy":
            assert float(slide.properties[f"openslide.mpp-{axis}"]) == pytest.approx(mpp, rel=1e-6)
        assert slide.level_count >= 2
        assert slide.properties["openslide.level[0].tile-width"] == "256"


def test_levels_hold_the_same_picture_and_axes_are_not_swapped(written, image):
    with openslide.OpenSlide(written.slide) as slide:
        assert slide.dimensions == (1280, 840)
        assert slide.level_dimensions == ((1280, 840), (320, 210), (80, 52))
        assert slide.level_downsamples[1] == 4
        whole = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        np.testing.assert_array_equal(whole, image)
        quarter = np.asarray(slide.read_region((0, 0), 1, (320, 210)).convert("RGB"))
        # The mean of 4 x 4 px, by reshaping; read_region pads nothing here.
        mean = image.reshape(210, 4, 320, 4, 3).mean(axis=(1, 3))
        assert np.abs(quarter - mean).max() <= 1


def test_levels_shrink_by_four_down_to_256_px():
    assert level_sizes(1280, 840) == [(1280, 840), (320, 210), (80, 52)]
    assert level_sizes(256, 100) == [(256, 100)]
    assert level_sizes(5000, 3) == [(5000, 3)]
