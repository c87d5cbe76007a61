"""The start of Ray, or joining it, on other people's machines: it ends in a run or in a line.

The line names the variable that decides, and the remedy.
"""

import os
import socket
import sys
import threading
from types import TracebackType
from typing import Self

# Seconds that Ray may take to start or to answer.
START_S = 110.0
CONNECT_S = 10.0
FOLDERS = ("RAY_TMPDIR", "TMPDIR")


def cluster_address() -> str:
    """Return the address of the cluster to join, from RAY_ADDRESS; an empty text for none.

    Raises:
        ValueError: RAY_ADDRESS is no address that this process can join.
        ConnectionError: nothing answers there.
    """
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address in ("", "local"):
        return ""
    if address.startswith("http"):
        message = (
            f"RAY_ADDRESS is {address}, a job server: submit the command with `ray job submit`, or "
            "unset RAY_ADDRESS to run it here"
        )
        raise ValueError(message)
    if address != "auto":
        _check_answer(address)
    return address


def _check_answer(address: str) -> None:
    """Raise an error unless something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    if "//" in address or not host or not (port.isascii() and port.isdigit()):
        message = (
            f"RAY_ADDRESS is {address}; expected HOST:PORT of a Ray head, such as 10.0.0.1:6379, "
            "or auto. Correct it, or unset it to start a Ray on this machine"
        )
        raise ValueError(message)
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConnectionError(_not_joined(address, str(error))) from error


def _not_joined(address: str, reason: str) -> str:
    return (
        f"RAY_ADDRESS is {address}, and no Ray can be joined there ({reason}); start the cluster, "
        "correct RAY_ADDRESS, or unset it to start a Ray on this machine"
    )


def _not_started(reason: str) -> str:
    given = [f"{name} is {os.environ[name]}" for name in FOLDERS if os.environ.get(name)]
    place = f" ({', '.join(given)})" if given else ""
    return (
        f"Ray did not start on this machine: {reason}. Try again; if it fails again, set "
        f"RAY_TMPDIR to a short folder on a local disk, in ASCII, that you may write{place}, and "
        "check the free memory"
    )


class ExplainedStart:
    """A `with` around the start of Ray: its errors, and one that takes too long, become a line.

    Ray has no base class for what its start raises: ConnectionError, RuntimeError (of another
    version), ValueError, OSError and plain Exception occur.
    """

    def __init__(self, address: str, limit_s: float = START_S) -> None:
        """Start the clock.

        Args:
            address: Address of the cluster to join; an empty text if a local Ray starts.
            limit_s: Seconds until the process is ended.
        """
        self.address = address
        self.limit_s = limit_s
        self.timer = threading.Timer(limit_s, self._give_up)
        self.timer.daemon = True

    def explain(self, reason: str) -> str:
        """Return the line for a reason."""
        return _not_joined(self.address, reason) if self.address else _not_started(reason)

    def __enter__(self) -> Self:
        """Begin to count the time."""
        self.timer.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Raise the error as a line.

        Raises:
            ConnectionError: Ray did not start.
        """
        self.timer.cancel()
        if not isinstance(error, Exception) or any(name in str(error) for name in FOLDERS):
            return
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConnectionError(self.explain(lines[0][:300])) from error

    def _give_up(self) -> None:
        """End the process: no other thread can interrupt Ray's C++ code."""
        line = self.explain(f"no answer in {self.limit_s:g} s")
        print(f"error: {line}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)
