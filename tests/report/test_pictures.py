import numpy as np
import pytest

from scellst_ray.report.pictures import (
    BLANK,
    BLANK_RGB,
    FRAME,
    FRAME_RGB,
    TOP,
    indexed,
    levels,
    photograph,
    value_colours,
)
from tests.support.pages import decode


def test_levels_span_the_scale():
    values = np.array([0.0, 1.0, 2.0, -5.0, 9.0, np.nan])
    assert levels(values, 0.0, 2.0).tolist() == [0, round(TOP / 2), TOP, 0, TOP, BLANK]
    # Nothing varies: one colour, and no division by 0.
    assert levels(np.array([3.0, 3.0]), 3.0, 3.0).tolist() == [0, 0]


def test_low_values_are_dark_and_high_ones_bright():
    brightness = value_colours().astype(int).sum(axis=1)
    assert brightness[0] < brightness[TOP // 2] < brightness[TOP]
    assert len(np.unique(value_colours(), axis=0)) > 200


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (40, 7)])
def test_numbers_become_their_colours(shape):
    image = np.full(shape, BLANK, np.uint8)
    image[0, 0], image[-1, -1] = FRAME, 5
    picture = indexed(image, "x")
    pixels = decode(picture.uri)
    assert (picture.height, picture.width) == shape == pixels.shape[:2]
    assert pixels[-1, -1].tolist() == value_colours()[5].tolist()
    if shape != (1, 1):
        assert pixels[0, 0].tolist() == list(FRAME_RGB)
        assert pixels[0, -1].tolist() == list(BLANK_RGB)


def test_colours_of_types():
    pixels = decode(indexed(np.array([[0, 1, BLANK]], np.uint8), "x", [[255, 0, 0], [0, 0, 9]]).uri)
    assert pixels.tolist() == [[[255, 0, 0], [0, 0, 9], list(BLANK_RGB)]]


def test_photographs_get_the_size_that_is_asked():
    image = np.zeros((50, 100, 3), np.uint8)
    image[:, :50] = (200, 100, 50)
    small = photograph(image, "x", 20)
    assert (small.width, small.height) == (20, 10)
    assert np.abs(decode(small.uri)[5, 3].astype(int) - (200, 100, 50)).max() < 12
    large = photograph(image, "x", 500)
    assert decode(large.uri).shape == (250, 500, 3)
    assert photograph(image, "x").width == 100


def test_equal_arrays_give_equal_bytes():
    image = np.random.default_rng(0).integers(0, 256, (30, 30, 3)).astype(np.uint8)
    assert photograph(image, "x").uri == photograph(image.copy(), "x").uri
    assert indexed(image[..., 0], "x").uri == indexed(image[..., 0].copy(), "x").uri
