import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from scellst_ray.core.geometry import Box
from scellst_ray.slides.reader import GRID_PX, Slide

WIDTH, HEIGHT, MPP = 2967, 2219, 0.25  # odd, and not square
CENTRES = np.array(
    [
        (60.3, 50.8),
        (2900.2, 60.1),
        (70.7, 2150.4),
        (2905.6, 2160.9),
        (1500.25, 1100.75),
        (2233.1, 433.9),
    ]
)


def resized(image, width, height):
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="module")
def full(helpers):
    """Return the pixels of level 0 of the pyramids."""
    return helpers.draw_dots(WIDTH, HEIGHT, CENTRES)


@pytest.fixture(scope="module")
def pyramids(tmp_path_factory, helpers, full):
    """Return TIFFs of the same dots with levels as different writers make them."""
    folder = tmp_path_factory.mktemp("pyramids")
    edge = np.pad(full, ((0, 1), (0, 1), (0, 0)), mode="edge")
    smaller = {
        "fours": [helpers.shrink(full, 4), helpers.shrink(full, 16)],
        "twos": [helpers.shrink(full, n) for n in (2, 4, 8)],
        "fours rounded up": [helpers.shrink(edge, 4)],
        "odd": [resized(full, 1187, 888), resized(full, 475, 355)],
        "one level": [],
    }
    return {
        name: helpers.write_pyramid(folder / f"{name}.tif", [full, *levels], MPP)
        for name, levels in smaller.items()
    }


def exactly(image, frame, box):
    """Return the part of an image, read at the slide's resolution, that lies in the box."""
    x, y = box.x0 - int(frame.origin_x0), box.y0 - int(frame.origin_y0)
    return image[y : y + box.h0, x : x + box.w0]


