"""Keep lines of Ray's own code off the terminal, and let all others appear above the bars."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from scellst_ray.core import ray_lines
from scellst_ray.core.lost_process import explain_lost_process

STDERR = 2
# Seconds that the filter may take to write what is left.
END_S = 5.0
# Errors that the command line tells in one line, and ends of a process on purpose.
_TOLD = (ValueError, OSError, ImportError, KeyboardInterrupt, SystemExit)


class QuietStderr:
    """A `with` that holds back what Ray's C++ code in this process writes to standard error.

    Python's `sys.stderr` writes to the terminal as before, so bars and log lines are not delayed.
    Descriptor 2, to which C++ code writes, is a pipe to a process that filters lines. They are
    shown at the end if an error leaves the `with` as a traceback, or if this process dies.

    Where another program has taken `sys.stderr`, as pytest does, this does nothing.
    """

    def __init__(self) -> None:
        """Do nothing yet."""
        self.stderr: TextIO | None = None

    def __enter__(self) -> None:
        """Start the filter."""
        if sys.stderr is None:  # it was closed, and Ray does not start without one
            sys.stderr = Path(os.devnull).open("w", encoding="utf-8")
        stderr = sys.__stderr__
        if stderr is None or sys.stderr is not stderr or stderr.fileno() != STDERR:
            return
        stderr.flush()
        terminal = os.dup(STDERR)
        try:
            self.filter = _start_filter(terminal)
        except OSError:  # no further process may be started: then Ray's lines are seen
            os.close(terminal)
            return
        self.stderr, self.terminal = stderr, terminal
        # Left open for threads that still write when the process ends.
        sys.stderr = open(
            terminal,
            "w",
            buffering=1,
            encoding=stderr.encoding,
            errors=stderr.errors,
            closefd=False,
        )

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Put standard error back in its place, and wait until the filter has written all."""
        if self.stderr is None:
            return
        is_told = error is None or isinstance(error, _TOLD) or explain_lost_process(error)
        with suppress(OSError):  # the filter was ended from outside, or the terminal is gone
            os.write(STDERR, ray_lines.END if is_told else ray_lines.CRASH)
            sys.stderr.flush()
        sys.stderr = self.stderr
        os.dup2(self.terminal, STDERR)
        _await(self.filter)


def _start_filter(terminal: int) -> subprocess.Popen[bytes]:
    """Put a pipe to a new filter in the place of descriptor 2."""
    reading, writing = os.pipe()
    try:
        # -I and -S: it starts in 15 ms. In a session of its own, Ctrl-C does not reach it.
        command = [sys.executable, "-I", "-S", str(Path(ray_lines.__file__))]
        lines = subprocess.Popen(  # noqa: S603 - our own file
            command, stdin=reading, stdout=terminal, stderr=terminal, start_new_session=True
        )
        os.dup2(writing, STDERR)
    finally:
        os.close(reading)
        os.close(writing)
    return lines


def _await(lines: subprocess.Popen[bytes]) -> None:
    """Wait for the filter; let it go on if a child of this process keeps its pipe open."""
    with suppress(subprocess.TimeoutExpired):
        lines.wait(END_S)
