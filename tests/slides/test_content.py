"""Pictures that are no H&E slide, and levels that are another picture, are found by a sample."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from scellst_ray.slides import content
from scellst_ray.slides.content import check_colours
from scellst_ray.slides.reader import Slide
from tests.support.pictures import REDUCED, STRIPS, TILED, paper_label, tissue, write_tiff

IMAGE = tissue()
HALF, QUARTER = IMAGE[::2, ::2], IMAGE[::4, ::4]
layouts = pytest.mark.parametrize("layout", [TILED, STRIPS], ids=["tiles", "strips"])


def check(path, mpp=0.5):
    with Slide(path, mpp=mpp) as slide:
        slide.check_content()


def write_png16(path, image):
    """Write an RGB PNG of 16 bits, which Pillow cannot."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    size = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 16, 2, 0, 0, 0)
    parts = [b"IHDR" + size, b"IDAT" + zlib.compress(rows, 1), b"IEND"]
    chunks = [struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


@layouts
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_fewer_bits_in_sixteen_are_found_by_their_range(tmp_path, layout, bits):
    deep = IMAGE.astype(np.uint16) << (bits - 8)
    path = write_tiff(tmp_path / "s.tif", deep, **layout)
    with pytest.raises(ValueError, match=rf"s.tif: .*of 16 bits a channel, {bits} are used"):
        check(path)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_a_png_of_sixteen_bits(tmp_path, bits):
    path = write_png16(tmp_path / "s.png", HALF.astype(np.uint16) << (bits - 8))
    with pytest.raises(ValueError, match=rf"of 16 bits a channel, {bits} are used.*vips linear"):
        check(path)
    check(write_png16(path, HALF.astype(np.uint16) * 257))


@layouts
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_defects_of_a_camera_do_not_hide_fewer_bits(tmp_path, layout, bits):
    deep = IMAGE.astype(np.uint16) << (bits - 8)
    deep.reshape(-1, 3)[::997] = 65535
    path = write_tiff(tmp_path / "s.tif", deep, **layout)
    with pytest.raises(ValueError, match=rf"nearly black.*of 16 bits a channel, {bits} are used"):
        check(path)


def test_a_little_tissue_on_a_black_ground_is_bright_enough(tmp_path):
    image = IMAGE.copy()
    image[:, 20:] = 0
    check(write_tiff(tmp_path / "s.tif", image, **TILED))


@layouts
def test_sixteen_full_bits_are_read(tmp_path, layout):
    check(write_tiff(tmp_path / "s.tif", IMAGE.astype(np.uint16) * 257, **layout))


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_a_grey_plain_image_is_refused(tmp_path, mode):
    Image.fromarray(HALF).convert(mode).save(tmp_path / "s.png")
    with pytest.raises(ValueError, match=r"s.png: a grey picture; H&E has colours"):
        check(tmp_path / "s.png")


@pytest.mark.parametrize("name", ["s.png", "s.jpg", "s.tif", "tiled.tif"])
def test_equal_colours_are_grey(tmp_path, name):
    grey = np.repeat(IMAGE[..., 1:2], 3, axis=2)
    if name == "tiled.tif":
        write_tiff(tmp_path / name, grey, (grey[::2, ::2], REDUCED), **TILED)
    else:
        Image.fromarray(grey).save(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: red, green and blue are equal everywhere"):
        check(tmp_path / name)


@pytest.mark.parametrize("value", [255, 245, 230])
def test_blank_glass_is_no_grey_picture(tmp_path, value):
    blank = np.full_like(IMAGE, value)
    check(write_tiff(tmp_path / "s.tif", blank, (blank[::2, ::2], REDUCED), **TILED))
    Image.fromarray(blank).save(tmp_path / "s.png")
    check(tmp_path / "s.png")


def test_tissue_passes_at_any_size(tmp_path):
    for size in ((640, 480), (70, 900), (33, 20)):
        image = tissue(*size)
        check(write_tiff(tmp_path / "s.tif", image, **TILED))


@pytest.mark.parametrize(
    "shrunk",
    [
        lambda image, n: image[::n, ::n],
        lambda image, n: np.asarray(
            Image.fromarray(image).resize((640 // n, 480 // n), Image.Resampling.LANCZOS)
        ),
        lambda image, n: np.asarray(Image.fromarray(image).reduce(n)),
    ],
    ids=["nearest", "lanczos", "mean"],
)
def test_levels_of_the_slide_pass_however_they_are_made(tmp_path, shrunk):
    image = np.random.default_rng(0).integers(0, 255, (480, 640, 3)).astype(np.uint8)
    for number, full in enumerate((IMAGE, image)):
        pages = [(shrunk(full, n), REDUCED) for n in (2, 4, 8)]
        check(write_tiff(tmp_path / f"{number}.tif", full, *pages, **TILED))


@pytest.mark.parametrize(
    "other",
    [paper_label(320, 240), np.full((240, 320, 3), 250, np.uint8), HALF[::-1] // 2],
    ids=["label", "blank", "another slide"],
)
def test_a_level_of_the_same_shape_but_another_picture_is_refused(tmp_path, other):
    pages = (IMAGE, (other, REDUCED), (QUARTER, REDUCED))
    with pytest.raises(ValueError, match=r"s.tif: the page of 320 x 240 px.*another picture"):
        check(write_tiff(tmp_path / "s.tif", *pages, **TILED))


@pytest.mark.parametrize("other", [paper_label(320, 240), HALF[::-1] // 2], ids=["label", "macro"])
def test_a_page_of_an_aperio_file_may_be_another_picture_as_well(tmp_path, other):
    told = "Aperio Image Library v11\r\n640x480 (128x128)|AppMag = 20|MPP = 0.5"
    first, level = (IMAGE, {"description": told}), (QUARTER, {"description": told})
    check(write_tiff(tmp_path / "good.svs", first, level, **TILED))
    with pytest.raises(ValueError, match=r"s.svs: the page of 320 x 240 px.*another picture"):
        check(write_tiff(tmp_path / "s.svs", first, (other, REDUCED), level, **TILED))


def test_a_gap_between_levels_is_not_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "MAX_FINE_PX", 31)
    check(write_tiff(tmp_path / "s.tif", IMAGE, (paper_label(320, 240), REDUCED), **TILED))


def test_a_dark_picture_is_refused():
    dark = np.full((9, 9, 3), 40, np.uint8)
    with pytest.raises(ValueError, match="nearly black, its brightest value is 40 of 255; H&E"):
        check_colours([dark], 8, "s.png")
    check_colours([dark, tissue(9, 9)], 8, "s.png")
    with pytest.raises(ValueError, match="of 16 bits a channel, 15 are used"):
        check_colours([dark + 87], 16, "s.png")


def test_large_tiles_are_decoded_a_few_times_only(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "s.tif", IMAGE, **TILED)
    numbers = []
    for most in (content.MOST_DECODED_PX, 1):
        monkeypatch.setattr(content, "MOST_DECODED_PX", most)
        with Slide(path) as slide:
            assert slide._pixels.tile_pixels == 128**2
            numbers.append(len(list(content._windows(slide._pixels))))
    assert numbers == [64, 4]
    monkeypatch.setattr(content, "MAX_TILE_PX", 128**2 - 1)
    check(write_tiff(tmp_path / "l.tif", IMAGE, (paper_label(320, 240), REDUCED), **TILED))
