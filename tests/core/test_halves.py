"""Every float16 becomes the float32 that numpy makes of it."""

import numpy as np

from scellst_ray.core import halves
from scellst_ray.core.halves import to_float32

ALL = np.arange(65_536, dtype=np.uint16).view(np.float16)


def equal(values):
    found, expected = to_float32(values), values.astype(np.float32)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_every_number_is_converted_exactly():
    equal(ALL)
    finite = ALL[np.isfinite(ALL)]
    equal(finite)
    equal(finite[finite > 0])
    equal(finite.reshape(-1, 2)[::3, 1])  # not contiguous
    equal(np.zeros((0, 3), np.float16))
    equal(np.array([[1.5, -0.0], [2.0**-24, -(2.0**-24)]], np.float16))


def test_other_types_and_other_modes_are_numpys(monkeypatch):
    equal(np.array([0.1, 1e-300]))
    equal(np.array([np.inf, 1.0], np.float16))
    monkeypatch.setattr(halves, "_flushes_tiny_numbers", lambda: True)
    equal(ALL)
