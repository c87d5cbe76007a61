"""Read parts of HDF5 files that others wrote, each checked before its values are read.

Links to other places or files are refused, and so are data sets that declare far more than their
file can hold. Every error is a ValueError that names the file and the part.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from scellst_ray.spots.files import reason_of
from scellst_ray.spots.heaps import has_broken_heap

# A part may hold this many bytes, or this many times the bytes of its file if that is more.
PART_BYTES, PART_RATIO = 32 * 2**20, 200
# Text takes more memory than in the file, so there may be this many, or one a byte of the file.
NUM_TEXTS = 2**21
# Errors of h5py on damaged files.
DAMAGE = (OSError, RuntimeError, KeyError, TypeError, ValueError, OverflowError, MemoryError)


@contextmanager
def open_hdf5(file: str | IO[bytes], source: str) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading.

    Args:
        file: Path of a local file, or its content.
        source: Name of the file in errors.

    Raises:
        ValueError: The file is no HDF5 file or is damaged.
    """
    try:
        if _has_broken_heap(file):
            message = "a heap of text is damaged"
            raise ValueError(message)
        opened = h5py.File(file, "r")
    except DAMAGE as error:
        message = f"{source}: not a readable HDF5 file ({reason_of(error)}). Copy it again."
        raise ValueError(message) from error
    with opened:
        yield opened


def _has_broken_heap(file: str | IO[bytes]) -> bool:
    """Return whether a heap of text of a file is damaged (see has_broken_heap)."""
    if not isinstance(file, str):
        content = file.read()
        file.seek(0)
        return has_broken_heap(content)
    with Path(file).open("rb") as opened:
        if not opened.read(1):
            return False
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return has_broken_heap(view)


def names_in(group: h5py.Group | None, source: str) -> list[str]:
    """Return the names of a group's members in alphabetical order; none if it is no group.

    Raises:
        ValueError: The group is damaged.
    """
    if not isinstance(group, h5py.Group):
        return []
    try:
        return sorted(group)
    except DAMAGE as error:
        message = (
            f"{source}: {group.name} cannot be read ({reason_of(error)}). Copy the file again."
        )
        raise ValueError(message) from error


def find_part(group: h5py.Group, key: str, source: str) -> h5py.Group | h5py.Dataset | None:
    """Return the group or data set under a key such as "layers/counts"; None if it is absent.

    Raises:
        ValueError: A part of the key is a link to another place or file, or is damaged.
    """
    part = group
    for name in key.split("/"):
        if not isinstance(part, h5py.Group):
            return None
        try:
            link = part.get(name, getlink=True)
            if link is None or name not in part:
                if isinstance(link, h5py.SoftLink | h5py.ExternalLink):
                    raise_link(part, name, source)
                return None
            if not isinstance(link, h5py.HardLink):
                raise_link(part, name, source)
            part = part[name]
        except DAMAGE as error:
            if isinstance(error, LinkRefusedError):
                raise
            message = f"{source}: {key} cannot be read ({reason_of(error)}). Copy the file again."
            raise ValueError(message) from error
    return part


class LinkRefusedError(ValueError):
    """A part of a file is a link."""


def raise_link(group: h5py.Group, name: str, source: str) -> None:
    """Raise the error for a member of a group that is a link."""
    message = (
        f"{source}: {group.name.rstrip('/')}/{name} is a link to another place or file. Write the "
        "file again with the values in it."
    )
    raise LinkRefusedError(message)


def read_array(part: h5py.Group | h5py.Dataset | None, source: str) -> NDArray[Any]:
    """Return the values of a data set; text as objects of type str.

    Args:
        part: The data set.
        source: Name of the file and the part in errors.

    Raises:
        ValueError: The part is no data set, is damaged, or declares more than the file can hold.
    """
    part = check_dataset(part, source)
    try:
        if h5py.check_string_dtype(part.dtype) is not None or part.dtype.kind == "S":
            values = np.asarray(part.asstr()[()], object)
        elif part.dtype.kind not in "biuf":
            values = np.zeros(0, part.dtype)
        else:
            values = np.asarray(part[()])
    except DAMAGE as error:
        message = f"{source} cannot be read ({reason_of(error)}). Copy the file again."
        raise ValueError(message) from error
    is_text = values.dtype.kind == "O" and h5py.check_string_dtype(part.dtype) is not None
    if values.dtype.kind not in "biuf" and not (is_text or part.dtype.kind == "S"):
        message = f"{source} holds {values.dtype}, neither numbers nor text. Copy the file again."
        raise ValueError(message)
    return values


def check_dataset(part: h5py.Group | h5py.Dataset | None, source: str) -> h5py.Dataset:
    """Return a part if it is a data set whose values lie in its file.

    Raises:
        ValueError: As in read_array.
    """
    if not isinstance(part, h5py.Dataset):
        found = "a group" if isinstance(part, h5py.Group) else "absent"
        message = f"{source} is {found}, expected values. Write the file again."
        raise ValueError(message)
    try:
        num_values = int(np.prod([float(size) for size in part.shape or ()]))
        num_bytes = num_values * part.dtype.itemsize
        is_elsewhere = bool(part.external) or part.is_virtual
        file_bytes = int(part.file.id.get_filesize())
        limit = max(PART_BYTES, PART_RATIO * file_bytes)
        if part.dtype.kind in "OS" and num_values > max(NUM_TEXTS, file_bytes):
            limit = 0
    except DAMAGE as error:
        message = f"{source} cannot be read ({reason_of(error)}). Copy the file again."
        raise ValueError(message) from error
    if is_elsewhere:
        message = (
            f"{source} keeps its values in another file. Write the file with the values in it."
        )
        raise ValueError(message)
    if num_bytes > limit:
        message = (
            f"{source} declares {num_bytes} bytes (shape {part.shape}), more than its file can "
            f"hold. Copy the file again."
        )
        raise ValueError(message)
    return part


def read_strings_of(part: h5py.Group | h5py.Dataset | None, source: str) -> list[str]:
    """Return a list of names.

    Raises:
        ValueError: As in read_array, or the values are no list of text.
    """
    values = read_array(part, source)
    if values.ndim != 1 or values.dtype.kind not in "OSU":
        message = (
            f"{source} has type {values.dtype} and shape {values.shape}, expected a list of text. "
            "Write the file again."
        )
        raise ValueError(message)
    return [str(value) for value in values]


def attribute(part: h5py.Group | h5py.Dataset, name: str) -> object:
    """Return an attribute; None if it is absent or cannot be read."""
    try:
        value = part.attrs.get(name)
    except DAMAGE:
        return None
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
