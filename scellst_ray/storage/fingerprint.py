"""Fingerprints: short texts that change when the content of a file changes.

A fingerprint has two parts.

- CONTENT, 16 hex digits: a digest of the size and of some blocks of a local file, or of an object's
  size and its store's mark (ETag, version or checksum). A copy has the content of its original.
- CHANGED, 8 hex digits: a digest of the size and of the time of change of a local file; zeros for
  an object. It is cheap to look up, and notices what the blocks may miss.

Some slides are several files: MRXS with its folder, DICOM with the files of its series, VMS and VMU
with the files that they name, and folders (Zarr). Their fingerprints cover all files.
"""

import hashlib
import os
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from scellst_ray.storage.slide_files import (
    LONGEST_LIST,
    SERIES_WITHIN,
    names_in,
    series_in,
)

# Blocks read of a file, or of all files of a slide together; a small file is read as a whole.
NUM_BLOCKS, BLOCK_BYTES = 32, 16 * 2**10
# Files looked at again while a slide is read: a Zarr has thousands.
MOST_LOOKS = 64
UNCHANGING = "0" * 8


@dataclass(frozen=True)
class Fingerprint:
    """What identifies the content of a file or of a slide.

    Attributes:
        content: 16 hex digits, the same for every copy.
        changed: 8 hex digits of size and time of change; zeros on object storage.
    """

    content: str
    changed: str = UNCHANGING

    def __str__(self) -> str:
        """Return both parts as one text."""
        return f"{self.content}-{self.changed}"

    def is_that_of(self, source: str) -> bool:
        """Return whether a source, which begins with a fingerprint, is of this very file."""
        return source.split("-")[:2] == [self.content, self.changed]

    def has_content_of(self, source: str) -> bool:
        """Return whether a source is of this file or of a copy of it."""
        return source.split("-", 1)[0] == self.content


@dataclass(frozen=True)
class LocalFile:
    """A local file as the disk describes it.

    Attributes:
        path: The file.
        name: Its name within the slide.
        num_bytes: Its size.
        changed_ns: Time of its last change.
        inode: Its number, which a file put in its place does not share.
    """

    path: Path
    name: str
    num_bytes: int
    changed_ns: int
    inode: int


def look(path: Path) -> tuple[LocalFile, ...]:
    """Return the files of a slide, or the one file, as they are now.

    Raises:
        OSError: a file is missing or may not be looked at, or a folder is empty.
    """
    files = _files_of(path)
    if not files:
        message = f"{path}: an empty folder; give a file, or a folder of DICOM files"
        raise IsADirectoryError(message)
    return tuple(_look_up(file, name) for file, name in files)


def is_unchanged(files: Sequence[LocalFile]) -> bool:
    """Return whether files are still those that `look` saw; of very many some are looked at."""
    step = -(-len(files) // MOST_LOOKS) or 1
    try:
        return all(_look_up(file.path, file.name) == file for file in files[::step])
    except OSError:
        return False


def fingerprint_of(files: Sequence[LocalFile]) -> Fingerprint:
    """Return the fingerprint of files that `look` saw; some blocks of them are read.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\n{file.num_bytes}\n".encode())
    for number, offsets in _blocks(files):
        with files[number].path.open("rb", buffering=0) as handle:
            for offset in offsets:
                digest.update(os.pread(handle.fileno(), BLOCK_BYTES, offset))
    return Fingerprint(digest.hexdigest()[:16], changed_of(files))


def changed_of(files: Sequence[LocalFile]) -> str:
    """Return the CHANGED part of the fingerprint of files; nothing is read."""
    text = "\n".join(f"{file.name} {file.num_bytes} {file.changed_ns}" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def of_object(marks: Sequence[str]) -> Fingerprint:
    """Return the fingerprint of an object, from the size and the marks that its store gives."""
    return Fingerprint(hashlib.sha256("\n".join(marks).encode()).hexdigest()[:16])


def _look_up(path: Path, name: str) -> LocalFile:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # to read it might take for ever
        message = f"{path}: neither a file nor a folder (a pipe, a device?); give a file"
        raise OSError(message)
    return LocalFile(path, name, found.st_size, found.st_mtime_ns, found.st_ino)


def _blocks(files: Sequence[LocalFile]) -> Iterator[tuple[int, list[int]]]:
    """Yield the number of each file that is read, and the offsets of its blocks.

    Blocks lie evenly over the bytes of all files, and at the start of each of the first files.
    """
    starts = [0, *accumulate(file.num_bytes for file in files)]
    last = max(0, starts[-1] - BLOCK_BYTES)
    wanted: dict[int, set[int]] = {number: {0} for number in range(min(len(files), NUM_BLOCKS))}
    for block in range(NUM_BLOCKS):
        at = last * block // (NUM_BLOCKS - 1)
        number = min(bisect_right(starts, at) - 1, len(files) - 1)
        wanted.setdefault(number, set()).add(at - starts[number])
    for number in sorted(wanted):
        yield number, sorted(wanted[number])


def _files_of(path: Path) -> list[tuple[Path, str]]:
    """Return the files of a slide with their names within it, the main file first."""
    if path.is_dir():
        return _files_below(path)
    kind = path.suffix.lower()
    others: list[tuple[Path, str]] = []
    if kind == ".mrxs":
        others = _files_below(path.with_suffix(""))
    elif kind == ".dcm":
        others = _series_of(path)
    elif kind in (".vms", ".vmu"):
        others = _named_in(path)
    return [(path, "")] + [(file, name) for file, name in others if file != path]


def _files_below(folder: Path) -> list[tuple[Path, str]]:
    found = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted((file, file.relative_to(folder).as_posix()) for file in found)


def _series_of(path: Path) -> list[tuple[Path, str]]:
    """Return the DICOM files next to a file that belong to its series."""
    series = _series(path)
    siblings = sorted(p for p in path.parent.iterdir() if p.suffix.lower() == ".dcm")
    return [(p, p.name) for p in siblings if p.is_file() and _series(p) == series]


def _series(path: Path) -> bytes | None:
    """Return the SeriesInstanceUID of a DICOM file; None if its header does not show it."""
    with path.open("rb", buffering=0) as file:
        return series_in(file.read(SERIES_WITHIN))


def _named_in(path: Path) -> list[tuple[Path, str]]:
    """Return the files next to a VMS or VMU file that it names."""
    with path.open("rb") as file:
        named = names_in(file.read(LONGEST_LIST))
    return [(path.parent / name, name) for name in named if (path.parent / name).is_file()]
