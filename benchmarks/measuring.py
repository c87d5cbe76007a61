"""Measurements that several benchmarks share."""

import os
import threading
from collections.abc import Callable

import psutil


class peak_memory:  # noqa: N801 - used as a function
    """A sampler of the proportional memory (PSS) of this process and all its descendants."""

    def __init__(self, pids: list[int]) -> None:
        """Make a sampler of these processes and all their descendants."""
        self.roots, self.peak, self.stop = [os.getpid(), *pids], 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Callable[[], int]:
        """Start sampling; return a function that returns the peak so far, in bytes."""
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
