"""A slide's picture box by box: any box equals that part of the whole, and levels halve exactly."""

import itertools

import cv2
import numpy as np
import pytest

from scellst_ray.core.geometry import Box
from scellst_ray.export import slide_picture
from scellst_ray.export.slide_picture import PictureError, levels_of, open_picture
from scellst_ray.slides.reader import Slide
from tests.support.exported_runs import make_run


def open_image(tmp_path, width, height, mpp=0.5):
    rng = np.random.default_rng(width)
    image = cv2.resize(
        rng.integers(90, 255, (height // 7 + 1, width // 7 + 1, 3), np.uint8), (width, height)
    )
    cv2.imwrite(str(tmp_path / "s.png"), image[..., ::-1])
    return Slide(tmp_path / "s.png", mpp=mpp), image


@pytest.mark.parametrize(
    ("width", "height", "mpp", "asked", "ratio"),
    [(2103, 1501, 0.5, 1.0, 2), (4200, 333, 0.25, 1.0, 4), (2600, 1400, 0.4, 0.8, 2)],
)
def test_levels_cover_the_slide_and_halve(tmp_path, width, height, mpp, asked, ratio):
    with open_image(tmp_path, width, height, mpp)[0] as slide:
        levels = levels_of(slide, asked)
        assert levels[0].ratio == ratio
        for fine, coarse in itertools.pairwise(levels):
            assert coarse.ratio == 2 * fine.ratio
            assert fine.shape == (3, 2 * coarse.shape[1], 2 * coarse.shape[2])
        assert 0 <= levels[0].shape[2] - -(-width // ratio) < 2 ** (len(levels) - 1)
        assert 0 <= levels[0].shape[1] - -(-height // ratio) < 2 ** (len(levels) - 1)
        assert len(levels) == 2 or max(levels[-2].shape) > slide_picture.COARSEST_PX
        assert max(levels[-1].shape) <= slide_picture.COARSEST_PX


def test_full_resolution_is_the_image_and_white_beyond(tmp_path):
    slide, image = open_image(tmp_path, 333, 221)
    with slide:
        level = levels_of(slide, 0.01)[0]
        assert (level.ratio, level.shape) == (1, (3, 222, 334))
        whole = level[:, :, :].transpose(1, 2, 0)
    np.testing.assert_array_equal(whole[:221, :333], image)
    assert (whole[221:] == 255).all()
    assert (whole[:, 333:] == 255).all()


@pytest.mark.parametrize("most_px", [4096, 64, 1])
def test_any_box_is_that_part_of_the_whole(tmp_path, monkeypatch, most_px):
    with open_image(tmp_path, 2201, 1703)[0] as slide:
        for level in levels_of(slide, 1.0, 4):
            expected, _ = slide.read(Box(0, 0, 2201, 1703), level.ratio * 0.5)
            expected = expected[: level.shape[1], : level.shape[2]].transpose(2, 0, 1)
            monkeypatch.setattr(slide_picture, "MOST_READ_PX", most_px)
            for rows, columns in ((slice(0, 40), slice(0, 50)), (slice(33, 95), slice(17, 88))):
                np.testing.assert_array_equal(
                    level[:, rows, columns], expected[:, rows, columns], strict=True
                )
                np.testing.assert_array_equal(
                    level[1:2, rows, columns], expected[1:2, rows, columns]
                )
            assert level[:, 5:5, :].shape == (3, 0, level.shape[2])
            monkeypatch.undo()


def test_a_coarse_level_of_a_file_without_levels_is_read_in_small_boxes(tmp_path, monkeypatch):
    seen = []
    with open_image(tmp_path, 3000, 3000)[0] as slide:
        read = slide.read
        monkeypatch.setattr(slide, "read", lambda box, mpp: seen.append(box) or read(box, mpp))
        monkeypatch.setattr(slide_picture, "MOST_READ_PX", 1000)
        level = levels_of(slide, 0.5, 6)[-1]
        assert level.ratio == 32
        assert level[:, :, :].shape == level.shape
    assert len(seen) > 9
    assert max(max(box.w0, box.h0) for box in seen) <= 1000


def test_the_picture_of_a_tiny_slide_keeps_its_resolution(tmp_path):
    with open_image(tmp_path, 40, 30)[0] as slide:
        levels = levels_of(slide, 50.0)
        assert [level.shape for level in levels] == [(3, 30, 40), (3, 15, 20)]


def test_why_a_picture_cannot_be_read(tmp_path):
    run = make_run(tmp_path, head=False)
    path = tmp_path / "a.png"
    with open_picture(run, "a") as levels:
        assert levels[0].shape == (3, 200, 300)
        assert levels[0][:, 3:5, 7:8][:, 0, 0].tolist() == [200, 120, 180]
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(PictureError, match=r"a\.png"), open_picture(run, "a"):
        pass
    path.unlink()
    with pytest.raises(PictureError, match=r"a\.png is gone"), open_picture(run, "a"):
        pass
    run.sources.pop("b")
    with pytest.raises(PictureError, match=r"slides\.json of .* slide 'b'"), open_picture(run, "b"):
        pass


def test_a_file_that_changes_while_it_is_read_gives_no_picture(tmp_path):
    run = make_run(tmp_path, head=False)
    path = tmp_path / "a.png"
    opened = open_picture(run, "a")
    assert opened.__enter__()
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(PictureError, match="changed while"):
        opened.__exit__(None, None, None)


def test_a_failed_read_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    run = make_run(tmp_path, head=False)

    def fail(*_):
        message = "tile 3\nis damaged"
        raise ValueError(message)

    with open_picture(run, "a") as levels:
        monkeypatch.setattr(levels[0].slide, "read", fail)
        with pytest.raises(PictureError, match=r"^\S*a\.png: tile 3 is damaged$"):
            levels[0][:, :4, :4]
