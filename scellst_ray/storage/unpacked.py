"""Arrays that took long to unpack, kept in the node's cache and mapped into memory.

An array is an entry of the cache (node_cache.py explains its locks). Its identity is a digest of
what it was unpacked from, so it never becomes stale.
"""

import fcntl
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scellst_ray.storage import cache_space

FILE = "array"
TRIES = 3


@contextmanager
def hold_array(
    identity: str, shape: tuple[int, ...], dtype: str, fill: Callable[[NDArray[np.generic]], None]
) -> Iterator[NDArray[np.generic]]:
    """Yield an array of this identity, mapped from the cache; it stays while the block runs.

    Args:
        identity: Digest of its content, in hex.
        shape: Its shape.
        dtype: Its type.
        fill: Called with an empty array to fill, if the cache has none.

    Raises:
        OSError: the cache's folder cannot be used, or the disk is full.
        ValueError: $SCELLST_RAY_CACHE_GB is not a size, or `identity` is no digest.
    """
    if not re.fullmatch(r"[0-9a-f]+", identity):
        message = f"{identity!r} is no digest in hex"
        raise ValueError(message)
    root = cache_space.cache_root()
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    file = cache_space.entry_folder(root, identity, num_bytes) / FILE
    path = cache_space.lock_path(root, identity)
    for _ in range(TRIES):
        lock = cache_space.open_lock(path)
        try:
            cache_space.lock_file(lock, fcntl.LOCK_SH, path)
            if file.exists():
                cache_space.mark_used(lock)
                yield np.memmap(file, dtype, "r", shape=shape)
                return
            cache_space.lock_file(lock, fcntl.LOCK_EX, path)
            if not file.exists():
                cache_space.make_room(root, identity, num_bytes, identity, drop_all=False)
                _write(file, shape, dtype, fill)
        finally:
            os.close(lock)
        # The lock is released for a moment: the array may be dropped.
    message = f"{file}: was dropped {TRIES} times while it was unpacked"
    raise OSError(message)


def _write(
    file: Path, shape: tuple[int, ...], dtype: str, fill: Callable[[NDArray[np.generic]], None]
) -> None:
    part = file.with_name(f".{file.name}.part")
    try:
        array = np.memmap(part, dtype, "w+", shape=shape)
        fill(array)
        array.flush()
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
