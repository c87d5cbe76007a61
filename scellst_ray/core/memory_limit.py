"""Limit of a process's memory, so that a file that needs too much of it raises an error.

Without the limit the kernel, or Ray, would end some process of the node.
"""

import resource
from pathlib import Path

STATUS = Path("/proc/self/status")
# The limit counts memory that was requested, not memory in use: stacks of threads, and reserves of
# allocators. A worker that declares 2 GiB may also take more for a moment.
TIMES, MORE_BYTES = 2, 2 * 2**30
# Declared memory of a process that declares none.
USUAL_BYTES = 2 * 2**30


def limit_memory(declared_bytes: float | None = None) -> int | None:
    """Limit this process to its present memory + 2 x the declared memory + 2 GiB.

    Allocations beyond it raise MemoryError. Do not use it in a process with a GPU: the GPU's driver
    requests all addresses at once.

    Args:
        declared_bytes: Memory that the process declares, bytes; None: 2 GiB.

    Returns:
        The limit in bytes; None if the system does not say how much memory the process has.
    """
    present = data_bytes()
    if present is None:
        return None
    most = present + int(TIMES * (declared_bytes or USUAL_BYTES)) + MORE_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    return most


def data_bytes() -> int | None:
    """Return the bytes of this process that the limit counts; None if this is not Linux."""
    if not STATUS.exists():
        return None
    lines = STATUS.read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("VmData:"))
    return int(kibibytes) * 1024
