"""Files with impossible sizes are refused before memory is allocated."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from scellst_ray.slides import pixels
from scellst_ray.slides.reader import MAX_SIDE_MM, Slide


def resized_png(path, width, height):
    """Write a PNG of 30 x 20 px whose header claims another size."""
    Image.new("RGB", (30, 20)).save(path)
    data = bytearray(path.read_bytes())
    head = b"IHDR" + struct.pack(">II", width, height) + bytes(data[24:29])
    data[12:33] = head + struct.pack(">I", zlib.crc32(head))
    path.write_bytes(data)


def test_a_size_that_the_file_cannot_hold_is_refused(tmp_path):
    resized_png(tmp_path / "s.png", 20_000, 20_000)
    with pytest.raises(ValueError, match=r"s.png: 20000 x 20000 px in \d+ bytes; .*damaged"):
        Slide(tmp_path / "s.png", mpp=0.5)


def test_a_blank_image_packed_as_tight_as_can_be_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "MIN_PACKED_BYTES", 0)
    Image.new("RGB", (3000, 3000)).save(tmp_path / "s.png", compress_level=9)
    assert 3 * 3000**2 / (tmp_path / "s.png").stat().st_size > 900
    Image.new("RGB", (3000, 3000)).save(tmp_path / "s.jpg", quality=10)
    for name in ("s.png", "s.jpg"):
        with Slide(tmp_path / name, mpp=0.5) as slide:
            assert slide.width0 == 3000


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_would_be_read_for_ever_is_refused(tmp_path, kind):
    path = tmp_path / "s.tiff"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"s.tiff: neither a file nor a folder"):
        Slide(path, mpp=0.5)


def test_tiles_too_large_to_decode_are_refused(tmp_path, helpers, monkeypatch):
    path = helpers.write_pyramid(tmp_path / "s.tif", [np.zeros((300, 400, 3), np.uint8)], 0.5)
    Slide(path).close()
    monkeypatch.setattr(pixels, "MAX_TILE_PIXELS", 256**2 - 1)
    with pytest.raises(ValueError, match=r"s.tif: tiles of 256 x 256 px in level 0"):
        Slide(path)


def test_a_slide_larger_than_glass_is_refused(tmp_path, helpers):
    width = int(MAX_SIDE_MM * 1000) + 1
    image = np.zeros((16, width, 3), np.uint8)
    path = helpers.write_pyramid(tmp_path / "s.tif", [image], 1.0)
    with pytest.raises(ValueError, match=rf"s.tif: {width} x 16 px of 1 um are 130 x 0.016 mm"):
        Slide(path)
    with Slide(path, mpp=0.99) as slide:
        assert slide.width0 == width


def test_formats_that_start_other_programs_are_not_opened(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "s.eps")
    with pytest.raises(ValueError, match=r"s.eps: neither OpenSlide nor Pillow"):
        Slide(tmp_path / "s.eps", mpp=0.5)
