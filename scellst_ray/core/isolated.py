"""Calls in processes of their own, in bounded memory: what ends a process costs one item.

For commands that look at files without Ray (`plan`, `doctor`): a slide that makes its decoder
crash, or that takes for ever, is told of and the others go on.
"""

import faulthandler
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Generic, TypeVar

from scellst_ray.core.memory_limit import limit_memory

T = TypeVar("T")
R = TypeVar("R")

# Items handed out for each process: enough to keep it busy, few enough to try anew alone.
WAITING = 2


@dataclass(frozen=True)
class Died:
    """What stands for the result of a call that ended its process."""

    reason: str


class _Timed(Generic[T, R]):
    """A function that ends its process, with the stack on stderr, if it takes too long."""

    def __init__(self, function: Callable[[T], R], timeout_s: float | None) -> None:
        self.function, self.timeout_s = function, timeout_s

    def __call__(self, item: T) -> R:
        if self.timeout_s is None:
            return self.function(item)
        # In C: it works while the interpreter is held.
        faulthandler.dump_traceback_later(self.timeout_s, exit=True, file=2)
        try:
            return self.function(item)
        finally:
            faulthandler.cancel_dump_traceback_later()


def each_isolated(
    function: Callable[[T], R],
    items: Iterable[T],
    processes: int | None = None,
    timeout_s: float | None = None,
) -> Iterator[tuple[T, R | Died]]:
    """Call a function on every item, each in one of a few processes; yield as they get done.

    Items whose process ended are tried once more, one at a time in a process that nothing else
    uses; what ends that one too is at fault.

    Args:
        function: Of a module, so that other processes find it; what it raises is raised here.
        items: Taken only as far as they are handed out.
        processes: How many; None: as many as there are CPUs.
        timeout_s: Seconds a call may take; None: for ever.
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
            yield guilty[0], Died(_reason(timeout_s))


def _until_broken(
    call: Callable[[T], R], items: Iterator[T], most: tuple[int, int], suspects: list[T]
) -> Iterator[tuple[T, R]]:
    """Yield results until the items, or a process, come to an end.

    Args:
        call: What to do with an item.
        items: Taken as far as they are handed out.
        most: Processes, and items handed out at a time.
        suspects: Filled with the items without a result: one of them ended a process.
    """
    context = multiprocessing.get_context("spawn")
    under_way: dict[Future[R], T] = {}
    done: deque[Future[R]] = deque()
    with ProcessPoolExecutor(most[0], context, limit_memory) as pool:
        while not suspects:
            for item in items:
                try:
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
        # Broken: nothing more comes, and what is done has been told.
        for future in wait(under_way).done:
            item = under_way.pop(future)
            if future.exception() is None:
                yield item, future.result()
            else:
                suspects.append(item)


def _reason(timeout_s: float | None) -> str:
    limit = "" if timeout_s is None else f", or took longer than {timeout_s:g} s"
    return f"ended the process that opened it (a crash or lack of memory){limit}"
