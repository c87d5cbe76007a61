"""The room of the node's cache: where it is, how much it may take, and what goes first.

node_cache.py says what lies where and which locks keep what from being dropped.
"""

import errno
import fcntl
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("scellst_ray")

DIR_VARIABLE, GB_VARIABLE = "SCELLST_RAY_CACHE_DIR", "SCELLST_RAY_CACHE_GB"
# Unless told otherwise: this much, but no more than half of what the disk could give. Ray stores
# no more objects on a disk that is 95 % full.
DEFAULT_BYTES, DISK_SHARE = 50 * 10**9, 0.5
_BLOCK = 512  # the unit of st_blocks


def cache_root() -> Path:
    """Return the cache's folder, which is this user's alone; made if need be."""
    parent = os.environ.get(DIR_VARIABLE) or tempfile.gettempdir()
    root = Path(parent) / f"scellst_ray_cache_{os.getuid()}"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root


def lock_path(root: Path, identity: str) -> Path:
    """Return the file whose locks say who uses an entry."""
    return root / "locks" / identity


def entry_folder(root: Path, identity: str, num_bytes: int) -> Path:
    """Return the folder of an entry's copy, which tells what there is or is to come."""
    return root / "files" / f"{identity}-{num_bytes}"


def opened(lock: Path) -> int:
    """Open a lock file, and make it if need be; return its descriptor."""
    lock.parent.mkdir(exist_ok=True)
    return os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)


def take(lock: int, how: int, path: Path) -> None:
    """Lock an open file, waiting if need be.

    Args:
        lock: Its descriptor.
        how: fcntl.LOCK_SH or LOCK_EX; a lock there is gives way to it.
        path: Its name, for messages.

    Raises:
        OSError: the filesystem knows no locks.
    """
    try:
        fcntl.flock(lock, how)
    except OSError as error:
        message = (
            f"{path}: cannot be locked ({error.strerror}); set {DIR_VARIABLE} to a folder on a "
            "disk of each node's own"
        )
        raise OSError(message) from error


def mark_used(lock: int) -> None:
    """Note that an entry is used now; left to itself, the kernel would round to its own ticks."""
    now = time.time_ns()
    os.utime(lock, ns=(now, now))


def make_room(root: Path, identity: str, num_bytes: int, name: str, *, drop_all: bool) -> None:
    """Drop what was used least recently until an entry fits, and make its folder.

    What is in use stays, even beyond the bound: a slide larger than the cache can still be read.

    Args:
        root: The cache.
        identity: The entry; its lock must be held alone.
        num_bytes: What is to come; 0 if the store does not tell.
        name: What it is, for messages.
        drop_all: Whether to keep nothing that is not in use.

    Raises:
        OSError: the disk has not enough room for it.
        ValueError: $SCELLST_RAY_CACHE_GB is no size.
    """
    with _alone(root / "lock"):
        copies = [copy for copy in _copies(root) if copy.identity != identity]
        used = sum(copy.num_bytes for copy in copies)
        room = shutil.disk_usage(root).free - sum(copy.to_come for copy in copies)
        bound = _bound(room + used)
        for copy in sorted(copies, key=lambda copy: (copy.is_whole, copy.last_use)):
            if not drop_all and used + num_bytes <= bound and num_bytes <= room:
                break
            if _dropped(root, copy):
                used, room = used - copy.num_bytes, room + copy.num_bytes
        if num_bytes > room:
            raise disk_full(root, num_bytes, name)
        if used + num_bytes > bound:
            beside = f" beside {_gb(used)} in use" if used else ""
            text = "%s: %s%s are more than the %s that %s may take; set %s"
            logger.warning(text, name, _gb(num_bytes), beside, _gb(bound), root, GB_VARIABLE)
        entry_folder(root, identity, num_bytes).mkdir(parents=True, exist_ok=True)


def disk_full(root: Path, num_bytes: int, name: str) -> OSError:
    """Return the error that says so."""
    free = shutil.disk_usage(root).free
    message = (
        f"{name}: {root} has {_gb(free)} free for its {_gb(num_bytes)} ({num_bytes:,} bytes), and "
        f"all else in this cache is in use or on its way; make room, or set {DIR_VARIABLE} to a "
        "folder on a larger disk"
    )
    return OSError(errno.ENOSPC, message)


def _bound(possible: int) -> float:
    """Return the bytes the cache may take, of those its disk could give."""
    text = os.environ.get(GB_VARIABLE)
    if not text:
        return min(DEFAULT_BYTES, DISK_SHARE * possible)
    try:
        bound = float(text) * 1e9
    except ValueError:
        bound = math.nan
    if not 0 <= bound < math.inf:
        message = f"{GB_VARIABLE}={text!r}: expected a number of gigabytes (10^9 bytes), such as 50"
        raise ValueError(message)
    return bound


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


@dataclass(frozen=True)
class _Copy:
    """What lies in an entry's folder.

    Attributes:
        identity: Of the entry.
        folder: Where it lies.
        num_bytes: What it takes, or will take.
        to_come: How many of these are not on the disk yet.
        is_whole: Whether it is complete; if not, it is coming or its downloader died.
        last_use: ns since the epoch.
    """

    identity: str
    folder: Path
    num_bytes: int
    to_come: int
    is_whole: bool
    last_use: int


def _copies(root: Path) -> list[_Copy]:
    folder = root / "files"
    found = [_described(root, path) for path in folder.iterdir()] if folder.is_dir() else []
    return [copy for copy in found if copy is not None]


def _described(root: Path, folder: Path) -> _Copy | None:
    """Describe an entry's folder; None if it is none, or was removed just now."""
    match = re.fullmatch(r"([0-9a-f]+)-(\d+)", folder.name)
    if not match:
        return None
    identity, promised = match[1], int(match[2])
    lock = lock_path(root, identity)
    last_use = lock.stat().st_mtime_ns if lock.exists() else 0
    try:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        stats = [path.stat() for path in paths]
    except FileNotFoundError:
        # A download has just failed, or was renamed: it will look otherwise now.
        return _described(root, folder) if folder.exists() else None
    is_whole = any(path.parent == folder and not path.name.startswith(".") for path in paths)
    written = sum(stat.st_blocks * _BLOCK for stat in stats)
    num_bytes = max(promised, sum(stat.st_size for stat in stats))
    to_come = 0 if is_whole else max(0, promised - written)
    return _Copy(identity, folder, num_bytes, to_come, is_whole, last_use)


def _dropped(root: Path, copy: _Copy) -> bool:
    """Drop an entry unless it is in use; return whether that was done."""
    lock = opened(lock_path(root, copy.identity))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        shutil.rmtree(copy.folder, ignore_errors=True)
        return not copy.folder.exists()
    finally:
        os.close(lock)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Be the only one on this node in the `with` block."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        take(lock, fcntl.LOCK_EX, path)
        yield
    finally:
        os.close(lock)
