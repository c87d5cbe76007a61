"""The node's cache: copies of files on object storage, dropped when new ones need the space.

The cache is the folder `scellst_ray_cache_UID` in $SCELLST_RAY_CACHE_DIR (by default the temporary
folder). An entry is the copy of one object.

    lock                         held for a moment by a process that counts bytes and drops entries
    locks/IDENTITY               the entry's lock file. It is empty and never removed; its time is
                                 that of the entry's last use
    files/IDENTITY-BYTES/NAME    the copy; .NAME.part while it is downloaded
    files/IDENTITY-BYTES/...     further files of the slide, as they lie on the store next to NAME
                                 (slide_files.py); in .STEM.part/ while they are downloaded

IDENTITY is a hash of the URI and the store's own mark of the content: its ETag, or size and times
if it has none. It covers all files of a slide. So a changed object is another entry. A
slide that is a folder on the store is the folder NAME. The protocol, in terms of flock(2):

1. A reader holds the entry's lock shared as long as the file is open, since OpenSlide reads some
   formats bit by bit. Several processes and threads may hold it.
2. A process that finds no whole copy takes the lock alone, looks again, and downloads. Further
   processes wait for the lock and then find the copy. A copy gets its name when its size is that of
   the object and the object has not changed.
3. To make space, the least recently used entries are dropped whose lock can be taken alone at once.
   Entries that are being read or downloaded stay. The name of an entry's folder, which is made
   before the download, holds its size. So two downloads do not count on the same space.
4. The kernel releases the locks of a process that dies. It leaves an incomplete entry, which the
   next reader downloads from the start. Such entries are the first to be dropped.

No process waits for an entry's lock while it holds `lock`, so there is no deadlock. The folder must
be on a disk of this node, or at least on one where flock works. cache_space.py makes space.
"""

import fcntl
import hashlib
import os
import shutil
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import fsspec
from fsspec.implementations.local import LocalFileSystem

from scellst_ray.storage import cache_space, slide_files
from scellst_ray.storage.credentials import redact
from scellst_ray.storage.fingerprint import Fingerprint, fingerprint_of, look, of_object
from scellst_ray.storage.retries import DISK_FULL, TRIES, call_with_retries

# Characters kept of an object's name: a file name has at most 255 bytes, a character up to 4.
LONGEST_NAME = 48


class Held:
    """A local file that is kept until `close`, or until this object or the process ends.

    Attributes:
        path: The file.
        name: Its URI without credentials, for messages.
        mark: Fingerprint of the object that was copied; None for a local file, which may change.
    """

    def __init__(
        self, path: Path, name: str, lock: int | None = None, mark: Fingerprint | None = None
    ) -> None:
        """Take over the descriptor of a lock file; None for a local file, which has no lock."""
        self.path, self.name, self.mark = path, name, mark
        self._release = None if lock is None else weakref.finalize(self, _release, lock)

    @property
    def is_copy(self) -> bool:
        """Whether the file is in the cache."""
        return self._release is not None

    def close(self) -> None:
        """Release the file: from now on it may be dropped. Closing twice is no error."""
        if self._release is not None:
            self._release()

    def __enter__(self) -> Self:
        """Return this object."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the file."""
        self.close()


def _release(lock: int) -> None:
    cache_space.mark_used(lock)
    os.close(lock)


def hold(uri: str) -> Held:
    """Return a local file with the content of `uri`, and keep it from being dropped.

    A remote file is downloaded unless this node has a copy. A local file is returned itself. Close
    the file first, then the result of this function.

    Args:
        uri: Local path or fsspec URI of a file, or of a folder of DICOM files.

    Raises:
        FileNotFoundError: there is nothing under `uri`.
        PermissionError: the file may not be read.
        ConnectionError: the store failed, or the object changed, at every try.
        OSError: the disk is full, the cache's folder cannot be used, or another error of the store.
        ValueError: $SCELLST_RAY_CACHE_GB is not a size.
    """
    fs, path = fsspec.core.url_to_fs(uri)
    if isinstance(fs, LocalFileSystem):
        if not Path(path).exists():
            message = f"{uri}: no such file"
            raise FileNotFoundError(message)
        return Held(Path(path), uri)
    entry = _ask_store(fs, str(path), uri)
    for _ in range(TRIES):
        with ExitStack() as stack:
            lock = cache_space.open_lock(entry.lock)
            held = stack.enter_context(Held(entry.file, entry.name, lock, entry.mark))
            cache_space.lock_file(lock, fcntl.LOCK_SH, entry.lock)
            if entry.is_whole():
                cache_space.mark_used(lock)
                stack.pop_all()
                return held
            cache_space.lock_file(lock, fcntl.LOCK_EX, entry.lock)
            if not entry.is_whole():
                entry = _fetch(entry)
        # The lock is released for a moment: the copy may be dropped, and the object may change.
    message = f"{entry.name}: changed, or was dropped, {TRIES} times while it was copied"
    raise ConnectionError(message)


_PINNED: dict[Path, Held] = {}


def pin(uri: str) -> Path:
    """Return a local file with the content of `uri` that stays until this process ends.

    Use it for few files, such as weights, whose readers do not close them.

    Raises:
        OSError: as `hold` does.
    """
    held = hold(uri)
    if held.is_copy:
        _PINNED.setdefault(held.path, held)
    return held.path


def fingerprint(uri: str) -> Fingerprint | None:
    """Return the fingerprint of a file without fetching it; None if it cannot be known now.

    A later read of the file raises the reason.
    """
    fs, path = fsspec.core.url_to_fs(uri)
    try:
        if isinstance(fs, LocalFileSystem):
            return fingerprint_of(look(Path(path)))
        return _ask_store(fs, str(path), uri).mark
    except OSError:
        return None


