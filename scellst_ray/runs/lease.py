"""The lease of a run folder: a note that says which driver works on the run.

Two drivers on one run would do each tile twice, so the second one is refused. `lease.json` names
its holder. The holder renews it after each third of its duration and removes it at the end. The
lease of a dead holder is taken over:

- at once if the holder was a process of this host that has ended,
- at once if the lease expired more than MAX_SKEW_S ago,
- otherwise after it has not been renewed for its whole duration.

Clocks of two hosts may differ by up to MAX_SKEW_S. So a driver watches the lease of another host on
its own clock. It is refused as soon as it sees a renewal, after a third of the lease's duration.

On local and network disks the file is read and changed under its own lock (flock). Of two drivers
that start together exactly one wins. Object storage has no such lock. A driver writes its lease
there, waits SETTLE_S and reads it back, so that the last one to write wins. A write that takes
longer than SETTLE_S lets both in. The first one then finds at its next renewal that it has lost,
and stops. Of the receipts of both, the last one of each tile counts.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec

from scellst_ray import storage
from scellst_ray.core.signals import clean_exit_on_sigterm
from scellst_ray.runs.documents import parse_lease, warn_once
from scellst_ray.runs.folder import LEASE_FILE
from scellst_ray.runs.records import LeaseInfo

LEASE_S = 60.0
MAX_SKEW_S = 600.0
SETTLE_S = 2.0
logger = logging.getLogger(__name__)


class LeaseError(ValueError):
    """Another driver works on the run."""


@contextmanager
def hold_lease(run_uri: str, seconds: float = LEASE_S) -> Iterator["Lease"]:
    """Hold a run's lease inside a `with`.

    Args:
        run_uri: The run folder.
        seconds: Duration of the lease if it is not renewed.

    Raises:
        LeaseError: another driver holds the lease and is alive.
    """
    lease = Lease(run_uri, seconds)
    with clean_exit_on_sigterm():
        lease.acquire()
        threading.Thread(target=lease.keep, name="lease", daemon=True).start()
        try:
            yield lease
        finally:
            lease.release()


class Lease:
    """One driver's lease of a run."""

    def __init__(self, run_uri: str, seconds: float = LEASE_S) -> None:
        """Start without the lease; `seconds` is its duration if it is not renewed."""
        self.uri, self.seconds = storage.join(run_uri, LEASE_FILE), seconds
        self._holder = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "process": _process(os.getpid()),
        }
        self._acquired = ""
        self._renewed_at = 0.0
        self._lost: LeaseError | None = None
        self._ended = threading.Event()
        self._changing = threading.Lock()

    def acquire(self) -> None:
        """Take the lease, also from a dead holder.

        Raises:
            LeaseError: another driver holds the lease and is alive.
        """
        seen: LeaseInfo | None = None
        since = time.monotonic()
        while (found := self._try(seen, time.monotonic() - since)) is not None:
            if seen is None:
                seen, since = found, time.monotonic()
                logger.warning("%s; waiting to see whether it is alive", self._describe(seen))
            time.sleep(min(1.0, self.seconds / 10))

    def check(self) -> None:
        """Make sure that the lease is still ours. Call it before writing anything that counts.

        Raises:
            LeaseError: another driver has taken the lease, or its file was removed.
        """
        if self._lost is None and time.monotonic() - self._renewed_at > self.seconds / 2:
            # The thread that renews was held up; the whole process may have been.
            self._renew()
        if self._lost is not None:
            raise self._lost

    def keep(self) -> None:
        """Renew the lease until it is released or lost."""
        while not self._ended.wait(self.seconds / 3) and self._lost is None:
            try:
                self._renew()
            except OSError as error:
                logger.warning(
                    "%s: the lease is not renewed, the next try follows: %s", self.uri, error
                )

    def release(self) -> None:
        """Remove the lease, if it is still ours."""
        self._ended.set()
        try:
            with self._changing, _exclusive(self.uri) as file:
                if self._is_ours(_content(file.read(), self.uri)):
                    file.remove()
        except OSError as error:
            logger.warning("%s: the lease is not removed, it will expire: %s", self.uri, error)

    def _try(self, seen: LeaseInfo | None, unrenewed_s: float) -> LeaseInfo | None:
        """Take the lease if it is free; return the lease of a holder that may be dead, else None.

        Args:
            seen: The lease when the watch began; None before the watch.
            unrenewed_s: Seconds since the watch began.

        Raises:
            LeaseError: another driver holds the lease and is alive.
        """
        with _exclusive(self.uri) as file:
            found = _content(file.read(), self.uri)
            if found is not None and not is_over(found):
                if found["machine"] == self._holder["machine"] or (seen and found != seen):
                    raise LeaseError(self._refusal(found))
                if seen is None or unrenewed_s < found["seconds"]:
                    return found
            if found is not None:
                logger.warning("%s; it is dead, so this driver takes over", self._describe(found))
            self._acquired = _time(0)
            self._write(file)
        if not file.is_locked:
            time.sleep(SETTLE_S)
            found = _content(file.read(), self.uri)
            if not self._is_ours(found):
                raise LeaseError(self._refusal(found))
        return None

    def _renew(self) -> None:
        with self._changing, _exclusive(self.uri) as file:
            if self._ended.is_set():
                return
            found = _content(file.read(), self.uri)
            if self._is_ours(found):
                self._write(file)
                return
        message = (
            f"{self._describe(found)}; it was ours since {self._acquired}, so this driver stops. "
            "Nothing that it has logged is lost"
        )
        logger.error(message)
        self._lost = LeaseError(message)

    def _write(self, file: "_Locked | _Unlocked") -> None:
        now = time.monotonic()
        times = {"acquired": self._acquired, "renewed": _time(0), "expires": _time(self.seconds)}
        lasts = {"seconds": self.seconds}
        file.write(json.dumps(self._holder | times | lasts, indent=2).encode())
        self._renewed_at = now

    def _is_ours(self, found: LeaseInfo | None) -> bool:
        return found is not None and found["token"] == self._holder["token"]

    def _describe(self, found: LeaseInfo | None) -> str:
        """Return a text that says who holds the lease."""
        if found is None:
            return f"{self.uri}: nobody holds the lease of this run; its file was removed"
        return (
            f"{self.uri}: process {found['pid']} on {found['host']} has held the lease of this run "
            f"since {found['acquired']}; it expires at {found['expires']} unless it is renewed"
        )

    def _refusal(self, found: LeaseInfo | None) -> str:
        return (
            f"{self._describe(found)}. Wait until that driver ends, or stop it. If it is "
            f"certainly dead, wait until the lease expires or remove {self.uri}. Then run the same "
            "command again"
        )


