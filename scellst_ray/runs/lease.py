"""The lease of a run folder: two drivers on one run would do each tile twice, so one is refused.

`lease.json` names its holder, who renews it every third of its time and removes it at the end. What
a dead holder left is taken over: at once if the holder was a process of this host that is no more,
or if its time was over long ago; else after it has gone unrenewed for as long as it lasts.

Clocks of two hosts are not trusted to agree within MAX_SKEW_S: whether a lease of another host is
alive is found by watching it, on the watcher's own clock. So a second driver on another host is
refused when it sees the first renew, after a third of the lease's time.

On local and network disks the file is read and changed under its own lock (flock): of two drivers
that start together exactly one wins. Where there is no such lock, as on object storage, a driver
writes its lease, waits SETTLE_S and reads it back: of two that start together the last to write
wins. A write that took longer than that would let both in, until the first finds at its next
renewal that it has lost, and stops. Of the receipts of both, the last of each tile counts.
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
from scellst_ray.runs.records import LeaseInfo

NAME = "lease.json"
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
        seconds: How long the lease lasts without being renewed.

    Raises:
        LeaseError: another driver holds it and is alive.
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
        """Start without it; `seconds` is how long it lasts without being renewed."""
        self.uri, self.seconds = storage.join(run_uri, NAME), seconds
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
        """Take the lease, from a dead holder if need be.

        Raises:
            LeaseError: another driver holds it and is alive.
        """
        seen: LeaseInfo | None = None
        since = time.monotonic()
        while (found := self._try(seen, time.monotonic() - since)) is not None:
            if seen is None:
                seen, since = found, time.monotonic()
                logger.warning("%s; waiting to see if it is alive", self._told(seen))
            time.sleep(min(1.0, self.seconds / 10))

    def check(self) -> None:
        """Make sure that the lease is still ours: to be called before writing what counts.

        Raises:
            LeaseError: somebody else has taken or removed it.
        """
        if self._lost is None and time.monotonic() - self._renewed_at > self.seconds / 2:
            # The thread that renews was held up, as the whole process may have been.
            self._renew()
        if self._lost is not None:
            raise self._lost

    def keep(self) -> None:
        """Renew the lease until it is released or lost."""
        while not self._ended.wait(self.seconds / 3) and self._lost is None:
            try:
                self._renew()
            except OSError as error:
                logger.warning("%s: not renewed, trying again: %s", self.uri, error)

    def release(self) -> None:
        """Give the lease back, if it is still ours."""
        self._ended.set()
        try:
            with self._changing, _exclusive(self.uri) as file:
                if self._is_ours(_content(file.read())):
                    file.remove()
        except OSError as error:
            logger.warning("%s: not removed, it will run out: %s", self.uri, error)

    def _try(self, seen: LeaseInfo | None, unrenewed_s: float) -> LeaseInfo | None:
        """Take the lease if it is free; return None, or what is held by who may be dead.

        Args:
            seen: What it held when the watch began; None before.
            unrenewed_s: Seconds since then.

        Raises:
            LeaseError: another driver holds it and is alive.
        """
        with _exclusive(self.uri) as file:
            found = _content(file.read())
            if found is not None and not is_over(found):
                if found["machine"] == self._holder["machine"] or (seen and found != seen):
                    raise LeaseError(self._refusal(found))
                if seen is None or unrenewed_s < found["seconds"]:
                    return found
            if found is not None:
                logger.warning("%s, and is dead; going on in its place", self._told(found))
            self._acquired = _time(0)
            self._write(file)
        if not file.is_locked:
            time.sleep(SETTLE_S)
            found = _content(file.read())
            if not self._is_ours(found):
                raise LeaseError(self._refusal(found))
        return None

    def _renew(self) -> None:
        with self._changing, _exclusive(self.uri) as file:
            if self._ended.is_set():
                return
            found = _content(file.read())
            if self._is_ours(found):
                self._write(file)
                return
        message = (
            f"{self._told(found)}; it was ours since {self._acquired}, so this driver stops. "
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

    def _told(self, found: LeaseInfo | None) -> str:
        """Say who holds the lease."""
        if found is None:
            return f"{self.uri}: nobody holds the lease of this run, its file was removed"
        return (
            f"{self.uri}: process {found['pid']} on {found['host']} has held the lease of this run "
            f"since {found['acquired']}, until {found['expires']} if it does not renew it"
        )

    def _refusal(self, found: LeaseInfo | None) -> str:
        return (
            f"{self._told(found)}; wait until that driver ends, or stop it. If it is surely dead, "
            f"wait until then, or remove {self.uri}, and run the same command again"
        )


class _Locked:
    """The lease's file on a disk, changed in place by whoever has it locked."""

    is_locked = True

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor, self.path = descriptor, path

    def read(self) -> bytes:
        return os.pread(self.descriptor, 1 << 16, 0)

    def write(self, content: bytes) -> None:
        # In this order a full disk, which refuses to write, leaves the lease as it was.
        os.pwrite(self.descriptor, content, 0)
        os.ftruncate(self.descriptor, len(content))

    def remove(self) -> None:
        self.path.unlink()


class _Unlocked:
    """The lease's file where nothing can be locked."""

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
    """Give the lease's file to one process at a time, where the storage can do that."""
    fs, path = storage.resolve(uri)
    descriptor = _open_locked(Path(path)) if storage.is_local(uri) else None
    if descriptor is None:
        yield _Unlocked(fs, path)
        return
    try:
        yield _Locked(descriptor, Path(path))
        if not os.fstat(descriptor).st_size:
            Path(path).unlink()  # it was not there before
    finally:
        os.close(descriptor)


def _open_locked(path: Path) -> int | None:
    """Open and lock a file, creating it if need be; None where the disk knows no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            os.close(descriptor)
            return None
        # Whoever had it locked before may have removed it: then the name is no longer this file's.
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _content(text: bytes) -> LeaseInfo | None:
    """Return what a lease says; None if it is empty, or cut off where its writer was killed."""
    try:
        found: LeaseInfo = json.loads(text)
    except ValueError:
        return None
    return found


def is_over(found: LeaseInfo) -> bool:
    """Tell whether a lease is over for certain."""
    here = found["machine"] == _machine()
    if here and _process(found["pid"]) not in (found["process"], ""):
        return True
    late = datetime.now(UTC) - datetime.fromisoformat(found["expires"])
    return late > timedelta(seconds=0 if here else MAX_SKEW_S)


def _time(ahead_s: float) -> str:
    """Return the time so many seconds from now."""
    return (datetime.now(UTC) + timedelta(seconds=ahead_s)).isoformat(timespec="milliseconds")


def _machine() -> str:
    """Return what processes that see each other's pids, and the same clock, have in common.

    A host's name is not enough: containers may share it, and pids of another one mean nothing here.
    """
    parts = [socket.gethostname()]
    for name in ("sys/kernel/random/boot_id", "self/ns/pid"):
        path = Path("/proc", name)
        if path.exists():
            parts.append(path.readlink().name if path.is_symlink() else path.read_text().strip())
    return " ".join(parts)


def _process(pid: int) -> str | None:
    """Return what tells a process from others that had its number; None if it is dead."""
    try:
        with suppress(PermissionError):  # it is another user's
            os.kill(pid, 0)
        stat = Path("/proc", str(pid), "stat").read_text(encoding="utf-8")
    except ProcessLookupError:
        return None
    except OSError:
        return ""  # this system does not say
    state, *_, started = stat.rpartition(")")[2].split()[:20]
    return None if state in "ZX" else started
