"""A folder as a slide."""

import numpy as np
import pytest

from scellst_ray.core.geometry import Box
from scellst_ray.slides.folders import picture_in
from scellst_ray.slides.reader import Slide
from tests.support.dicom import dicom_level
from tests.support.pictures import tissue

IMAGE = tissue(400, 300)


def write_slide(folder, series="1.2.826.0.1.7.1", prefix=""):
    folder.mkdir(exist_ok=True)
    for number, (step, name) in enumerate([(2, "a.dcm"), (1, "b.dcm")]):
        level = dicom_level(IMAGE[::step, ::step], 0.5 * step, number, series)
        (folder / f"{prefix}{name}").write_bytes(level)
    return folder


def facts(path):
    with Slide(path) as slide:
        pixels = slide.read(Box(0, 0, 400, 300), 0.5)[0]
        return (slide.width0, slide.height0, slide.mpp, slide._pixels.downsamples), pixels


def test_a_dicom_folder_is_the_slide_of_its_files(tmp_path):
    folder = write_slide(tmp_path / "slide")
    (folder / "notes.txt").write_text("a note")
    found = [facts(path) for path in (folder, folder / "a.dcm", folder / "b.dcm")]
    assert [f[0] for f in found] == [(400, 300, 0.5, [1.0, 2.0])] * 3
    for _, pixels in found:
        np.testing.assert_array_equal(pixels, found[0][1])
    assert np.abs(found[0][1].astype(int) - IMAGE).mean() < 5


def test_a_folder_of_two_slides_is_refused(tmp_path):
    folder = write_slide(tmp_path / "slide")
    write_slide(folder, "1.2.826.0.1.7.2", "other_")
    with pytest.raises(ValueError, match=r"a folder of 2 DICOM slides .*such as a.dcm"):
        Slide(folder)
    assert facts(folder / "other_b.dcm")[0] == (400, 300, 0.5, [1.0, 2.0])


@pytest.mark.parametrize("mark", [".zattrs", ".zgroup", "zarr.json"])
def test_an_ome_zarr_is_refused_with_a_remedy(tmp_path, mark):
    folder = tmp_path / "s.zarr"
    (folder / "0").mkdir(parents=True)
    (folder / mark).write_text("{}")
    with pytest.raises(ValueError, match=r"s.zarr: an OME-Zarr folder.*raw2ometiff --rgb"):
        Slide(folder, mpp=0.5)


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "s.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="x: a folder; give a file, or a folder of DICOM files"):
        picture_in(tmp_path, "x")
