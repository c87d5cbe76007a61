"""What the driver shows of the lines that Ray's other processes write."""

import os
import re
from collections.abc import Callable
from typing import Any

from ray._private import ray_logging
from ray._private import worker as ray_worker

from scellst_ray.core.ray_lines import is_of_ray

# The name under which Ray adds its own printing of lines.
HANDLER = "ray_print_logs"
# Lines of this package, which say themselves what they are about: text or JSON (core/logs.py).
_OURS = re.compile(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ |\{"time": ')
_STDERR = 2

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


def _print(batch: Lines, ignore_prefix: bool) -> None:  # noqa: FBT001 - as Ray's
    ray_worker.print_to_stdstream(batch, ignore_prefix=ignore_prefix)


def show_lines(batch: Lines, show: Show) -> None:
    """Show lines of one process: ours as they are, others after its name, Ray's own hardly ever.

    Ray's own lines go to descriptor 2, where `QuietStderr` holds them back until a crash. Those of
    a raylet are shown, since they tell of lack of memory, and the warnings of an autoscaler.

    Args:
        batch: What Ray's log monitor found: pid, lines and more.
        show: Prints such a batch; the flag leaves out the name of the process.
    """
    pid, kept = batch.get("pid"), []
    for line in batch["lines"]:
        if pid == "autoscaler" and not ("Error:" in line or "Warning:" in line):
            continue
        if pid not in ("autoscaler", "raylet") and is_of_ray(line):
            name = batch.get("actor_name") or batch.get("task_name") or "Ray"
            os.write(_STDERR, f"({name} pid={pid}) {line}\n".encode())
            continue
        kept.append(line)
    start = 0
    for stop in range(1, len(kept) + 1):
        is_ours = _is_ours(kept[start])
        if stop == len(kept) or _is_ours(kept[stop]) != is_ours:
            show(batch | {"lines": kept[start:stop]}, is_ours)
            start = stop


def _is_ours(line: str) -> bool:
    return _OURS.match(line) is not None
