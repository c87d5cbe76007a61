"""One plain function over the slides of a finished run, by Ray or in this process.

Exports, questions and reports read a slide at a time. What they make of one slide never depends on
another one, and an error of one slide costs the other slides nothing.
"""

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

from scellst_ray.core.logs import log_context, log_fields
from scellst_ray.pipelines.ray_start import cluster_address
from scellst_ray.stages.rows import Outcome
from scellst_ray.stages.tiles import guarded

T = TypeVar("T")
# To start Ray and its workers takes some 10 s: fewer slides are done here.
NUM_FOR_RAY = 16
MEMORY = 1 << 30
# Slides submitted at a time for each CPU. Their results wait until those before them are taken.
IN_FLIGHT = 4
logger = logging.getLogger(__name__)
# What this worker calls, and Ray's reference to it.
_functions: dict[str, Any] = {}


@dataclass(frozen=True)
class SlideResult(Generic[T]):
    """What became of one slide.

    Attributes:
        slide_id: The slide.
        value: What the function returned; None if it failed.
        error: Why it failed, in one line; None if it did not.
    """

    slide_id: str
    value: T | None = None
    error: str | None = None


def over_slides(
    function: Callable[[str], T],
    slide_ids: Sequence[str],
    *,
    memory: int = MEMORY,
    use_ray: bool | None = None,
) -> Iterator[SlideResult[T]]:
    """Call a function with each slide_id; yield results in the order of the slides.

    Args:
        function: What to do with one slide. For Ray it is pickled, and so is what it returns. Each
            worker reads it once, so it may hold a run with all its records.
        slide_ids: The slides.
        memory: Bytes that one call needs; Ray runs as many at a time as nodes hold.
        use_ray: Whether Ray calls it; None: if it is installed and there are many slides, or this
            process belongs to a cluster.

    Yields:
        One result for each slide. An exception of a slide, or the end of its process, is its error.
    """
    call = partial(_call, function)
    if _is_for_ray(len(slide_ids)) if use_ray is None else use_ray:
        yield from _by_ray(call, slide_ids, memory)
    else:
        yield from map(call, slide_ids)


def _is_for_ray(num_slides: int) -> bool:
    """Return whether Ray calls for this number of slides; never where Ray is not installed."""
    spec = find_spec("ray")
    if spec is None or spec.origin is None:
        return False
    loaded = sys.modules.get("ray")
    joins = (loaded is not None and loaded.is_initialized()) or bool(cluster_address())
    return num_slides >= NUM_FOR_RAY or (joins and num_slides > 1)


def _by_ray(
    call: Callable[[str], SlideResult[T]], slide_ids: Sequence[str], memory: int
) -> Iterator[SlideResult[T]]:
    # Imported here, as runs are read without Ray, too.
    import ray  # noqa: PLC0415
    from ray.exceptions import RayError  # noqa: PLC0415

    from scellst_ray.pipelines.session import ray_session  # noqa: PLC0415

    with ray_session() as cluster:
        remote: Any = ray.remote(num_cpus=1, memory=memory, scheduling_strategy="SPREAD")(call_one)
        fitting = max(1, min(cluster.num_cpus, cluster.num_fitting(memory)))
        waiting = deque(slide_ids)
        running: deque[tuple[str, Any]] = deque()
        shared = ray.put(call)
        while waiting or running:
            while waiting and len(running) < IN_FLIGHT * fitting:
                slide_id = waiting.popleft()
                running.append((slide_id, remote.remote([shared], slide_id)))
            slide_id, result = running.popleft()
            try:
                yield ray.get(result)
            except RayError as error:
                message = str(error).strip().splitlines()[0]
                yield SlideResult(slide_id, error=f"{type(error).__name__}: {message}")


def call_one(shared: list[Any], slide_id: str) -> SlideResult[Any]:
    """Call a function of one slide. Ray gives it a name of its own.

    Args:
        shared: Ray's reference to the function, in a list: so it is not read for every slide.
        slide_id: The slide.
    """
    if _functions.get("reference") != shared[0]:
        import ray  # noqa: PLC0415

        _functions.update(reference=shared[0], call=ray.get(shared[0]))
    result: SlideResult[Any] = _functions["call"](slide_id)
    return result


def _call(function: Callable[[str], T], slide_id: str) -> SlideResult[T]:
    outcome, value = Outcome(), None
    with log_context(slide_id), guarded(outcome, "slide"):
        value = function(slide_id)
    error = outcome.get("error")
    if error is None:
        return SlideResult(slide_id, value)
    if outcome["error_type"] not in ("ValueError", "DamagedFileError"):
        error = f"{outcome['error_type']}: {error}"
    return SlideResult(slide_id, error=error)


def values_of(results: Iterator[SlideResult[T]], what: str) -> Iterator[tuple[str, T]]:
    """Yield (slide_id, value) of the slides that succeeded; then raise if some did not.

    Args:
        results: From `over_slides`.
        what: What was made, for the message: 'exported'.

    Raises:
        ValueError: some slides failed. Each was logged, and all others were yielded before.
    """
    failed = []
    for result in results:
        if result.error is None:
            yield result.slide_id, result.value  # type: ignore[misc]
        else:
            text = "slide %s was not %s: %s"
            fields = log_fields(result.slide_id)
            logger.error(text, result.slide_id, what, result.error, extra=fields)
            failed.append(result)
    if failed:
        first = failed[0]
        message = (
            f"{len(failed)} slide(s) were not {what}: {', '.join(r.slide_id for r in failed[:10])}"
            f"{' ...' if len(failed) > 10 else ''}; the first: {first.error}"
        )
        raise ValueError(message)
