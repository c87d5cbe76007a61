"""What a file states about its resolution: tags and OME-XML."""

import numpy as np
import pytest
import tifffile

from scellst_ray.slides.manifest import read_manifest
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.resolution import check_objective, collect_statements, ome_pixel_size

WIDTH, HEIGHT = 400, 300
OME = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{}</OME>'


def ome(*pixels):
    """Return OME-XML whose pictures have these attributes."""
    return OME.format("".join(f"<Image><Pixels {part}/></Image>" for part in pixels))


def sized(x, y, unit=None, size=(WIDTH, HEIGHT)):
    """Return attributes of `Pixels` with a physical size."""
    units = f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"' if unit else ""
    sides = f'SizeX="{size[0]}" SizeY="{size[1]}"'
    return f'{sides} PhysicalSizeX="{x}" PhysicalSizeY="{y}"{units}'


def write(path, *, description=None, mpp=None, **options):
    """Write a TIFF with a description, and a resolution in px per cm if there is one."""
    tags = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {}
    image = np.full((HEIGHT, WIDTH, 3), 240, np.uint8)
    tifffile.imwrite(
        path,
        image,
        photometric="rgb",
        # Older readers of the tag take ASCII; OME-XML is UTF-8.
        description=None if description is None else description.encode(),
        metadata=None,
        **(tags | options),
    )
    return path


@pytest.mark.parametrize(
    ("x", "unit"),
    [
        (0.25, None),
        (0.25, "µm"),
        (0.25, "um"),
        (250, "nm"),
        (0.00025, "mm"),
        (0.000025, "cm"),
        (0.25 / 25_400, "in"),
        (2500, "Å"),
    ],
)
@pytest.mark.parametrize("layout", [{"tile": (256, 256)}, {"rowsperstrip": 64}])
def test_ome_xml_is_read_in_every_unit_and_layout(tmp_path, x, unit, layout):
    path = write(tmp_path / "s.ome.tif", description=ome(sized(x, x, unit)), **layout)
    with Slide(path) as slide:
        assert slide.mpp == pytest.approx(0.25)
        assert slide.check_resolution(confirmed=False) == []


def test_tags_of_a_screen_yield_to_ome_xml(tmp_path):
    description = ome(sized(0.25, 0.25))
    path = write(tmp_path / "s.tif", description=description, mpp=25_400 / 72, tile=(256, 256))
    with Slide(path) as slide:
        assert slide.mpp == 0.25
        assert slide.check_resolution(confirmed=False) == []


def test_the_tags_of_a_plain_tiff_count_as_those_of_a_tiled_one(tmp_path):
    with Slide(write(tmp_path / "s.tif", mpp=0.5)) as slide:
        assert slide.mpp == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"resolution .mpp. is unknown"):
        Slide(write(tmp_path / "screen.tif", mpp=25_400 / 96))


@pytest.mark.parametrize(("unit", "um"), [("MILLIMETER", None), ("INCH", 25_400), ("NONE", None)])
def test_units_of_tags(tmp_path, unit, um):
    resolution = (50_800, 50_800)
    path = write(tmp_path / "s.tif", resolution=resolution, resolutionunit=unit)
    if um is None:
        with pytest.raises(ValueError, match="unknown"):
            Slide(path)
    else:
        with Slide(path) as slide:
            assert slide.mpp == pytest.approx(0.5)


@pytest.mark.parametrize(
    "description",
    [
        ome(sized(0.5, 0.5))[:-20],
        ome(sized(0.5, 0.5)).replace("<Pixels", "<Pixels <"),
        ome(sized("half", 0.5)),
        ome(sized("inf", "inf")),
        ome(sized(0, 0)),
        ome(sized(-0.5, -0.5)),
        ome(sized(0.5, 0.5, "pixel")),
        ome(sized(0.5, 0.5, "reference frame")),
        ome(f'SizeX="{WIDTH}" SizeY="{HEIGHT}" PhysicalSizeX="0.5"'),
        ome(sized(0.5, 0.5, size=(90, 90))),
        '<!DOCTYPE a [<!ENTITY x "0.5">]>' + ome(sized("&x;", 0.5)),
        "<OME",
        "0.5",
        "",
    ],
)
def test_what_is_no_ome_xml_states_nothing(tmp_path, description):
    if "</OME" not in description and "PhysicalSize" in description:
        description = description[: description.index("Physical")]
    assert ome_pixel_size(description, (WIDTH, HEIGHT)) in (None, (0.0, 0.0), (-0.5, -0.5))
    path = write(tmp_path / "s.tif", description=description, tile=(256, 256))
    with pytest.raises(ValueError, match=r"resolution .mpp. is unknown"):
        Slide(path)