@dataclass(frozen=True)
class _File:
    """One file of an entry: its path in the store, its name below the entry, and its bytes."""

    remote: str
    local: str
    num_bytes: int | None


@dataclass(frozen=True)
class _Entry:
    """An object as its store describes it now, and the place of its copy.

    Attributes:
        mark: Fingerprint of the content, which the URI does not change.
        main: The object's own file; None if the object is a folder.
        top: Name of the copy in the entry's folder.
        extra: Further files, by their names in the entry's folder.
    """

    fs: fsspec.AbstractFileSystem
    remote: str
    uri: str
    identity: str
    mark: Fingerprint
    main: _File | None
    top: str
    extra: tuple[_File, ...]
    root: Path

    @property
    def name(self) -> str:
        return redact(self.uri)

    @property
    def lock(self) -> Path:
        return cache_space.lock_path(self.root, self.identity)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all its files; a size that the store does not say counts as 0."""
        files = self.extra if self.main is None else (self.main, *self.extra)
        return sum(file.num_bytes or 0 for file in files)

    @property
    def folder(self) -> Path:
        return cache_space.entry_folder(self.root, self.identity, self.num_bytes)

    @property
    def file(self) -> Path:
        return self.folder / self.top

    @property
    def part(self) -> Path:
        return self.file.with_name(f".{self.file.name}.part")

    @property
    def folder_part(self) -> Path:
        return self.file.with_name(f".{self.file.stem}.part")

    def is_whole(self) -> bool:
        # The main file gets its name last, after the further files.
        if self.main is None:
            return self.file.is_dir()
        return self.file.is_file() and self.main.num_bytes in (None, self.file.stat().st_size)

    def parts(self) -> list[tuple[_File, Path]]:
        """Return its files and their places while they are downloaded."""
        extra = [(file, self.folder_part / file.local) for file in self.extra]
        return extra if self.main is None else [*extra, (self.main, self.part)]

    def give_names(self) -> None:
        """Give the downloaded files their names, which makes them the copy."""
        if self.extra:
            for part in sorted(self.folder_part.iterdir()):
                part.replace(self.folder / part.name)
            self.folder_part.rmdir()
        if self.main is not None:
            self.part.replace(self.file)


def _ask_store(fs: fsspec.AbstractFileSystem, path: str, uri: str) -> _Entry:
    """Ask the store for an object: one request, and more for a slide of several files."""

    def ask() -> dict[str, Any]:
        fs.invalidate_cache(path)
        return dict(fs.info(path))

    info = call_with_retries(ask, redact(uri))
    name = redact(path.rstrip("/")).rsplit("/", 1)[-1][-LONGEST_NAME:].lstrip(".") or "file"
    main = None
    if info.get("type") == "directory":
        found = slide_files.folder_files(fs, path)
        extra = {f"{name}/{file}": found[file] for file in found}
        marks = []
    else:
        extra = slide_files.further_files(fs, path, name, _mark)
        extra.pop(path.rsplit("/", 1)[-1], None)
        main = _File(path, name, info.get("size"))
        marks = [_mark(info)]
    marks += [f"{file} {_mark(extra[file])}" for file in sorted(extra)]
    identity = hashlib.sha256("\n".join([uri, *marks]).encode()).hexdigest()[:32]
    files = [_File(str(extra[file]["name"]), file, extra[file].get("size")) for file in extra]
    mark = of_object([str(info.get("size")), *marks])
    return _Entry(fs, path, uri, identity, mark, main, name, tuple(files), cache_space.cache_root())


def _mark(info: dict[str, Any]) -> str:
    """Return the store's mark of an object's content: another content has another mark."""
    # Not fsspec's own `ukey`: it is the same for all versions of an http file, and depends on the
    # request for S3. `url` is left out, since redirects often carry a new signature each time.
    mark = info.get("ETag") or info.get("etag")
    return str(mark or sorted((key, str(info[key])) for key in info if key not in ("name", "url")))


def _fetch(entry: _Entry) -> _Entry:
    """Download an entry whose lock is held alone; return it as the store describes it afterwards.

    If the result is another entry, the object has changed, and the download is thrown away.
    """
    shutil.rmtree(entry.folder, ignore_errors=True)  # left by a killed download
    try:
        _download(entry)
        now = _ask_store(entry.fs, entry.remote, entry.uri)
        if now.identity == entry.identity:
            entry.give_names()
        return now
    finally:
        if not entry.file.exists():
            shutil.rmtree(entry.folder, ignore_errors=True)


def _download(entry: _Entry) -> None:
    """Download the files; if the disk is full, drop all unused entries and download again."""
    promise = (entry.root, entry.identity, entry.num_bytes, entry.name)
    for drop_all in (False, True):
        cache_space.make_room(*promise, drop_all=drop_all)
        try:
            for file, part in entry.parts():
                call_with_retries(partial(_copy, entry.fs, file, part), entry.name)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            for _, part in entry.parts():
                part.unlink(missing_ok=True)
        else:
            return
    raise cache_space.disk_full(entry.root, entry.num_bytes, entry.name)


def _copy(fs: fsspec.AbstractFileSystem, file: _File, part: Path) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    fs.get_file(file.remote, str(part))
    num_bytes = part.stat().st_size
    if file.num_bytes not in (None, num_bytes):
        message = f"only {num_bytes:,} of {file.num_bytes:,} bytes arrived"
        raise ConnectionError(message)
