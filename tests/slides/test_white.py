"""Transparent pixels are white glass, whatever the format."""

import numpy as np
import pytest
from PIL import Image

from scellst_ray.core.geometry import Box
from scellst_ray.slides import white
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.white import blend_on_white, decode_on_white, paste_on_white
from tests.support.pictures import STRIPS, TILED, tissue, write_tiff

IMAGE = tissue(320, 240)
GLASS = IMAGE.min(axis=2) > 215
ON_WHITE = np.where(GLASS[..., None], 255, IMAGE).astype(np.uint8)
# What is transparent is black below, as QuPath, ImageJ and GIMP leave it.
RGBA = np.dstack([np.where(GLASS[..., None], 0, IMAGE), np.where(GLASS, 0, 255)]).astype(np.uint8)


def read(path):
    with Slide(path, mpp=0.5) as slide:
        return slide.read(Box(0, 0, 320, 240), 0.5)[0]


@pytest.mark.parametrize("form", ["png", "webp", "tif", "jp2"])
def test_transparent_pixels_of_plain_images_are_white(tmp_path, form):
    options = {"lossless": True, "exact": True} if form == "webp" else {}
    Image.fromarray(RGBA).save(tmp_path / f"s.{form}", **options)
    np.testing.assert_array_equal(read(tmp_path / f"s.{form}"), ON_WHITE)


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    image = Image.fromarray(np.where(GLASS[..., None], 0, IMAGE).astype(np.uint8)).quantize(64)
    shown = np.asarray(image.convert("RGB"))
    image.save(tmp_path / "s.png", transparency=image.getpixel((0, 0)))
    expected = np.where((shown == shown[0, 0]).all(axis=2)[..., None], 255, shown)
    np.testing.assert_array_equal(read(tmp_path / "s.png"), expected)


def test_a_transparent_colour_of_rgb_is_white(tmp_path):
    image = Image.fromarray(np.where(GLASS[..., None], 7, IMAGE).astype(np.uint8))
    image.save(tmp_path / "s.png", transparency=(7, 7, 7))
    np.testing.assert_array_equal(read(tmp_path / "s.png"), ON_WHITE)


@pytest.mark.parametrize("layout", [TILED, STRIPS], ids=["tiles", "strips"])
@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
@pytest.mark.parametrize("alpha", [0, 64, 128, 255])
def test_alpha_of_tiffs_in_both_readers(tmp_path, layout, kind, alpha):
    share = alpha / 255
    expected = IMAGE * share + 255 * (1 - share)
    stored = IMAGE * share if kind == "assocalpha" else IMAGE
    rgba = np.dstack([np.rint(stored), np.full(GLASS.shape, alpha)]).astype(np.uint8)
    path = write_tiff(tmp_path / "s.tif", rgba, extrasamples=[kind], **layout)
    # A premultiplied sample is rounded, and again when the readers divide by alpha.
    assert np.abs(read(path) - expected).max() <= 2


def test_alpha_on_white_is_exact():
    rgba = np.array([[[10, 100, 250, a] for a in (0, 1, 127, 254, 255)]], np.uint8)
    straight = rgba[..., :3].astype(float)
    share = rgba[..., 3:] / 255
    expected = np.rint(straight * share + 255 * (1 - share))
    assert np.abs(blend_on_white(rgba) - expected).max() == 0
    assert blend_on_white(np.empty((0, 4, 4), np.uint8)).shape == (0, 4, 3)


def test_bands_make_no_difference(monkeypatch):
    whole = decode_on_white(Image.fromarray(RGBA))
    monkeypatch.setattr(white, "BAND_PX", 320 * 7)
    np.testing.assert_array_equal(decode_on_white(Image.fromarray(RGBA)), whole)


def test_a_box_beyond_the_image_is_white():
    out = paste_on_white((4, 3), (-1, 1, 3, 4), lambda _x, _y, w, h: np.zeros((h, w, 3), np.uint8))
    assert out[:2, 1:].max() == 0
    assert out[:, 0].min() == out[2:].min() == 255
