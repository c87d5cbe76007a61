"""Space of the node's cache: its folder, its highest size, and the order of dropping.

node_cache.py explains the files of the cache and the locks that keep entries from being dropped.
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

from scellst_ray.storage.private_folder import make_private_folder

logger = logging.getLogger("scellst_ray")

DIR_VARIABLE, GB_VARIABLE = "SCELLST_RAY_CACHE_DIR", "SCELLST_RAY_CACHE_GB"
# Default size: 50 GB, but at most half of the disk's space. Ray stores no more objects on a disk
# that is 95 % full.
DEFAULT_BYTES, DISK_SHARE = 50 * 10**9, 0.5
_BLOCK = 512  # the unit of st_blocks


def cache_root() -> Path:
    """Return the cache's folder, which belongs to this user alone. It is made if it is absent.

    Raises:
        OSError: it cannot be made; or it is a link, belongs to another user, or others may write to
            it, so its content cannot be trusted.
    """
    parent = Path(os.environ.get(DIR_VARIABLE) or tempfile.gettempdir())
    root = parent / f"scellst_ray_cache_{os.getuid()}"
    remedy = f"set {DIR_VARIABLE} to a folder of your own on a local disk of each node"
    make_private_folder(root, remedy)
    return root


def lock_path(root: Path, identity: str) -> Path:
    """Return the lock file of an entry: its locks show the processes that use the entry."""
    return root / "locks" / identity


def entry_folder(root: Path, identity: str, num_bytes: int) -> Path:
    """Return the folder of an entry's copy. Its name holds the bytes that it will take."""
    return root / "files" / f"{identity}-{num_bytes}"


def open_lock(lock: Path) -> int:
    """Open a lock file, making it if it is absent; return its descriptor."""
    lock.parent.mkdir(exist_ok=True)
    return os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)


def lock_file(lock: int, how: int, path: Path) -> None:
    """Lock an open file, waiting for the locks of other processes.

    Args:
        lock: Descriptor of the file.
        how: fcntl.LOCK_SH or LOCK_EX. It replaces a lock that this descriptor has.
        path: Name of the file, for messages.

    Raises:
        OSError: the filesystem has no locks.
    """
    try:
        fcntl.flock(lock, how)
    except OSError as error:
        message = (
            f"{path}: cannot be locked ({error.strerror}); set {DIR_VARIABLE} to a folder on a "
            "local disk of each node"
        )
        raise OSError(message) from error


def mark_used(lock: int) -> None:
    """Set the time of an entry's last use to now, in ns; the kernel would round to its ticks."""
    now = time.time_ns()
    os.utime(lock, ns=(now, now))


def make_room(root: Path, identity: str, num_bytes: int, name: str, *, drop_all: bool) -> None:
    """Drop the entries used least recently until a new entry fits, and make its folder.

    Entries in use stay, even beyond the limit: a slide larger than the cache can still be read.

    Args:
        root: The cache's folder.
        identity: The new entry. The caller must hold its lock alone.
        num_bytes: Bytes of the new entry; 0 if the store does not say.
        name: Name of the entry, for messages.
        drop_all: Whether to drop all entries that are not in use.

    Raises:
        OSError: the disk has not enough space for the entry.
        ValueError: $SCELLST_RAY_CACHE_GB is not a size.
    """
    with _hold_alone(root / "lock"):
        copies = [copy for copy in _copies(root) if copy.identity != identity]
        used = sum(copy.num_bytes for copy in copies)
        room = shutil.disk_usage(root).free - sum(copy.to_come for copy in copies)
        bound = _bound(room + used)
        for copy in sorted(copies, key=lambda copy: (copy.is_whole, copy.last_use)):
            if not drop_all and used + num_bytes <= bound and num_bytes <= room:
                break
            if _drop(root, copy):
                used, room = used - copy.num_bytes, room + copy.num_bytes
        if num_bytes > room:
            raise disk_full(root, num_bytes, name)
        if used + num_bytes > bound:
            in_use = f", next to {_gb(used)} in use," if used else ""
            text = "%s: its %s%s exceed the %s that %s may take; set %s to a larger size"
            logger.warning(text, name, _gb(num_bytes), in_use, _gb(bound), root, GB_VARIABLE)
        entry_folder(root, identity, num_bytes).mkdir(parents=True, exist_ok=True)


def disk_full(root: Path, num_bytes: int, name: str) -> OSError:
    """Return the error that says that the cache's disk is full."""
    free = shutil.disk_usage(root).free
    message = (
        f"{name}: {root} has {_gb(free)} free for its {_gb(num_bytes)} ({num_bytes:,} bytes), and "
        f"all other files of this cache are in use or being downloaded; free disk space, or set "
        f"{DIR_VARIABLE} to a folder on a larger disk"
    )
    return OSError(errno.ENOSPC, message)


def _bound(possible: int) -> float:
    """Return the bytes that the cache may take, given the bytes that its disk could provide."""
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
    """Content of an entry's folder.

    Attributes:
        identity: Identity of the entry.
        folder: Its folder.
        num_bytes: Bytes that it takes, or will take.
        to_come: Number of these bytes that are not on the disk yet.
        is_whole: Whether it is complete. If not, it is being downloaded, or its downloader died.
        last_use: Time of its last use, ns since the epoch.
    """

    identity: str
    folder: Path
    num_bytes: int
    to_come: int
    is_whole: bool
    last_use: int


def _copies(root: Path) -> list[_Copy]:
    folder = root / "files"
    copies = [_describe(root, path) for path in folder.iterdir()] if folder.is_dir() else []
    return [copy for copy in copies if copy is not None]


def _describe(root: Path, folder: Path) -> _Copy | None:
    """Describe an entry's folder; None if it is no such folder, or was just removed."""
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
        # A download has just failed or got its name, so look again.
        return _describe(root, folder) if folder.exists() else None
    is_whole = any(path.parent == folder and not path.name.startswith(".") for path in paths)
    written = sum(stat.st_blocks * _BLOCK for stat in stats)
    num_bytes = max(promised, sum(stat.st_size for stat in stats))
    to_come = 0 if is_whole else max(0, promised - written)
    return _Copy(identity, folder, num_bytes, to_come, is_whole, last_use)


def _drop(root: Path, copy: _Copy) -> bool:
    """Drop an entry unless it is in use; return whether it is gone."""
    lock = open_lock(lock_path(root, copy.identity))
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
def _hold_alone(path: Path) -> Iterator[None]:
    """Hold a lock file alone inside a `with`: one process of this node at a time."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        lock_file(lock, fcntl.LOCK_EX, path)
        yield
    finally:
        os.close(lock)
