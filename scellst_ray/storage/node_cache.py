"""Files on object storage, copied once to this node and dropped when others need the room.

Below `scellst_ray_cache_UID` in $SCELLST_RAY_CACHE_DIR (the temporary folder where unset) lie

    lock                         held, for moments, by whoever counts bytes and makes room
    locks/IDENTITY               one per object ever fetched, empty, never removed; its time is
                                 that of the last use
    files/IDENTITY-BYTES/NAME    the copy; .NAME.part while it comes
    files/IDENTITY-BYTES/STEM/   of a slide in MRXS, NAME being STEM.mrxs, the folder that holds its
                                 pixels; .STEM.part while it comes

IDENTITY is made from the URI and the store's own mark of the content (its ETag; size and times
where it gives none; for MRXS of all its files), so a changed object is another entry. The protocol,
in terms of flock(2):

- A reader holds locks/IDENTITY shared for as long as it has the file open, since OpenSlide opens
  some formats bit by bit. Several processes and threads may.
- Whoever finds no whole copy takes that lock alone, looks again, and downloads; the others wait
  there, and find the copy when they get it. A copy gets its name once its size is the object's and
  the object is still the same.
- To make room, the least recently used entries go whose lock can be had alone at once: what is
  being read or is just coming refuses. The folder made before a download tells in its name what
  is to come, so downloads at the same time do not promise themselves the same room.
- The kernel drops the locks of a process that dies. What it leaves is an incomplete entry, which
  the next reader begins anew, and which is the first to go when room is needed.

No entry's lock is waited for while `lock` is held, so nobody waits in a circle. All this needs a
folder on a disk of this node's own, or at least one where flock works. cache_space.py makes room.
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

from scellst_ray.storage import cache_space as cache_room
from scellst_ray.storage.credentials import redacted
from scellst_ray.storage.retries import DISK_FULL, TRIES, retried

# Of an object's name: a file name has at most 255 bytes, a character up to 4.
LONGEST_NAME = 48
MRXS = ".mrxs"


class Held:
    """A local file that stays as it is until closed, or until this object or the process ends.

    Attributes:
        path: The file.
        name: Its URI as messages may show it, without credentials.
    """

    def __init__(self, path: Path, name: str, lock: int | None = None) -> None:
        """Take over the descriptor of a lock file; None for a file that is local anyway."""
        self.path, self.name = path, name
        self._let_go = None if lock is None else weakref.finalize(self, _let_go, lock)

    @property
    def is_copy(self) -> bool:
        """Whether the file lies in the cache."""
        return self._let_go is not None

    def close(self) -> None:
        """Let the file go: from now on it may be dropped. Closing twice is no error."""
        if self._let_go is not None:
            self._let_go()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the file go."""
        self.close()


def _let_go(lock: int) -> None:
    cache_room.mark_used(lock)
    os.close(lock)


def hold(uri: str) -> Held:
    """Return a local file with the content of `uri`, and keep it from being dropped.

    A remote file is downloaded unless this node has it; a local one is itself. Close the file
    first, then what this returns.

    Args:
        uri: Local path or fsspec URI of a file.

    Raises:
        FileNotFoundError: there is nothing under `uri`.
        PermissionError: it may not be read.
        ConnectionError: the store kept failing, or the object kept changing.
        OSError: the disk is full, the cache's folder cannot be used, or another error of the store.
        ValueError: $SCELLST_RAY_CACHE_GB is no size.
    """
    fs, path = fsspec.core.url_to_fs(uri)
    if isinstance(fs, LocalFileSystem):
        if not Path(path).exists():
            message = f"{uri}: no such file"
            raise FileNotFoundError(message)
        return Held(Path(path), uri)
    entry = _asked(fs, str(path), uri)
    for _ in range(TRIES):
        with ExitStack() as stack:
            lock = cache_room.opened(entry.lock)
            held = stack.enter_context(Held(entry.file, entry.name, lock))
            cache_room.take(lock, fcntl.LOCK_SH, entry.lock)
            if entry.is_whole():
                cache_room.mark_used(lock)
                stack.pop_all()
                return held
            cache_room.take(lock, fcntl.LOCK_EX, entry.lock)
            if not entry.is_whole():
                entry = _fetched(entry)
        # Let go for a moment: it may be dropped again, and the object may be another one.
    message = f"{entry.name}: changed, or was dropped, {TRIES} times while it was copied"
    raise ConnectionError(message)


_PINNED: dict[Path, Held] = {}


def pinned(uri: str) -> Path:
    """Return a local file with the content of `uri` that stays until this process ends.

    For the few files, such as weights, whose readers cannot be asked to close them.

    Raises:
        OSError: as `hold` does.
    """
    held = hold(uri)
    if held.is_copy:
        _PINNED.setdefault(held.path, held)
    return held.path


def identity(uri: str) -> str | None:
    """Return what changes when the content of `uri` does; None if it cannot be told.

    Whoever reads the file is told why.
    """
    fs, path = fsspec.core.url_to_fs(uri)
    try:
        if isinstance(fs, LocalFileSystem):
            found = Path(path).stat()
            return f"{found.st_size}-{found.st_mtime_ns}"
        return _asked(fs, str(path), uri).identity
    except OSError:
        return None


@dataclass(frozen=True)
class _File:
    """One of an entry's files: its path in the store, its name below the entry, and its bytes."""

    remote: str
    local: str
    num_bytes: int | None


