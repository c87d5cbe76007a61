"""Unpacked arrays are made once, shared, and dropped like other entries of the cache."""

import numpy as np
import pytest

from scellst_ray.storage.unpacked import hold_array
from tests.support import cached

cache = cached.cache  # a fixture
pytestmark = pytest.mark.usefixtures("cache")


def counting(times):
    def fill(array):
        times.append(1)
        array[:] = np.arange(array.size).reshape(array.shape)

    return fill


def test_an_array_is_filled_once():
    times = []
    for _ in range(2):
        with hold_array("ab12", (3, 4), "float16", counting(times)) as array:
            assert array.dtype == np.float16
            np.testing.assert_array_equal(array, np.arange(12).reshape(3, 4))
            with pytest.raises(ValueError, match="read-only"):
                array[0, 0] = 1
    assert len(times) == 1
    with hold_array("ab13", (2,), "float16", counting(times)) as array:
        assert array.tolist() == [0, 1]
    assert len(times) == 2


def test_an_array_that_could_not_be_filled_leaves_nothing():
    def fail(array):
        array[0] = 7
        message = "a damaged table"
        raise ValueError(message)

    with pytest.raises(ValueError, match="a damaged table"), hold_array("ab", (2,), "f4", fail):
        pytest.fail("there is no array")
    with hold_array("ab", (2,), "f4", counting([])) as array:
        assert array.tolist() == [0, 1]


def test_entries_not_in_use_make_room(monkeypatch):
    monkeypatch.setenv("SCELLST_RAY_CACHE_GB", "0.00001")  # 10 kB
    times = []
    for identity in ("aa", "bb", "aa"):
        with hold_array(identity, (6_000,), "uint8", lambda a: times.append(a.fill(1))):
            pass
    assert len(times) == 3
    with hold_array("aa", (6_000,), "uint8", lambda a: times.append(a.fill(2))) as held:
        with hold_array("bb", (6_000,), "uint8", lambda a: a.fill(3)):
            pass
        assert held[0] == 1  # in use, so it stayed
    with pytest.raises(ValueError, match="no digest"), hold_array("../x", (1,), "u1", print):
        pytest.fail("there is no array")