class _Locked:
    """The lease's file on a disk, changed in place by the process that has locked it."""

    is_locked = True

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor, self.path = descriptor, path

    def read(self) -> bytes:
        return os.pread(self.descriptor, 1 << 16, 0)

    def write(self, content: bytes) -> None:
        # A full disk refuses to write; in this order it leaves the lease as it was.
        os.pwrite(self.descriptor, content, 0)
        os.ftruncate(self.descriptor, len(content))

    def remove(self) -> None:
        self.path.unlink()


class _Unlocked:
    """The lease's file on a storage without locks."""

    is_locked = False

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self.fs, self.path = fs, path

    def read(self) -> bytes:
        try:
            return bytes(self.fs.cat_file(self.path))
        except FileNotFoundError:
            return b""

    def write(self, content: bytes) -> None:
        self.fs.pipe_file(self.path, content)

    def remove(self) -> None:
        self.fs.rm_file(self.path)


@contextmanager
def _exclusive(uri: str) -> Iterator[_Locked | _Unlocked]:
    """Give the lease's file to one process at a time, if the storage has locks."""
    fs, path = storage.resolve(uri)
    descriptor = _open_locked(Path(path)) if storage.is_local(uri) else None
    if descriptor is None:
        yield _Unlocked(fs, path)
        return
    try:
        yield _Locked(descriptor, Path(path))
        if not os.fstat(descriptor).st_size:
            Path(path).unlink()  # it did not exist before
    finally:
        os.close(descriptor)


def _open_locked(path: Path) -> int | None:
    """Open and lock a file, creating it if it is absent; return None on a disk without locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            os.close(descriptor)
            return None
        # The process that had locked it may have removed it: the name is then another file's.
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _content(text: bytes, uri: str) -> LeaseInfo | None:
    """Return the content of a lease; None if it is empty or was cut off when its writer died."""
    try:
        return parse_lease(text, uri)
    except storage.DamagedFileError as error:
        if text:
            warn_once(f"{error}; it counts as no lease")
        return None


def is_over(found: LeaseInfo) -> bool:
    """Return whether a lease is certainly over."""
    here = found["machine"] == _machine()
    if here and _process(found["pid"]) not in (found["process"], ""):
        return True
    late = datetime.now(UTC) - datetime.fromisoformat(found["expires"])
    return late > timedelta(seconds=0 if here else MAX_SKEW_S)


def _time(ahead_s: float) -> str:
    """Return the UTC time `ahead_s` seconds from now."""
    return (datetime.now(UTC) + timedelta(seconds=ahead_s)).isoformat(timespec="milliseconds")


def _machine() -> str:
    """Return a name that processes share if they see each other's pids and the same clock.

    A host's name is not enough: containers may share it, and the pids of another container mean
    nothing in this one.
    """
    parts = [socket.gethostname()]
    for name in ("sys/kernel/random/boot_id", "self/ns/pid"):
        path = Path("/proc", name)
        if path.exists():
            parts.append(path.readlink().name if path.is_symlink() else path.read_text().strip())
    return " ".join(parts)


def _process(pid: int) -> str | None:
    """Return the start time of a process, which a later one of its pid does not share.

    None if the process is dead; empty if the system does not say.
    """
    try:
        with suppress(PermissionError):  # the process is another user's
            os.kill(pid, 0)
        stat = Path("/proc", str(pid), "stat").read_text(encoding="utf-8")
    except ProcessLookupError:
        return None
    except OSError:
        return ""
    state, *_, started = stat.rpartition(")")[2].split()[:20]
    return None if state in "ZX" else started
