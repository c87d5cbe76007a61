"""A process that requests too much memory gets an error, and goes on."""

import json
import subprocess
import sys

import pytest

from scellst_ray.core import memory_limit
from scellst_ray.core.isolated import map_isolated

GIB = 2**30
CODE = """
import json, sys
import numpy as np
from scellst_ray.core.memory_limit import data_bytes, limit_memory
had = data_bytes()
most = limit_memory(float(sys.argv[1]))
got = []
for size in map(int, sys.argv[2:]):
    try:
        got.append(len(np.empty(size, np.uint8)))
    except MemoryError:
        got.append(None)
print(json.dumps([had, most, got]))
"""


def test_a_process_gets_what_it_may_have_and_no_more():
    # The memory is requested and not touched, so it takes none of this machine.
    sizes = [GIB, 6 * GIB, 3 * GIB]
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(GIB), *map(str, sizes)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    had, most, got = json.loads(done.stdout)
    assert most == had + 4 * GIB
    assert got == [GIB, None, 3 * GIB]


def test_where_the_system_does_not_tell_nothing_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_limit, "STATUS", tmp_path / "none")
    assert memory_limit.limit_memory() is None


def ask(size):
    """Request memory; return the bytes received."""
    return len(bytes(size))


def test_isolated_processes_are_limited():
    with pytest.raises(MemoryError):
        list(map_isolated(ask, [40 * GIB], 1))
