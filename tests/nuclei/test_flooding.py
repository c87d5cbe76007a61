import numpy as np
import pytest
from scipy import ndimage
from skimage.segmentation import watershed

from scellst_ray.nuclei import flooding
from scellst_ray.nuclei.flooding import flood


def landscape(seed):
    """Return heights with hollows in hollows, markers of a few pixels, and a mask with holes."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 60, 2))
    height = ndimage.gaussian_filter(rng.normal(size=shape), rng.choice([0, 1, 3]))
    mask = ndimage.gaussian_filter(rng.normal(size=shape), 2) > -0.1 * rng.integers(0, 3)
    markers = np.zeros(shape, np.int32)
    for label in range(1, rng.integers(1, 14)):
        y, x = rng.integers(0, shape)
        markers[y : y + rng.integers(1, 5), x : x + rng.integers(1, 5)] = label
    return height, markers, mask


@pytest.fixture
def no_queue(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("asked scikit-image")

    monkeypatch.setattr(flooding, "watershed", refuse)


@pytest.mark.usefixtures("no_queue")
@pytest.mark.parametrize("start", range(0, 400, 50))
def test_equals_the_queue_of_scikit_image(start):
    for seed in range(start, start + 50):
        height, markers, mask = landscape(seed)
        if min(height.shape) < 4:  # SciPy's filter mirrors, so that thin maps have equals
            height += 1e-3 * np.random.default_rng(seed).normal(size=height.shape)
        expected = watershed(height, markers, mask=mask)
        np.testing.assert_array_equal(flood(height, markers, mask), expected)


@pytest.mark.parametrize("seed", range(100))
def test_equal_heights_are_flooded_in_the_queue_s_order(seed):
    height, markers, mask = landscape(seed)
    height = np.round(2 * height / max(np.abs(height).max(), 1e-9))
    np.testing.assert_array_equal(
        flood(height, markers, mask), watershed(height, markers, mask=mask)
    )


@pytest.mark.usefixtures("no_queue")
def test_water_over_a_pass_fills_the_hollow_behind_it():
    height = np.array([[0.0, 3, 1, 0.5, 2, 6, 4, 5]])
    markers = np.array([[7, 0, 0, 0, 0, 0, 0, 9]], np.int32)
    labels = flood(height, markers, np.ones((1, 8), np.bool_))
    assert labels.tolist() == [[7, 7, 7, 7, 7, 7, 9, 9]]  # 6 is next to 2, flooded at 3


@pytest.mark.usefixtures("no_queue")
def test_a_part_without_a_marker_stays_dry():
    mask = np.array([[1, 1, 0, 1, 1]], np.bool_)
    labels = flood(np.arange(5.0)[None], np.array([[0, 3, 8, 0, 0]], np.int32), mask)
    assert labels.tolist() == [[3, 3, 0, 0, 0]]


def test_many_hollows_in_hollows_are_left_to_the_queue(monkeypatch):
    asked = []

    def counted(*args, **kwargs):
        asked.append(1)
        return watershed(*args, **kwargs)

    monkeypatch.setattr(flooding, "watershed", counted)
    height = np.tile([0.0, 1.0], 200)[None] + np.linspace(0.5, 0, 400)
    markers = np.zeros((1, 400), np.int32)
    markers[0, 0] = 1
    assert (flood(height, markers, np.ones((1, 400), np.bool_)) == 1).all()
    assert asked


def test_inputs_are_left_as_they_are():
    given = landscape(3)
    copies = [array.copy() for array in given]
    flood(*given)
    for before, after in zip(copies, given, strict=True):
        np.testing.assert_array_equal(before, after)
