"""Pages of a TIFF that would be read wrongly are refused, and all others are left alone."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from scellst_ray.core.geometry import Box
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.tiff_pages import (
    check_orientation,
    check_pages,
    check_samples_for_pillow,
    check_tiles_upright,
    compression_name,
    is_level,
    read_pages,
)
from tests.support.pictures import REDUCED, STRIPS, TILED, paper_label, tissue, write_tiff

IMAGE = tissue()
HALF, QUARTER = IMAGE[::2, ::2], IMAGE[::4, ::4]
layouts = pytest.mark.parametrize("layout", [TILED, STRIPS], ids=["tiles", "strips"])


def read(path, **options):
    """Return all pixels of a slide."""
    with Slide(path, **options) as slide:
        return slide.read(Box(0, 0, slide.width0, slide.height0), slide.mpp)[0]


@layouts
@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_a_picture_that_is_not_upright_is_refused(tmp_path, layout, orientation):
    tag = [(274, 3, 1, orientation, True)]
    path = write_tiff(tmp_path / "s.tif", IMAGE, extratags=tag, **layout)
    with pytest.raises(ValueError, match=rf"s.tif: the orientation tag is {orientation} "):
        Slide(path)


@layouts
@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_tags_that_turn_nothing_are_passed_over(tmp_path, layout, orientation):
    tag = [(274, 3, 1, orientation, True)]
    path = write_tiff(tmp_path / "s.tif", IMAGE, extratags=tag, **layout)
    np.testing.assert_array_equal(read(path), IMAGE)


def test_a_level_that_is_not_upright_is_named(tmp_path):
    tag = {"extratags": [(274, 3, 1, 3, True)]}
    path = write_tiff(tmp_path / "s.tif", IMAGE, (HALF, REDUCED | tag), **TILED)
    with pytest.raises(ValueError, match=r"s.tif: page 2: the orientation tag is 3"):
        Slide(path)


@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_is_held_to_the_same_rule(tmp_path, form, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"s.{form}"
    Image.fromarray(HALF).save(path, exif=exif)
    with pytest.raises(ValueError, match=rf"s.{form}: the orientation tag is {orientation} "):
        Slide(path, mpp=0.5)
    exif[274] = 1
    Image.fromarray(HALF).save(path, exif=exif)
    assert read(path, mpp=0.5).shape == HALF.shape


def test_the_rules_of_vendors_files():
    check_orientation(1, "s.svs")
    with pytest.raises(ValueError, match=r"s.svs: .*90 degrees.*upright"):
        check_orientation(6, "s.svs")


def test_a_vendors_tiles_that_are_not_upright_are_refused(tmp_path):
    tag = {"extratags": [(274, 3, 1, 3, True)]}
    label = (paper_label(100, 90), tag)  # in a strip: OpenSlide takes it for no level
    pages = read_pages(write_tiff(tmp_path / "a.tif", (IMAGE, TILED), label))
    check_tiles_upright(pages, "a.svs")
    pages = read_pages(write_tiff(tmp_path / "b.tif", (IMAGE, TILED | tag), label))
    with pytest.raises(ValueError, match=r"b.svs: the orientation tag is 3"):
        check_tiles_upright(pages, "b.svs")


@layouts
@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (np.float32, "32 bits are signed or floating"),
        (np.float16, "16 bits are signed or floating"),
        (np.int16, "16 bits are signed or floating"),
        (np.uint32, "32 bits a channel"),
    ],
)
def test_samples_that_nobody_reads_are_refused(tmp_path, layout, dtype, reason):
    path = write_tiff(tmp_path / "s.tif", IMAGE.astype(dtype), **layout)
    with pytest.raises(ValueError, match=rf"s.tif: .*{reason}.*8 bits a channel"):
        Slide(path)


@layouts
@pytest.mark.parametrize(("largest", "bits"), [(1023, 10), (4095, 12), (16383, 14)])
def test_a_tag_that_tells_of_fewer_bits_is_believed(tmp_path, layout, largest, bits):
    tag = [(281, 3, 3, (largest,) * 3, True)]
    deep = IMAGE.astype(np.uint16) << (bits - 8)
    path = write_tiff(tmp_path / "s.tif", deep, extratags=tag, **layout)
    with pytest.raises(ValueError, match=rf"{bits} bits a channel, stored in 16"):
        Slide(path)


@layouts
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_a_grey_picture_is_refused(tmp_path, layout, dtype, photometric):
    grey = IMAGE[..., 0].astype(dtype)
    path = write_tiff(tmp_path / "s.tif", grey, photometric=photometric, **layout)
    with pytest.raises(ValueError, match=r"s.tif: a grey picture; H&E has colours\. Write it as"):
        Slide(path)


@layouts
def test_planes_of_one_slide_are_counted(tmp_path, layout):
    planes = np.moveaxis(IMAGE, -1, 0)
    path = tmp_path / "s.ome.tif"
    tifffile.imwrite(path, planes, photometric="minisblack", metadata={"axes": "CYX"}, **layout)
    with pytest.raises(ValueError, match=r"grey picture; 3 pages of its size.*raw2ometiff --rgb"):
        Slide(path, mpp=0.5)


@layouts
def test_colours_marked_as_grey_are_refused(tmp_path, layout):
    path = tmp_path / "s.tif"
    write_tiff(path, IMAGE, photometric="minisblack", planarconfig="contig", **layout)
    with pytest.raises(ValueError, match="3 samples a pixel are marked as grey"):
        Slide(path)


@layouts
def test_lab_is_refused(tmp_path, layout):
    path = write_tiff(tmp_path / "s.tif", IMAGE, photometric="cielab", **layout)
    with pytest.raises(ValueError, match=r"s.tif: pixels of kind CIELAB.*RGB"):
        Slide(path)


@layouts
def test_what_is_read_well_stays_readable(tmp_path, layout):
    palette = np.arange(0, 65_536, 257, dtype=np.uint16)
    colours = np.stack([palette, palette[::-1], palette // 2])
    written = {
        "planar": (np.moveaxis(IMAGE, -1, 0), {"planarconfig": "separate"}, IMAGE),
        "deep": (IMAGE.astype(np.uint16) * 257, {}, IMAGE),
        "big": (IMAGE, {"compression": "adobe_deflate", "predictor": True}, IMAGE),
        "palette": (
            IMAGE[..., 0],
            {"photometric": "palette", "colormap": colours},
            (colours // 257).astype(np.uint8).T[IMAGE[..., 0]],
        ),
    }
    for name, (array, options, expected) in written.items():
        path = write_tiff(tmp_path / f"{name}.tif", (array, options), **layout)
        np.testing.assert_array_equal(read(path), expected, err_msg=name)


@layouts
@pytest.mark.parametrize("first", [QUARTER, paper_label(300, 200)], ids=["thumbnail", "label"])
def test_a_first_page_that_is_not_the_slide_is_refused(tmp_path, layout, first):
    for number, kind in enumerate(({}, REDUCED)):
        path = write_tiff(tmp_path / f"{number}.tif", (first, layout), (IMAGE, TILED | kind))
        with pytest.raises(ValueError, match=r"page 2 of the TIFF \(640 x 480 px\) is larger than"):
            Slide(path)


def test_a_label_among_levels_is_left_out(tmp_path):
    label = paper_label(300, 150)
    pages = (IMAGE, (HALF, REDUCED), (label, REDUCED), (label[..., 0], REDUCED), (QUARTER, REDUCED))
    path = write_tiff(tmp_path / "s.tif", *pages, **TILED)
    with Slide(path) as slide:
        assert slide._pixels.downsamples == [1.0, 2.0, 4.0]
        overview, _ = slide.overview(2.0)
        np.testing.assert_array_equal(overview, QUARTER)
        slide.check_content()


def test_a_macro_picture_in_strips_is_no_level(tmp_path):
    path = write_tiff(tmp_path / "s.tif", (IMAGE, TILED), (paper_label(200, 90), {}))
    with Slide(path) as slide:
        assert slide._pixels.downsamples == [1.0]


def test_a_pyramid_in_subifds_is_read_as_its_first_level(tmp_path):
    path = tmp_path / "s.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        sizes = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
        tiff.write(IMAGE, subifds=2, photometric="rgb", metadata=sizes, **TILED)
        for level in (HALF, QUARTER):
            tiff.write(level, photometric="rgb", **REDUCED, **TILED)
    with Slide(path) as slide:
        assert (slide.width0, slide.mpp, slide._pixels.downsamples) == (640, 0.25, [1.0])
    np.testing.assert_array_equal(read(path), IMAGE)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *(((320, 240), True), ((160, 120), True), ((213, 160), True), ((214, 161), True)),
        *(((300, 150), False), ((240, 320), False), ((320, 230), False), ((3, 2), True)),
    ],
)
def test_sides_of_levels_are_rounded(size, expected):
    assert is_level((640, 480), size) == expected


@pytest.mark.parametrize(
    ("compression", "reader"),
    [(34887, "LERC"), (50002, "JPEGXL"), (34712, "JPEG2000"), (34933, "PNG"), (34925, "LZMA")],
)
@layouts
def test_a_compression_that_is_not_read_is_named(tmp_path, layout, compression, reader):
    path = write_tiff(tmp_path / "s.tif", HALF, **layout)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages.first.tags["Compression"].overwrite(compression)
    with pytest.raises(ValueError, match=rf"{reader} \({compression}\).*vips tiffsave") as caught:
        Slide(path)
    assert "damaged" not in str(caught.value)
    assert "keeps no resolution" in str(caught.value)


def test_names_of_compressions():
    assert compression_name(50000) == "ZSTD (50000)"
    assert compression_name(12345) == "unknown (12345)"


def test_a_fourth_sample_without_a_meaning(tmp_path):
    four = np.dstack([IMAGE, np.zeros(IMAGE.shape[:2], np.uint8)])
    path = write_tiff(tmp_path / "s.tif", four, extrasamples=["unspecified"], **STRIPS)
    with pytest.raises(ValueError, match=r"s.tif: a fourth sample of unknown meaning"):
        Slide(path)
    pages = read_pages(write_tiff(tmp_path / "a.tif", four, extrasamples=["unassalpha"]))
    check_samples_for_pillow(pages, "a.tif")


@pytest.mark.parametrize("bits", [12, 14, 16])
def test_planes_of_sixteen_bits_in_strips_are_refused(tmp_path, bits):
    planes = np.moveaxis(IMAGE.astype(np.uint16) << (bits - 8), -1, 0)
    path = write_tiff(tmp_path / "s.tif", planes, planarconfig="separate", **STRIPS)
    with pytest.raises(ValueError, match=r"s.tif: 16 bits a channel in separate planes"):
        Slide(path)


@layouts
def test_planes_that_are_read_well(tmp_path, layout):
    planes = np.moveaxis(IMAGE, -1, 0)
    path = write_tiff(tmp_path / "8.tif", planes, planarconfig="separate", **layout)
    assert np.array_equal(read(path), IMAGE)
    deep = write_tiff(
        tmp_path / "16.tif", planes.astype(np.uint16) * 257, planarconfig="separate", **TILED
    )
    assert np.array_equal(read(deep), IMAGE)


def test_other_files_have_no_pages(tmp_path):
    Image.fromarray(HALF).save(tmp_path / "s.png")
    (tmp_path / "cut.tif").write_bytes(b"II*\0\x08")
    for name in ("s.png", "cut.tif", "gone.tif"):
        assert read_pages(tmp_path / name) == []
    check_pages([], "s.png")
    assert read_pages(tmp_path) == []


def test_pages_without_end_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("scellst_ray.slides.tiff_pages.MAX_PAGES", 3)
    path = write_tiff(tmp_path / "s.tif", *[QUARTER] * 5)
    assert [page.number for page in read_pages(path)] == [1, 2, 3]
