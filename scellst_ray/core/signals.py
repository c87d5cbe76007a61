"""Clean exit on SIGTERM (batch systems, `ray job stop`, preempted nodes) and SIGINT (Ctrl-C)."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Presses of Ctrl-C within this time are one, so that they do not interrupt the clean-up.
ONE_PRESS_S = 3.0


class Interrupts:
    """The presses of Ctrl-C inside `catch_sigint`.

    Attributes:
        came: Whether there was one.
    """

    def __init__(self) -> None:
        """Start without a press."""
        self.came = False
        self.last = -ONE_PRESS_S

    def receive(self, _number: int, _frame: object) -> None:
        """Raise KeyboardInterrupt, unless the last press was a moment ago."""
        now, last = time.monotonic(), self.last
        self.came, self.last = True, now
        if now - last >= ONE_PRESS_S:
            raise KeyboardInterrupt


@contextmanager
def catch_sigint() -> Iterator[Interrupts]:
    """Count presses of Ctrl-C inside a `with`; several within 3 s raise one KeyboardInterrupt.

    Libraries may turn KeyboardInterrupt into other errors; `came` tells them from errors of their
    own. Outside the main thread, which alone may set handlers, this does nothing.
    """
    interrupts = Interrupts()
    before = signal.getsignal(signal.SIGINT)
    # A shell without job control starts commands in the background with SIGINT ignored.
    if not _in_main_thread() or before is signal.SIG_IGN:
        yield interrupts
        return
    signal.signal(signal.SIGINT, interrupts.receive)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


@contextmanager
def start_without_sigint() -> Iterator[None]:
    """Let processes that start inside a `with` not see Ctrl-C; their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def clean_exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit(143) inside a `with`, so that enclosing blocks clean up.

    After the first SIGTERM all later ones are ignored, also when this block has ended: the blocks
    around it are still cleaning up. Outside the main thread, which alone may set handlers, this
    does nothing.
    """
    before = signal.getsignal(signal.SIGTERM)
    catch_sigterm()
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN and _in_main_thread():
            # None: a handler that was not set from Python, which cannot be set again.
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def catch_sigterm() -> None:
    """Set the handler again where a library has replaced it, unless SIGTERM has arrived already."""
    if _in_main_thread() and signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _exit)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _exit(number: int, _frame: object) -> None:
    """Exit cleanly on the first SIGTERM; ignore repeated ones so that they cannot interrupt it."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)
