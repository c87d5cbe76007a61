"""Uses of the node's cache by other processes. It imports little, since each process imports it."""

import hashlib
import multiprocessing
import threading

from scellst_ray.storage.node_cache import hold

SPAWN = multiprocessing.get_context("spawn")


def digest_of(uri, answers):
    """Answer with the digest of an object's content."""
    with hold(uri) as held:
        answers.put(hashlib.sha256(held.path.read_bytes()).hexdigest())


def keep(uri, answers):
    """Answer with the path of an object's copy, and hold it until killed."""
    with hold(uri) as held:
        answers.put(str(held.path))
        threading.Event().wait()


def started(target, uri):
    """Start a process; return it and the queue of its answers."""
    answers = SPAWN.SimpleQueue()
    process = SPAWN.Process(target=target, args=(uri, answers), daemon=True)
    process.start()
    return process, answers
