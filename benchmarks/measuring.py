"""What several benchmarks measure with."""

import os
import threading
from collections.abc import Callable

import psutil


class peak_memory:  # noqa: N801 - used as a function
    """Sample the summed proportional memory of this process, its children and theirs."""

    def __init__(self, pids: list[int]) -> None:
        """Watch these processes and whatever they start."""
        self.roots, self.peak, self.stop = [os.getpid(), *pids], 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Callable[[], int]:
        """Start sampling; the value is a function that returns the peak so far, in bytes."""
        self.thread.start()
        return lambda: self.peak

    def __exit__(self, *_: object) -> None:
        """Stop sampling."""
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(1.0):
            total = 0
            for process in _family(self.roots):
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.peak = max(self.peak, total)


def _family(roots: list[int]) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for pid in roots:
        try:
            process = psutil.Process(pid)
            found |= {process, *process.children(recursive=True)}
        except psutil.NoSuchProcess:
            continue
    return found
