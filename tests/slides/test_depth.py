"""Plain images of more than 8 bits a channel are told from those of 8."""

import cv2
import numpy as np
import pytest
from PIL import Image

from scellst_ray.slides.depth import has_deep_samples
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.tiff_pages import read_pages
from tests.support.pictures import STRIPS, tissue, write_tiff

IMAGE = tissue(320, 240)


def write(path, image):
    """Write RGB of 8 or 16 bits as the name's ending says."""
    if path.suffix == ".ppm":
        depth = np.iinfo(image.dtype).max
        content = image.astype(image.dtype.newbyteorder(">")).tobytes()
        path.write_bytes(b"P6 %d %d %d\n" % (image.shape[1], image.shape[0], depth) + content)
    elif path.suffix == ".tif":
        write_tiff(path, image, **STRIPS)
    else:
        assert cv2.imwrite(str(path), np.ascontiguousarray(image[..., ::-1]))
    return path


@pytest.mark.parametrize("name", ["s.png", "s.jp2", "s.ppm", "s.tif"])
def test_depth_of_plain_images(tmp_path, name):
    for image, is_deep in ((IMAGE, False), (IMAGE.astype(np.uint16) * 257, True)):
        path = write(tmp_path / name, image)
        with Image.open(path) as opened:
            assert has_deep_samples(opened, path, read_pages(path)) is is_deep


@pytest.mark.parametrize("name", ["s.png", "s.jp2", "s.ppm"])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_fewer_bits_in_sixteen_are_found_in_any_format(tmp_path, name, bits):
    path = write(tmp_path / name, IMAGE.astype(np.uint16) << (bits - 8))
    with (
        Slide(path, mpp=0.5) as slide,
        pytest.raises(ValueError, match=rf"of 16 bits a channel, {bits} are used"),
    ):
        slide.check_content()


def test_a_palette_and_a_cut_header_are_not_deep(tmp_path):
    Image.fromarray(IMAGE).quantize(9).save(tmp_path / "p.png")
    path = write(tmp_path / "s.jp2", IMAGE)
    with Image.open(path) as opened:
        (tmp_path / "cut.jp2").write_bytes(path.read_bytes()[:100])
        assert not has_deep_samples(opened, tmp_path / "cut.jp2", [])
    with Image.open(tmp_path / "p.png") as opened:
        assert not has_deep_samples(opened, tmp_path / "p.png", [])
