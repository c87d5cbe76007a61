"""Work that takes too long ends its process, whether or not it holds the interpreter."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, time
from scellst_ray.core import watchdog
watchdog.GRACE_S = 0.3
# PyDLL keeps the interpreter's lock: no other thread runs during the call.
sleep = time.sleep if sys.argv[1] == "free" else ctypes.PyDLL(None).sleep
watch = watchdog.Watchdog(lambda seconds: print("expired", seconds, flush=True))
with watch.limit(None):
    time.sleep(0.1)
for seconds in map(int, sys.argv[2:]):
    with watch.limit(0.5):
        sleep(seconds)
print("done", flush=True)
time.sleep(1.2)
"""


def run_program(*words):
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("lock", "printed"), [("free", "expired 0.5\n"), ("held", "")])
def test_work_that_takes_too_long_ends_its_process(lock, printed):
    done = run_program(lock, "0", "50")
    assert (done.returncode, done.stdout) == (1, printed)
    assert 'File "<string>"' in done.stderr


def test_work_in_time_goes_on():
    done = run_program("free", "0", "0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
