"""Explain in one line that Ray, or its host, ended a process of a run; know Ray's errors by name.

Names, since this file imports no Ray: the command line asks it before it knows whether Ray is used.
"""

import re
from collections.abc import Iterator

# What happened, by the name of Ray's error.
_HOST_ENDED = {
    "OutOfMemoryError": "Ray ended a worker, since its host's memory was nearly used up",
    "NodeDiedError": "a host of the cluster ended, or could not be reached",
    "LocalRayletDiedError": "Ray itself ended on a host",
    "OutOfDiskError": "the disk with Ray's files is full",
    "ObjectStoreFullError": "Ray's object store is full",
    "WorkerCrashedError": "a worker was ended from outside, or crashed",
    "ActorDiedError": "a worker was ended from outside, or crashed",
    "RayActorError": "a worker was ended from outside, or crashed",
    "ActorUnavailableError": "a worker could not be reached",
    "OwnerDiedError": "the worker that held a result was ended",
    "ObjectLostError": "the worker that held a result was ended",
    "ObjectReconstructionFailedError": "the worker that held a result was ended",
    "PreemptionError": "the cluster took back a host",
}
# Attributes and kinds by which an error holds those that caused it.
_HOLDERS = ("cause", "controller_failure", "worker_failures", "_base_exc", "__cause__")
# What the other workers of a training report when one is gone.
_PEER_GONE = re.compile(
    r"gloo|NCCL|connection (was )?(closed|reset|refused)|broken pipe|timed out waiting", re.I
)
_MEMORY = re.compile(r"\bOOM\b|out[ -]of[ -]memory|memory monitor|low on memory", re.I)
# The reason why an actor could not be made is an error of its own, and keeps its traceback.
_OWN_FAULT = re.compile(r"creation task|error raised in its|exit_actor|ray\.kill", re.I)
_NOT_STARTED = re.compile(r"(node|raylet|GCS).{0,40}(timed out|failed) (during|to) start", re.I)
_REMEDY = (
    "The host has too little memory or is too busy: end other programs, or give fewer --workers, "
    "or more --memory-gb for each. Then run the same command again: it goes on from what is stored."
)
_MOST_ERRORS = 1000


def explain_lost_process(error: BaseException) -> str | None:
    """Return a line that says which process was lost, and what to do; None for all other errors.

    An error of our own code among the causes is such another error: its traceback is needed.
    """
    if type(error) is Exception and _NOT_STARTED.search(str(error)):
        return f"Ray did not start in time on this host. {_REMEDY}"
    causes = list(_causes(error))
    lost = [cause for cause in causes if _is_lost(cause)]
    if any(not _is_lost(cause) and not _PEER_GONE.search(str(cause)) for cause in causes):
        return None
    if lost:
        fullest = min(lost, key=lambda cause: not _is_for_memory(cause))
        what = _HOST_ENDED[
            "OutOfMemoryError" if _is_for_memory(fullest) else type(fullest).__name__
        ]
        where = "the controller of the training" if _is_of_controller(error) else ""
        return f"{where + ': ' if where else ''}{what} ({type(fullest).__name__}). {_REMEDY}"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors at the roots of an error: itself if it holds no others."""
    waiting, seen = [error], set[int]()
    while waiting and len(seen) < _MOST_ERRORS:
        now = waiting.pop()
        if id(now) in seen:
            continue
        seen.add(id(now))
        held = [] if _is_lost(now) else list(_held_by(now))
        waiting += held
        if not held:
            yield now


def _held_by(error: BaseException) -> Iterator[BaseException]:
    for name in _HOLDERS:
        held = getattr(error, name, None)
        found = held.values() if isinstance(held, dict) else [held]
        yield from (one for one in found if isinstance(one, BaseException))


def _is_lost(error: BaseException) -> bool:
    kind = type(error)
    is_rays = kind.__module__.split(".")[0] == "ray"
    return is_rays and kind.__name__ in _HOST_ENDED and not _OWN_FAULT.search(str(error))


def _is_for_memory(error: BaseException) -> bool:
    # Ray guesses at memory whenever a process vanishes, so only its own kind and words count.
    guess = "There are some potential root causes"
    return type(error).__name__ == "OutOfMemoryError" or bool(
        _MEMORY.search(str(error).partition(guess)[0])
    )


def _is_of_controller(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}"
    return "ControllerError" in text or "TrainController" in text
