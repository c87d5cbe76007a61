"""Clean exit on SIGTERM, which batch systems, `ray job stop` and preempted nodes send first."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
