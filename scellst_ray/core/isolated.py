"""Calls in separate processes of limited memory: an item that ends its process costs only itself.

Commands that read files without Ray use it (`plan`, `doctor`). A slide whose decoder crashes or
hangs is reported, and the work on all other slides goes on.
"""

import faulthandler
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from scellst_ray.core.memory_limit import limit_memory
from scellst_ray.core.signals import start_without_sigint

T = TypeVar("T")
R = TypeVar("R")

# Items handed out per process: enough to keep it busy, few enough to try each again alone.
WAITING = 2


@dataclass(frozen=True)
class ProcessDeath:
    """Result of a call that ended its process.

    Attributes:
        reason: Why the process ended, for messages.
    """

    reason: str


class _Timed(Generic[T, R]):
    """A function that ends its process, with the stack on stderr, if it takes too long."""

    def __init__(self, function: Callable[[T], R], timeout_s: float | None) -> None:
        self.function, self.timeout_s = function, timeout_s

    def __call__(self, item: T) -> R:
        if self.timeout_s is None:
            return self.function(item)
        # It works from C, also while a C call holds the interpreter.
        faulthandler.dump_traceback_later(self.timeout_s, exit=True, file=2)
        try:
            return self.function(item)
        finally:
            faulthandler.cancel_dump_traceback_later()


def map_isolated(
    function: Callable[[T], R],
    items: Iterable[T],
    processes: int | None = None,
    timeout_s: float | None = None,
) -> Iterator[tuple[T, R | ProcessDeath]]:
    """Call a function on each item in one of several processes; yield items with their results.

    Results come in the order in which they are done. When a process ends, all items that it may
    have worked on are tried again, one at a time in a process of its own. An item that ends this
    process too gives a ProcessDeath.

    Args:
        function: A function of a module, so that other processes find it. Its exceptions are
            raised here.
        items: The items. They are taken only when they are handed out.
        processes: Number of processes; None: the number of CPUs.
        timeout_s: Seconds that a call may take; None: no limit.
    """
    num = processes or os.cpu_count() or 1
    call, rest = _Timed(function, timeout_s), iter(items)
    while True:
        suspects: list[T] = []
        yield from _until_broken(call, rest, (num, num * WAITING), suspects)
        if not suspects:
            return
        alone = iter(suspects)
        while True:
            guilty: list[T] = []
            yield from _until_broken(call, alone, (1, 1), guilty)
            if not guilty:
                break
            yield guilty[0], ProcessDeath(_reason(timeout_s))


def _until_broken(
    call: Callable[[T], R], items: Iterator[T], most: tuple[int, int], suspects: list[T]
) -> Iterator[tuple[T, R]]:
    """Yield results until all items are done or a process ends.

    Args:
        call: The function to call on an item.
        items: The items. They are taken only when they are handed out.
        most: Number of processes, and number of items handed out at a time.
        suspects: Filled with the items without a result: one of them ended a process.
    """
    under_way: dict[Future[R], T] = {}
    done: deque[Future[R]] = deque()
    with _pool(most[0]) as pool:
        while not suspects:
            for item in items:
                try:
                    with start_without_sigint():
                        under_way[pool.submit(call, item)] = item
                except BrokenProcessPool:
                    suspects.append(item)
                    break
                if len(under_way) >= most[1]:
                    break
            if not under_way:
                return
            done.extend(wait(under_way, return_when=FIRST_COMPLETED).done)
            while done:
                future = done.popleft()
                item = under_way.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    suspects.append(item)
                else:
                    yield item, future.result()
        # The pool is broken: no more results come. Collect those that are done.
        for future in wait(under_way).done:
            item = under_way.pop(future)
            if future.exception() is None:
                yield item, future.result()
            else:
                suspects.append(item)


@contextmanager
def _pool(num: int) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of processes. On an error, such as Ctrl-C, end them without waiting for calls."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(num, multiprocessing.get_context("spawn"), limit_memory)
    is_done = False
    try:
        yield pool
        is_done = True
    finally:
        if not is_done:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
        pool.shutdown(wait=is_done, cancel_futures=True)


def _reason(timeout_s: float | None) -> str:
    limit = "" if timeout_s is None else f", or took longer than {timeout_s:g} s"
    return f"ended the process that opened it (a crash or lack of memory){limit}"
