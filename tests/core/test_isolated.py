"""Calls in other processes give all results, even if an item ends its process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from scellst_ray.core.isolated import WAITING, ProcessDeath, map_isolated
from tests.support.paths import ROOT


def square(number):
    return number * number


def work(number):
    """Square, crash, or hang."""
    if number == 3:
        os._exit(1)
    if number == 5:
        time.sleep(600)
    return number * number


def refuse(number):
    message = f"not {number}"
    raise ValueError(message)


def test_what_ends_its_process_or_hangs_costs_no_other_item_anything():
    found = dict(map_isolated(work, range(8), processes=2, timeout_s=2))
    assert set(found) == set(range(8))
    died = {item for item, result in found.items() if isinstance(result, ProcessDeath)}
    assert died == {3, 5}
    assert "took longer than 2 s" in found[5].reason
    assert all(found[item] == item * item for item in found if item not in died)


def test_items_are_taken_only_as_they_are_needed():
    taken = []
    results = map_isolated(square, (taken.append(n) or n for n in range(1000)), processes=1)
    assert next(results)[1] in {0, 1}
    assert len(taken) <= 2 * WAITING
    results.close()


def test_no_items_and_errors():
    assert list(map_isolated(square, [], processes=1)) == []
    with pytest.raises(ValueError, match="not 1"):
        list(map_isolated(refuse, [1], processes=1))


INTERRUPTED = """
import signal
import sys
from scellst_ray.core.isolated import map_isolated
from scellst_ray.core.signals import catch_sigint
from tests.support.sleeper import sleep_long

if __name__ == "__main__":
    # A shell's background job, which tests may be, ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with catch_sigint() as interrupts:
        try:
            list(map_isolated(sleep_long, [sys.argv[1]], processes=1))
        except KeyboardInterrupt:
            print("interrupted")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals of process groups")
def test_ctrl_c_ends_the_processes_without_waiting_for_their_calls(tmp_path):
    """The whole process group gets the signal, as from a terminal."""
    (tmp_path / "main.py").write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, "main.py", str(tmp_path / "begun")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60) == ("interrupted\n", "")
    assert process.returncode == 0