def centroid(image, frame, background, box):
    """Return the level-0 centre of brightness of the dot within the box and the slide."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    at = frame.to_level0(np.stack([x.ravel(), y.ravel()], axis=1))
    weight = image.astype(float).sum(axis=2).ravel() - sum(background)
    weight[~box.contains(at)] = 0
    # The white beyond the slide reaches this far in.
    rim = 15 + 2 * frame.ratio_x
    weight[(weight < 25) | ((at < rim) | (at > (WIDTH - rim, HEIGHT - rim))).any(axis=1)] = 0
    return (weight[:, None] * at).sum(axis=0) / weight.sum()


# At more than 2 um/px a dot is smaller than a pixel and has no exact position.
@pytest.mark.parametrize("read_mpp", [0.25, 0.31, 0.5, 0.687, 1.0, 2.0])
@pytest.mark.parametrize("name", ["fours", "twos", "fours rounded up", "odd", "one level"])
def test_dots_land_where_they_are_drawn(pyramids, helpers, name, read_mpp):
    with Slide(pyramids[name]) as slide:
        assert (slide.width0, slide.height0) == (WIDTH, HEIGHT)
        assert slide.mpp == pytest.approx(MPP, rel=1e-4)
        downsample = slide._pixels.downsamples[slide._level_for(read_mpp / MPP)]
        # The second offset takes the box beyond the slide's corners.
        for dx, dy in [(0, 0), (-13, -7), (13, 7)]:
            for x, y in CENTRES:
                box = Box(int(x) - 52 + dx, int(y) - 44 + dy, 103, 91)
                image, frame = slide.read(box, read_mpp)
                error = np.abs(centroid(image, frame, helpers.BACKGROUND, box) - (x, y)).max()
                # The position of a dot is less exact in px of 2 um and more.
                exact = 0.2 if read_mpp < 2 else 0.75
                assert error < (exact if downsample == 1 else 0.5 * downsample)
                assert error < 0.75 or downsample > 4 or read_mpp > 2 or name == "odd"


@pytest.mark.parametrize("read_mpp", [0.25, 0.31, 0.687, 1.0])
def test_the_frame_covers_the_box_and_little_more(pyramids, read_mpp):
    with Slide(pyramids["fours"]) as slide:
        box = Box(101, 33, 611, 257)
        image, frame = slide.read(box, read_mpp)
    size = np.array(image.shape[1::-1])
    (left, top), (right, bottom) = frame.to_level0(np.array([[0, 0], size]))
    reach = GRID_PX * frame.ratio_x
    assert left <= 101 < left + reach
    assert top <= 33 < top + reach
    assert right - reach < 712 <= right
    assert bottom - reach < 290 <= bottom
    assert frame.ratio_x == frame.ratio_y
    assert frame.ratio_x * MPP == pytest.approx(read_mpp, rel=1e-4)


@pytest.mark.parametrize("name", ["fours", "odd"])
@pytest.mark.parametrize("read_mpp", [0.25, 0.31, 0.499, 0.687, 1.0, 2.0])
def test_overlapping_boxes_share_their_pixels(pyramids, read_mpp, name):
    """A nucleus at a seam must look the same from both tiles."""
    with Slide(pyramids[name]) as slide:
        whole, whole_frame = slide.read(Box(600, 500, 900, 700), read_mpp)
        for box in (Box(733, 611, 300, 200), Box(901, 777, 411, 333)):
            part, frame = slide.read(box, read_mpp)
            corner = np.array([[frame.origin_x0, frame.origin_y0]])
            offset = whole_frame.from_level0(corner)[0]
            x, y = np.rint(offset).astype(int)
            assert np.abs(offset - (x, y)).max() < 1e-6
            same = whole[y : y + part.shape[0], x : x + part.shape[1]]
            # OpenSlide moves coarse levels by a fraction of a px that depends on the region.
            off = np.abs(part.astype(int) - same).max()
            assert off <= (3 if slide._level_for(frame.ratio_x) else 0)


def test_level_0_pixels_are_those_of_the_array_on_white(pyramids, full):
    boxes = [
        Box(-30, -20, 100, 60),
        Box(WIDTH - 40, HEIGHT - 25, 100, 60),
        Box(1450, 1080, 90, 40),
        Box(-500, 5, 100, 60),
        Box(WIDTH + 3, -7, 10, 20),
    ]
    padded = np.pad(full, ((600, 600), (600, 600), (0, 0)), constant_values=255)
    with Slide(pyramids["fours"]) as slide:
        for box in boxes:
            image, frame = slide.read(box, slide.mpp)
            x, y = int(frame.origin_x0) + 600, int(frame.origin_y0) + 600
            height, width = image.shape[:2]
            np.testing.assert_array_equal(image, padded[y : y + height, x : x + width])
            assert (frame.ratio_x, frame.ratio_y) == (1.0, 1.0)


@pytest.mark.parametrize("name", ["fours", "odd"])
@pytest.mark.parametrize("read_mpp", [0.5, 1.0, 2.0])
def test_white_beyond_the_slide_at_every_level(pyramids, helpers, name, read_mpp):
    with Slide(pyramids[name]) as slide:
        image, frame = slide.read(Box(-200, HEIGHT - 100, 400, 300), read_mpp)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    at = frame.to_level0(np.stack([x.ravel(), y.ravel()], axis=1))
    pixels = image.reshape(-1, 3)
    reach = 12  # level-0 px over which resampling spreads the border
    assert (pixels[(at[:, 0] < -reach) | (at[:, 1] > HEIGHT + reach)] == 255).all()
    inside = (at[:, 0] > reach) & (at[:, 1] < HEIGHT - reach) & (at[:, 0] < 30)
    assert np.abs(pixels[inside].astype(int) - helpers.BACKGROUND).max() <= 1


def test_overview_is_the_whole_slide_however_it_is_cut(pyramids, helpers, monkeypatch):
    with Slide(pyramids["fours"]) as slide:
        whole, frame = slide.overview(4.0)
        monkeypatch.setattr("scellst_ray.slides.reader.STRIP_PIXELS", 5000)
        strips, same = slide.overview(4.0)
    assert whole.shape == strips.shape
    assert np.abs(whole.astype(int) - strips).max() <= 3
    assert frame == same
    assert WIDTH <= frame.ratio_x * whole.shape[1] < WIDTH + frame.ratio_x
    assert HEIGHT <= frame.ratio_y * whole.shape[0] < HEIGHT + frame.ratio_y
    for image in (whole, strips):
        at = frame.from_level0(CENTRES).astype(int)
        for x, y in at:
            window = image[max(0, y - 4) : y + 5, max(0, x - 4) : x + 5, 0]
            assert window.max() > helpers.BACKGROUND[0] + 30
        # Nothing stands out anywhere else.
        rest = image[..., 0].astype(int)
        for x, y in at:
            rest[max(0, y - 8) : y + 9, max(0, x - 8) : x + 9] = helpers.BACKGROUND[0]
        assert np.abs(rest[1:-1, 1:-1] - helpers.BACKGROUND[0]).max() <= 2


@pytest.mark.parametrize("name", ["i.png", "i.tif", "i.jpg"])
def test_plain_images_give_the_pixels_of_the_array(tmp_path, helpers, name):
    full = helpers.draw_dots(210, 140, [(50.5, 30.5)])
    Image.fromarray(full).save(tmp_path / name, **({"quality": 100} if name == "i.jpg" else {}))
    full = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    with Slide(tmp_path / name, mpp=0.687) as slide:
        assert (slide.width0, slide.height0, slide.mpp) == (210, 140, 0.687)
        image = exactly(*slide.read(box := Box(20, 10, 60, 45), 0.687), box)
        np.testing.assert_array_equal(image, full[10:55, 20:80])
        beyond = exactly(*slide.read(box := Box(-3, 120, 60, 45), 0.687), box)
        np.testing.assert_array_equal(beyond[:20, 3:], full[120:, :57])
        assert (beyond[20:] == 255).all()
        assert (beyond[:, :3] == 255).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_plain_images_of_other_modes_become_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new("RGB", (30, 20), (10, 10, 10)).convert(mode).save(tmp_path / f"i.{suffix}")
    with Slide(tmp_path / f"i.{suffix}", mpp=0.5) as slide:
        image = exactly(*slide.read(box := Box(0, 0, 30, 20), 0.5), box)
    assert image.shape == (20, 30, 3)
    assert image.dtype == np.uint8


def test_a_plain_image_of_16_bits_is_refused(tmp_path):
    Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png: .*8 bits"):
        Slide(tmp_path / "deep.png", mpp=0.5)


def test_a_plain_image_too_large_to_hold_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (30, 20)).save(tmp_path / "i.png")
    monkeypatch.setattr("scellst_ray.slides.pixels.MAX_PLAIN_PIXELS", 599)
    with pytest.raises(ValueError, match=r"i.png: 30 x 20 px is too large.*pyramid"):
        Slide(tmp_path / "i.png", mpp=0.5)


def test_the_manifest_overrides_the_file(pyramids):
    with Slide(pyramids["fours"], mpp=0.5) as slide:
        assert slide.mpp == 0.5


@pytest.mark.parametrize("mpp", [None, 25.0, 0.01])
def test_an_unknown_or_absurd_resolution(tmp_path, helpers, mpp):
    path = helpers.write_pyramid(tmp_path / "s.tif", [np.zeros((300, 400, 3), np.uint8)], mpp)
    with pytest.raises(ValueError, match=r"cohort/s.tif: .*mpp.*manifest's mpp column"):
        Slide(path, "cohort/s.tif")


@pytest.mark.parametrize("mpp", [0.0, -1.0, 30.0, float("nan")])
def test_an_absurd_override(tmp_path, helpers, mpp):
    path = helpers.write_pyramid(tmp_path / "s.tif", [np.zeros((300, 400, 3), np.uint8)], 0.5)
    with pytest.raises(ValueError, match=r"s.tif: .*mpp.*manifest's mpp column"):
        Slide(path, mpp=mpp)


def test_pixels_that_are_not_square(tmp_path, helpers):
    path = helpers.write_pyramid(tmp_path / "s.tif", [np.zeros((300, 400, 3), np.uint8)], 0.5, 0.6)
    with pytest.raises(ValueError, match=r"s.tif: .*not square.*0.5 by 0.6.*manifest"):
        Slide(path)
    with Slide(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a/gone.tif: no such file"):
        Slide(tmp_path / "gone.tif", "a/gone.tif")


@pytest.mark.parametrize("name", ["t.tif", "t.svs", "t.png"])
def test_something_else_under_an_images_name(tmp_path, name):
    (tmp_path / name).write_text("slide_id,uri\n")
    with pytest.raises(ValueError, match=rf"{name}: neither OpenSlide nor Pillow"):
        Slide(tmp_path / name, mpp=0.5)


def _open_and_read_all(path):
    with Slide(path, "the/slide.tif", mpp=0.5) as slide:
        slide.read(Box(0, 0, slide.width0, slide.height0), 0.5)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("kind", ["pyramid", "striped", "png", "jpg"])
def test_a_truncated_file_names_itself(tmp_path, helpers, kind, share):
    pixels = np.random.default_rng(0).integers(0, 255, (700, 900, 3)).astype(np.uint8)
    path = tmp_path / f"s.{'tif' if kind in ('pyramid', 'striped') else kind}"
    if kind == "pyramid":
        helpers.write_pyramid(path, [pixels, helpers.shrink(pixels, 4)], 0.5)
    elif kind == "striped":
        tifffile.imwrite(path, pixels, photometric="rgb", compression="adobe_deflate")
    else:
        Image.fromarray(pixels).save(path)
    _open_and_read_all(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"the/slide.tif: .*(cut off|damaged)"):
        _open_and_read_all(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns before it gives up
def test_damaged_bytes_never_raise_anything_else(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3)).astype(np.uint8)
    rng = np.random.default_rng(1)
    for kind in ("tif", "png", "jpg"):
        path = tmp_path / f"s.{kind}"
        Image.fromarray(pixels).save(path)
        good = path.read_bytes()
        for _ in range(40):
            bad = bytearray(good)
            for place in rng.integers(0, min(len(bad), 400), 6):
                bad[place] = rng.integers(256)
            path.write_bytes(bytes(bad))
            try:
                _open_and_read_all(path)
            except ValueError as error:
                assert "the/slide.tif" in str(error)  # noqa: PT017


def test_a_real_slide(data_dir):
    path = data_dir / "slides" / "cmu-1-small-region.svs"
    with Slide(path) as slide:
        assert (slide.width0, slide.height0) == (2220, 2967)
        assert slide.mpp == pytest.approx(0.499)
        assert slide.read(Box(2000, 2900, 300, 100), 0.687)[0].shape[2] == 3
