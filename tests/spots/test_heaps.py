"""Heaps of text whose objects lead nowhere. The bytes here are no HDF5 file."""

import h5py
import numpy as np

from scellst_ray.spots.heaps import SIGNATURE, has_broken_heap


def heap(*objects, size=64):
    """Return a heap of objects, given as (index, size), each with as many bytes as it says."""
    content = SIGNATURE + size.to_bytes(8, "little")
    for index, length in objects:
        content += index.to_bytes(2, "little") + bytes(6) + length.to_bytes(8, "little")
        content += bytes(min(size, max(0, -(-length // 8) * 8 - 16 * (index == 0))))
    return content[:size].ljust(size, b"\0")


def test_heaps_that_hdf5_writes_are_sound(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["names"] = [f"name {number}" * (number % 9) for number in range(5000)]
        file.attrs["note"] = "text"
    assert SIGNATURE in (tmp_path / "a.h5").read_bytes()
    assert not has_broken_heap((tmp_path / "a.h5").read_bytes())
    assert not has_broken_heap(np.arange(1000).tobytes())
    assert not has_broken_heap(heap((1, 5), (0, 24)))


def test_objects_without_end_are_found():
    assert has_broken_heap(bytes(32) + heap((1, 5), (0, 0)))
    assert has_broken_heap(heap((1, 2**40)))
    assert has_broken_heap(heap((1, 5), (0, 24), size=64)[:60])
    assert has_broken_heap(heap((1, 5), (0, 2**63)))