@dataclass(frozen=True)
class _Entry:
    """An object as its store describes it now, and where its copy lies.

    Attributes:
        beside: What else it consists of, in a folder beside it.
    """

    fs: fsspec.AbstractFileSystem
    remote: str
    uri: str
    identity: str
    main: _File
    beside: tuple[_File, ...]
    root: Path

    @property
    def name(self) -> str:
        return redacted(self.uri)

    @property
    def lock(self) -> Path:
        return cache_room.lock_path(self.root, self.identity)

    @property
    def num_bytes(self) -> int:
        """Bytes of all its files; what the store does not tell counts as none."""
        return sum(file.num_bytes or 0 for file in (self.main, *self.beside))

    @property
    def folder(self) -> Path:
        return cache_room.entry_folder(self.root, self.identity, self.num_bytes)

    @property
    def file(self) -> Path:
        return self.folder / self.main.local

    @property
    def part(self) -> Path:
        return self.file.with_name(f".{self.file.name}.part")

    @property
    def beside_part(self) -> Path:
        return self.file.with_name(f".{self.file.stem}.part")

    def is_whole(self) -> bool:
        # It gets its name last, after the folder beside it.
        return self.file.is_file() and self.main.num_bytes in (None, self.file.stat().st_size)

    def parts(self) -> list[tuple[_File, Path]]:
        """Return its files and where they lie while it comes."""
        beside = [(file, self.beside_part / file.local) for file in self.beside]
        return [*beside, (self.main, self.part)]

    def give_names(self) -> None:
        """Make what came the copy."""
        if self.beside:
            self.beside_part.replace(self.file.with_suffix(""))
        self.part.replace(self.file)


def _asked(fs: fsspec.AbstractFileSystem, path: str, uri: str) -> _Entry:
    """Ask the store for an object: one request, or two for MRXS."""

    def ask() -> dict[str, Any]:
        fs.invalidate_cache(path)
        return dict(fs.info(path))

    info = retried(ask, redacted(uri))
    if info.get("type") == "directory":
        message = f"{redacted(uri)}: a folder; give a file"
        raise IsADirectoryError(message)
    beside = _beside(fs, path) if path.endswith(MRXS) else {}
    marks = [_mark(info), *(f"{name} {_mark(beside[name])}" for name in sorted(beside))]
    identity = hashlib.sha256("\n".join([uri, *marks]).encode()).hexdigest()[:32]
    name = redacted(path).rsplit("/", 1)[-1][-LONGEST_NAME:].lstrip(".") or "file"
    files = [_File(str(beside[name]["name"]), name, beside[name].get("size")) for name in beside]
    main = _File(path, name, info.get("size"))
    return _Entry(fs, path, uri, identity, main, tuple(files), cache_room.cache_root())


def _mark(info: dict[str, Any]) -> str:
    """Return what tells the content of an object from another's."""
    # Not fsspec's own `ukey`: it is the same for all versions of an http file, and for S3 depends
    # on how the object was asked for. Redirects are often signed, so to another url each time.
    mark = info.get("ETag") or info.get("etag")
    return str(mark or sorted((key, str(info[key])) for key in info if key not in ("name", "url")))


def _beside(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    """List the folder that an MRXS slide's pixels lie in, by name below it.

    Raises:
        FileNotFoundError: it is not there, or is empty.
        OSError: a name in it would lie elsewhere on a disk.
    """
    folder = path.removesuffix(MRXS) + "/"

    def ask() -> dict[str, dict[str, Any]]:
        fs.invalidate_cache(folder)
        return dict(fs.find(folder, detail=True))

    listed = retried(ask, redacted(folder)).items()
    found = {name[len(folder) :]: info for name, info in listed if name.startswith(folder)}
    if not found:
        message = f"{redacted(folder)}: nothing there; it holds the pixels of the .mrxs beside it"
        raise FileNotFoundError(message)
    for name in found:
        if ".." in name.split("/") or name.startswith("/"):
            message = f"{redacted(folder)}: {name!r} cannot be a file below it; rename the object"
            raise OSError(message)
    return found


def _fetched(entry: _Entry) -> _Entry:
    """Download an entry whose lock is held alone; return it as the store describes it afterwards.

    If that is another one, the object changed meanwhile, and what came is thrown away.
    """
    shutil.rmtree(entry.folder, ignore_errors=True)  # what a killed download left
    try:
        _download(entry)
        now = _asked(entry.fs, entry.remote, entry.uri)
        if now.identity == entry.identity:
            entry.give_names()
        return now
    finally:
        if not entry.file.exists():
            shutil.rmtree(entry.folder, ignore_errors=True)


def _download(entry: _Entry) -> None:
    """Fill the parts; if the disk runs full, once more with nothing else kept."""
    promise = (entry.root, entry.identity, entry.num_bytes, entry.name)
    for drop_all in (False, True):
        cache_room.make_room(*promise, drop_all=drop_all)
        try:
            for file, part in entry.parts():
                retried(partial(_copy, entry.fs, file, part), entry.name)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            for _, part in entry.parts():
                part.unlink(missing_ok=True)
        else:
            return
    raise cache_room.disk_full(entry.root, entry.num_bytes, entry.name)


def _copy(fs: fsspec.AbstractFileSystem, file: _File, part: Path) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    fs.get_file(file.remote, str(part))
    came = part.stat().st_size
    if file.num_bytes not in (None, came):
        message = f"{came:,} of {file.num_bytes:,} bytes came"
        raise ConnectionError(message)
