"""What OpenSlide lacks is not called damaged."""

import pytest

from scellst_ray.slides.openslide_errors import why_not_opened
from scellst_ray.slides.reader import Slide
from tests.support.dicom import dicom_level
from tests.support.pictures import tissue


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("Unsupported TIFF compression: 50002", "compressed as JPEGXL (50002)"),
        ("Unsupported TIFF compression: 60123", "compressed as unknown (60123)"),
        ("Reading a: Unsupported transfer syntax 1.2.840.10008.1.2.4.80", "as JPEG-LS (1.2.840."),
        ("Unsupported photometric interpretation YBR_ICT", "does not read this kind of file"),
        ("Sorry, can not handle images with 12-bit samples", "does not read this kind of file"),
    ],
)
def test_what_is_lacking_is_named_with_a_remedy(error, words):
    message = why_not_opened(error, "s.tif")
    assert message.startswith("s.tif: ")
    assert words in message
    assert "convert" in message
    assert "damaged" not in message


def test_the_rest_is_damage():
    assert "cut off or damaged" in why_not_opened("Cannot read TIFF directory", "s.tif")


@pytest.mark.parametrize(
    ("syntax", "name"),
    [("1.2.840.10008.1.2.5", "RLE"), ("1.2.840.10008.1.2.4.110", "JPEG XL")],
)
def test_a_transfer_syntax_of_dicom(tmp_path, syntax, name):
    path = tmp_path / "a.dcm"
    path.write_bytes(dicom_level(tissue(200, 150), 0.5, 1, syntax=syntax))
    with pytest.raises(ValueError, match=rf"a.dcm: DICOM compressed as {name}.*gdcmconv") as caught:
        Slide(path)
    assert "damaged" not in str(caught.value)
