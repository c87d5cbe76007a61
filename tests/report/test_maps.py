import numpy as np
import pytest

from scellst_ray.report.maps import MAP_PX, limits_of, mean_map, spot_map, squares_over
from scellst_ray.report.pictures import BLANK, BLANK_RGB, value_colours
from tests.support.pages import decode

SIZE0 = (2000, 1000)


def cells(count, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, (count, 2)) * SIZE0


@pytest.mark.parametrize("count", [1, 40, 3000])
def test_means_are_those_of_the_cells_of_each_square(count):
    xy0, values = cells(count), np.random.default_rng(1).normal(size=count)
    squares = squares_over(xy0, SIZE0)
    found = squares.means(values)
    for row, column in np.ndindex(*squares.shape):
        begin = np.array([column, row]) * squares.side0
        inside = ((xy0 >= begin) & (xy0 < begin + squares.side0)).all(axis=1)
        expected = values[inside].mean() if inside.any() else np.nan
        assert found[row, column] == pytest.approx(expected, nan_ok=True)
    assert squares.drawn(np.zeros(squares.shape, np.uint8)).shape == (MAP_PX // 2, MAP_PX)


def test_squares_are_small_where_there_are_many_cells():
    zooms = [squares_over(cells(count), SIZE0).zoom for count in (10, 1000, 10_000, 400_000)]
    assert zooms == sorted(zooms, reverse=True)
    assert zooms[0] > 4
    assert zooms[-1] == 1


@pytest.mark.parametrize("size0", [(1, 1), (50_000, 3), (7, 90_000)])
def test_slides_of_any_shape(size0):
    squares = squares_over(np.array([[0.0, 0.0], [size0[0] + 5.0, size0[1] + 5.0]]), size0)
    height, width = squares.drawn(np.zeros(squares.shape, np.uint8)).shape
    assert max(height, width) == MAP_PX
    assert min(height, width) >= 1


def test_the_commonest_type_of_a_square():
    xy0 = np.array([[10.0, 10.0], [11.0, 10.0], [12.0, 11.0], [1500.0, 900.0]])
    squares = squares_over(xy0, SIZE0)
    found = squares.commonest(np.array([1, 0, 1, 2]), 3)
    assert found[0, 0] == 1
    assert found[int(900 // squares.side0), int(1500 // squares.side0)] == 2
    assert (found == BLANK).sum() == found.size - 2


def test_cells_without_a_value_or_type_do_not_count():
    xy0 = np.array([[10.0, 10.0], [11.0, 10.0], [12.0, 11.0], [1500.0, 900.0]])
    squares = squares_over(xy0, SIZE0)
    means = squares.means(np.array([1.0, np.nan, 3.0, np.nan]))
    assert means[0, 0] == 2
    assert np.isfinite(means).sum() == 1
    found = squares.commonest(np.array([-1, 0, -1, -1]), 3)
    assert found[0, 0] == 0
    assert (found != BLANK).sum() == 1


def test_a_map_shows_high_where_values_are_high():
    xy0 = cells(5000)
    squares = squares_over(xy0, SIZE0)
    means = squares.means(xy0[:, 0])
    pixels = decode(mean_map(squares, means, limits_of(means), "x").uri)
    left, middle, right = (part.mean() for part in np.array_split(pixels.astype(float), 3, axis=1))
    assert left < middle < right
    assert pixels[90, 2].tolist() == value_colours()[0].tolist()


def test_limits():
    assert limits_of(np.array([np.nan, np.nan])) == (0.0, 0.0)
    assert limits_of(np.arange(101.0)) == (1.0, 99.0)


def test_spots_lie_where_they_were_measured():
    xy0, values = np.array([[200.0, 500.0], [1800.0, 500.0], [1000.0, 200.0]]), [1.0, 5.0, np.nan]
    picture, limits = spot_map(xy0, 50.0, np.array(values), SIZE0, "x")
    pixels = decode(picture.uri)
    scale = MAP_PX / SIZE0[0]
    left, right, unknown = (pixels[int(y * scale), int(x * scale)].tolist() for x, y in xy0)
    assert left == value_colours()[0].tolist()
    assert right == value_colours()[-1].tolist()
    assert unknown == list(BLANK_RGB)
    assert limits == pytest.approx((1.04, 4.96))
