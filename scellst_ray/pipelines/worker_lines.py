"""What the driver shows of the lines that Ray's other processes write."""

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray._private import ray_logging
from ray._private import worker as ray_worker

from scellst_ray.core.ray_lines import is_of_ray

# The name under which Ray adds its own printing of lines.
HANDLER = "ray_print_logs"
# Lines of this package, which say themselves what they are about: text or JSON (core/logs.py).
_OURS = re.compile(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ |\{"time": ')
# In lines of a raylet that tell what it did.
INFO = ":info_message:"

Lines = dict[str, Any]
Show = Callable[[Lines, bool], None]


def filter_worker_lines() -> None:
    """Let the driver print lines of other processes without those that tell nothing to a user.

    Call it after `ray.init`; it lasts until `ray.shutdown`.

    Assumption: Ray prints them by a handler with the name HANDLER, which takes a dict with pid,
    lines and is_err, and by the function `print_to_stdstream`, which prints with or without the
    name of the process.
    """
    dispatcher = ray_logging.global_worker_stdstream_dispatcher
    if any(name == HANDLER for name, _ in dispatcher.handlers):
        dispatcher.remove_handler(HANDLER)
        dispatcher.add_handler(HANDLER, lambda batch: show_lines(batch, _print))


def _print(batch: Lines, is_ours: bool) -> None:  # noqa: FBT001 - as `Show`
    if is_ours:
        # Ray would take lines that differ in numbers for one: those of slides S1 and S2.
        print("\n".join(batch["lines"]), file=sys.stderr if batch["is_err"] else sys.stdout)
    else:
        ray_worker.print_to_stdstream(batch, ignore_prefix=False)


def show_lines(batch: Lines, show: Show) -> None:
    """Show lines of one process: ours as they are, others after its name, Ray's own hardly ever.

    Ray's own lines go to standard error, where `QuietStderr` holds them back until a crash. Shown
    are those of a raylet that tell of lack of memory, not of objects that moved to the disk, and
    warnings of an autoscaler.

    Args:
        batch: What Ray's log monitor found: pid, lines and more.
        show: Prints such a batch; the flag says that the lines are ours.
    """
    pid, kept = batch.get("pid"), []
    for line in batch["lines"]:
        if pid == "autoscaler" and not ("Error:" in line or "Warning:" in line):
            continue
        is_told = pid == "autoscaler" or (pid == "raylet" and INFO not in line)
        if not is_told and is_of_ray(line):
            name = batch.get("actor_name") or batch.get("task_name") or "Ray"
            _hold(f"({name} pid={pid}) {line}\n")
            continue
        kept.append(line)
    start = 0
    for stop in range(1, len(kept) + 1):
        is_ours = _is_ours(kept[start])
        if stop == len(kept) or _is_ours(kept[stop]) != is_ours:
            show(batch | {"lines": kept[start:stop]}, is_ours)
            start = stop


def _hold(line: str) -> None:
    """Write a line past `sys.stderr`, to where this process's C++ code writes."""
    if sys.__stderr__ is not None:
        with suppress(OSError, ValueError):  # it is closed, or nobody reads it any more
            os.write(sys.__stderr__.fileno(), line.encode(errors="replace"))


def _is_ours(line: str) -> bool:
    return _OURS.match(line) is not None
