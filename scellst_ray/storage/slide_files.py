"""Slides that consist of several objects of a store, or of a folder.

| slide | further objects |
| --- | --- |
| MRXS | all in the folder of its name |
| DICOM | the files of its series in the same folder |
| VMS, VMU of Hamamatsu | those next to it that it names |
| a folder of DICOM files | its files |
"""

from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Any

import fsspec

from scellst_ray.storage.credentials import redact
from scellst_ray.storage.retries import call_with_retries

MRXS, DICOM, LISTS = ".mrxs", ".dcm", (".vms", ".vmu")
# Bytes 128 to 132 of a DICOM file.
MAGIC, MAGIC_AT = b"DICM", 128
# Tag (0020,000E), the series of a DICOM file, and bytes of the header within which it lies.
SERIES, SERIES_WITHIN = b"\x20\x00\x0e\x00UI", 16 * 2**10
LONGEST_LIST = 2**20
# Their headers are all read; a slide has one file for each level and one or two besides.
MOST_DICOM_FILES = 1000
ZARR_MARKS = frozenset({".zattrs", ".zgroup", ".zarray", "zarr.json"})
NO_ZARR = (
    "an OME-Zarr folder, which is not read; write it as a TIFF, for example `raw2ometiff --rgb "
    "FOLDER OUT.ome.tif`"
)
NO_SLIDE = "a folder; give a file, or a folder of DICOM files"
# Series by name and mark of the object: they are asked for whenever a slide is opened.
_KNOWN: dict[tuple[str, str], bytes | None] = {}
_MOST_KNOWN = 10_000

Infos = dict[str, dict[str, Any]]


def series_in(head: bytes) -> bytes | None:
    """Return the SeriesInstanceUID in the header of a DICOM file; None if it does not show it.

    Args:
        head: The first SERIES_WITHIN bytes of the file.
    """
    at = head.find(SERIES)
    if at < 0:
        return None
    start = at + len(SERIES) + 2
    return head[start : start + int.from_bytes(head[start - 2 : start], "little")].rstrip(b"\0 ")


def names_in(content: bytes) -> list[str]:
    """Return the values of a VMS or VMU file that may be names of files next to it."""
    lines = content[:LONGEST_LIST].decode("utf-8", "replace").splitlines()
    values = {line.partition("=")[2].strip() for line in lines if "=" in line}
    return sorted(value for value in values if value and "/" not in value and "\0" not in value)


def further_files(
    fs: fsspec.AbstractFileSystem, path: str, name: str, mark: Callable[[dict[str, Any]], str]
) -> Infos:
    """List the further objects of a slide on a store, by the names that copies need.

    Args:
        fs: The store.
        path: The slide's main object in it.
        name: Name of the copy of the main object.
        mark: Returns the store's mark of an object's content from what the store says of it.

    Raises:
        FileNotFoundError: the folder of an MRXS slide does not exist or is empty.
        OSError: the store does not list what lies next to the slide, or a name cannot be a file.
    """
    kind = PurePosixPath(path).suffix.lower()
    if kind == MRXS:
        pixels = _pixels_of_mrxs(fs, path)
        return {f"{PurePosixPath(name).stem}/{part}": info for part, info in pixels.items()}
    if kind == DICOM:
        return _dicom_series(fs, path, mark)
    if kind in LISTS:
        listed = _list_folder(fs, path)
        wanted = names_in(_read(fs, path, LONGEST_LIST))
        return {other: listed[other] for other in wanted if other in listed}
    return {}


def folder_files(fs: fsspec.AbstractFileSystem, path: str) -> Infos:
    """List the DICOM files of a folder on a store, by name.

    Raises:
        IsADirectoryError: the folder is no DICOM slide.
    """
    listed = _listing(fs, path.rstrip("/"))
    names = {name: info for name, info in listed.items() if name.lower().endswith(DICOM)}
    if names:
        return _checked(names, path)
    reason = NO_ZARR if ZARR_MARKS & set(listed) else NO_SLIDE
    message = f"{redact(fs.unstrip_protocol(path))}: {reason}"
    raise IsADirectoryError(message)


def _pixels_of_mrxs(fs: fsspec.AbstractFileSystem, path: str) -> Infos:
    folder = path[: -len(MRXS)] + "/"

    def ask() -> Infos:
        fs.invalidate_cache(folder)
        return dict(fs.find(folder, detail=True))

    listed = call_with_retries(ask, redact(folder)).items()
    files = {name[len(folder) :]: info for name, info in listed if name.startswith(folder)}
    if not files:
        message = f"{redact(folder)}: no files; copy the pixels of the .mrxs file into this folder"
        raise FileNotFoundError(message)
    return _checked(files, folder)


def _dicom_series(
    fs: fsspec.AbstractFileSystem, path: str, mark: Callable[[dict[str, Any]], str]
) -> Infos:
    """List the DICOM files in the same folder that are of the file's series."""
    listed = _list_folder(fs, path)
    files = {name: info for name, info in listed.items() if name.lower().endswith(DICOM)}
    if len(files) > MOST_DICOM_FILES:
        message = (
            f"{redact(path)}: {len(files):,} DICOM files in its folder; put the files of each "
            "slide into a folder of its own"
        )
        raise OSError(message)

    def series(info: dict[str, Any]) -> bytes | None:
        key = (str(info["name"]), mark(info))
        if key not in _KNOWN:
            if len(_KNOWN) >= _MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[key] = series_in(_read(fs, key[0], SERIES_WITHIN))
        return _KNOWN[key]

    own = series(files[path.rsplit("/", 1)[-1]])
    return {name: info for name, info in files.items() if series(info) == own}


def _list_folder(fs: fsspec.AbstractFileSystem, path: str) -> Infos:
    """List the folder of an object, which must show the object itself.

    Raises:
        OSError: the store lists no folders.
    """
    folder, _, own = path.rpartition("/")
    try:
        listed = _listing(fs, folder)
    except (FileNotFoundError, NotImplementedError):
        listed = {}
    if own not in listed:
        message = (
            f"{redact(path)}: this slide is several files, and its store does not list those next "
            "to it; copy all of them to a disk or another store"
        )
        raise OSError(message)
    return listed


def _listing(fs: fsspec.AbstractFileSystem, folder: str) -> Infos:
    def ask() -> Iterable[dict[str, Any]]:
        fs.invalidate_cache(folder)
        return list(fs.ls(folder, detail=True))

    found = call_with_retries(ask, redact(folder))
    return {str(info["name"]).rstrip("/").rsplit("/", 1)[-1]: dict(info) for info in found}


def _checked(files: Infos, folder: str) -> Infos:
    """Return the files, each of which lies below the folder.

    Raises:
        OSError: a name points outside the folder.
    """
    for name in files:
        if ".." in name.split("/") or name.startswith("/"):
            message = f"{redact(folder)}: {name!r} cannot be a file below it; rename the object"
            raise OSError(message)
    return files


def _read(fs: fsspec.AbstractFileSystem, path: str, num_bytes: int) -> bytes:
    """Return the first bytes of an object."""

    def ask() -> bytes:
        return bytes(fs.cat_file(path, start=0, end=num_bytes))[:num_bytes]

    return call_with_retries(ask, redact(path))
