"""Ends this process if work takes too long: no thread can interrupt a call into C."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# After this the process ends without a word to `expired`, in C: whatever holds the interpreter.
GRACE_S = 30.0
LOOK_EVERY_S = 1.0
STDERR = 2
Expired = Callable[[float], None]


class Watchdog:
    """Watches one piece of work after another, which costs them nothing.

    A thread looks once a second, and each time postpones what faulthandler does when the thread
    does not come to look again.
    """

    def __init__(self, expired: Expired) -> None:
        """Watch nothing yet.

        Args:
            expired: Called, with the seconds there were, before the process ends.
        """
        self.expired = expired
        self._limit: tuple[float, float] | None = None
        self._longest = 0.0
        self._thread: threading.Thread | None = None

    @contextmanager
    def limit(self, seconds: float | None) -> Iterator[None]:
        """End the process, with the stacks of its threads on stderr, if the block takes longer.

        Args:
            seconds: How long it may take; None: for ever.
        """
        if seconds is None:
            yield
            return
        self._longest = max(self._longest, seconds)
        self._limit = time.monotonic() + seconds, seconds
        if self._thread is None:
            self._look()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        try:
            yield
        finally:
            self._limit = None

    def _watch(self) -> None:
        while True:
            time.sleep(min(LOOK_EVERY_S, self._longest / 10))
            self._look()

    def _look(self) -> None:
        left, limit = self._longest, self._limit
        if limit is not None:
            left = limit[0] - time.monotonic()
            if left <= 0:
                faulthandler.dump_traceback(file=STDERR)
                self.expired(limit[1])
                os._exit(1)
        faulthandler.dump_traceback_later(left + GRACE_S, exit=True, file=STDERR)
