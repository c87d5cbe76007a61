"""A limit to the memory of a process, so that a file that asks for too much gets an error for it.

Without it the kernel, or Ray, would end whichever process of the node they find first.
"""

import resource
from pathlib import Path

STATUS = Path("/proc/self/status")
# What limits count is what was asked for, not what is used: stacks of threads, and rooms that
# allocators keep. And a worker that declares 2 GiB may take more for a moment.
TIMES, MORE_BYTES = 2, 2 * 2**30
# Of processes that declare nothing.
USUAL_BYTES = 2 * 2**30


def limit_memory(declared_bytes: float | None = None) -> int | None:
    """Refuse this process memory beyond what it has now and twice what it declares, and 2 GiB.

    Not for processes with a GPU: its driver asks for all addresses at once.

    Args:
        declared_bytes: What it is meant to take; None: 2 GiB.

    Returns:
        Bytes it may have in all; None where the system does not tell what it has.
    """
    has = data_bytes()
    if has is None:
        return None
    most = has + int(TIMES * (declared_bytes or USUAL_BYTES)) + MORE_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    return most


def data_bytes() -> int | None:
    """Return the bytes of this process that the limit counts; None if not on Linux."""
    if not STATUS.exists():
        return None
    lines = STATUS.read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("VmData:"))
    return int(kibibytes) * 1024