def test_entities_are_never_expanded():
    entities = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
    bomb = f'<!DOCTYPE OME [<!ENTITY a0 "x">{entities}]>{ome(sized("&a11;", 1))}'
    assert ome_pixel_size(bomb, (WIDTH, HEIGHT)) is None


def test_of_several_pictures_the_one_of_this_size_counts():
    label = sized(20, 20, size=(90, 60))
    assert ome_pixel_size(ome(label, sized(0.5, 0.5)), (WIDTH, HEIGHT)) == (0.5, 0.5)


def test_pixels_that_are_not_square_are_told_of():
    (error,) = [collect_statements({"the file": (0.5, 0.6)}).error]
    assert "0.5 by 0.6" in error
    both = collect_statements({"a": (0.5, 0.6), "b": (0.5, 0.505)})
    assert both.mpp == 0.5


def test_a_file_that_contradicts_itself_is_refused(tmp_path):
    description = ome(sized(0.5, 0.5))
    path = write(tmp_path / "s.ome.tif", description=description, mpp=0.25, tile=(256, 256))
    with (
        Slide(path) as slide,
        pytest.raises(
            ValueError, match=r"s.ome.tif: 0\.25 um/px .*but 0\.5 um/px by the file's OME-XML"
        ),
    ):
        slide.check_resolution(confirmed=False)


@pytest.mark.parametrize(("mpp", "is_refused"), [(0.25, True), (0.53, False), (0.5, False)])
def test_a_manifest_that_contradicts_the_file_is_refused(tmp_path, mpp, is_refused):
    path = write(tmp_path / "s.tif", mpp=0.5, tile=(256, 256))
    with Slide(path, mpp=mpp) as slide:
        if is_refused:
            with pytest.raises(
                ValueError, match=rf"{mpp} um/px in use, but 0.5 um/px by the file's tags"
            ):
                slide.check_resolution(confirmed=False)
        else:
            assert len(slide.check_resolution(confirmed=False)) == (mpp != 0.5)
        assert len(slide.check_resolution(confirmed=True)) == (mpp != 0.5)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [("yes", True), ("TRUE", True), ("1", True), ("no", False), ("", False), ("0", False)],
)
def test_the_manifest_confirms_an_mpp(tmp_path, cell, expected):
    path = tmp_path / "m.csv"
    path.write_text(f"slide_id,uri,mpp,mpp_confirmed\na,a.tif,0.5,{cell}\n")
    (row,) = read_manifest(str(path))
    assert (row.mpp_confirmed, row.mpp_error, row.columns) == (expected, None, {})


def test_a_confirmation_that_is_none_is_that_slides_error(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("slide_id,uri,mpp,mpp_confirmed\na,a.tif,0.5,maybe\nb,b.tif,,yes\n")
    first, second = read_manifest(str(path))
    assert "mpp_confirmed 'maybe' is neither 'yes' nor 'no'" in first.mpp_error
    assert (second.mpp_error, second.mpp_confirmed) == (None, True)


@pytest.mark.parametrize(
    ("objective", "mpp", "expected"),
    [
        (40, 0.25, "fits"),
        (40, 0.2, "fits"),
        (20, 0.5, "fits"),
        (20, 0.243, "told"),  # a camera with small pixels
        (40, 0.12, "told"),
        (40, 0.5, "refused"),
        (40, 1.0, "refused"),
        (20, 0.19, "refused"),
        (5, 0.5, "refused"),
        (None, 1.0, "fits"),
        (0, 1.0, "fits"),
    ],
)
def test_an_objective_bounds_what_a_manifest_may_say(objective, mpp, expected):
    def check(*, confirmed):
        return check_objective(objective, mpp, confirmed=confirmed, source="s.svs")

    if expected == "refused":
        with pytest.raises(ValueError, match=rf"s.svs: {mpp:g} um/px .*by the objective of .*yes"):
            check(confirmed=False)
    else:
        assert len(check(confirmed=False)) == (expected == "told")
    assert len(check(confirmed=True)) == (expected != "fits")


def test_an_svs_without_mpp_has_an_objective(tmp_path):
    text = "Aperio Image Library v11.2.1\r\n400x300 (256x256) Deflate|AppMag = 40"
    path = write(tmp_path / "s.svs", description=text, tile=(256, 256), compression="deflate")
    with (
        Slide(path, mpp=1.0) as slide,
        pytest.raises(ValueError, match=r"s.svs: 1 um/px in use, but about 0\.25 .*40x"),
    ):
        slide.check_resolution(confirmed=False)
    with Slide(path, mpp=0.25) as slide:
        assert slide.check_resolution(confirmed=False) == []
