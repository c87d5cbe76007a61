"""Watchdog: ends this process if work takes too long, since no thread can interrupt a C call."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# After this further time faulthandler ends the process from C, without calling `expired`. That
# also works while a C call holds the interpreter.
GRACE_S = 30.0
LOOK_EVERY_S = 1.0
STDERR = 2
Expired = Callable[[float], None]


class Watchdog:
    """Time limit for pieces of work, one after another. It costs the work no time.

    A thread looks at the work once a second. Each look postpones faulthandler, which ends the
    process if the thread does not look again.
    """

    def __init__(self, expired: Expired) -> None:
        """Start without work to watch.

        Args:
            expired: Called with the limit in seconds before the process ends.
        """
        self.expired = expired
        self._limit: tuple[float, float] | None = None
        self._longest = 0.0
        self._thread: threading.Thread | None = None

    @contextmanager
    def limit(self, seconds: float | None) -> Iterator[None]:
        """End the process, with the stacks of its threads on stderr, if the block takes too long.

        Args:
            seconds: Time that the block may take; None: no limit.
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
