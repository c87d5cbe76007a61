"""Leases between real processes: killed, stopped, racing, and on object storage."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest

from scellst_ray.runs import lease as lease_module
from scellst_ray.runs.lease import Lease, LeaseError, hold_lease

HOLD = """
import sys, time
from scellst_ray.runs.lease import hold_lease
with hold_lease(sys.argv[1], float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def holder(run, seconds=60.0, hold_s=60.0):
    """Start a process that holds the lease of a run."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run), str(seconds), str(hold_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def live(tmp_path):
    """Return a process that holds the lease of `tmp_path`; it is killed afterwards."""
    process = holder(tmp_path)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def content(run):
    return json.loads(Path(run, "lease.json").read_text())


def change(run, **values):
    Path(run, "lease.json").write_text(json.dumps(content(run) | values))


def ago(seconds):
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def test_it_is_held_inside_and_gone_outside(tmp_path):
    with hold_lease(str(tmp_path)) as lease:
        lease.check()
        found = content(tmp_path)
        assert found["pid"] == os.getpid()
        assert found["acquired"] <= found["renewed"] < found["expires"]
    assert list(tmp_path.iterdir()) == []


def test_a_live_holder_is_not_disturbed_and_is_named(tmp_path, live):
    before = content(tmp_path)
    with pytest.raises(LeaseError) as refusal, hold_lease(str(tmp_path)):
        pass
    message = str(refusal.value)
    for word in (live.pid, before["host"], before["acquired"], before["expires"], "lease.json"):
        assert str(word) in message
    assert "remove" in message
    assert content(tmp_path)["token"] == before["token"]


def test_a_killed_holder_on_this_host_is_taken_over_at_once(tmp_path, live, caplog):
    live.send_signal(signal.SIGKILL)
    # A zombie counts as dead, too: it still has its pid.
    os.waitid(os.P_PID, live.pid, os.WEXITED | os.WNOWAIT)
    started = time.monotonic()
    with hold_lease(str(tmp_path)):
        assert content(tmp_path)["pid"] == os.getpid()
    assert time.monotonic() - started < 30  # the lease would have lasted 60
    assert f"process {live.pid}" in caplog.text


@pytest.mark.usefixtures("live")
def test_the_number_of_a_dead_process_may_be_in_use_again(tmp_path):
    change(tmp_path, process="12345")
    with hold_lease(str(tmp_path)):
        assert content(tmp_path)["pid"] == os.getpid()


def test_a_stopped_holder_loses_its_lease_and_notices(tmp_path):
    stopped = holder(tmp_path, seconds=0.6)
    try:
        assert stopped.stdout.readline() == "held\n"
        stopped.send_signal(signal.SIGSTOP)
        time.sleep(0.8)
        with hold_lease(str(tmp_path)):
            stopped.send_signal(signal.SIGCONT)
            assert "so this driver stops" in stopped.stderr.readline()
            assert content(tmp_path)["pid"] == os.getpid()
    finally:
        stopped.kill()
        stopped.communicate()


def check_for(seconds, lease):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lease.check()


def test_check_raises_once_the_lease_is_lost(tmp_path):
    with hold_lease(str(tmp_path), seconds=0.3) as lease:
        change(tmp_path, token="another", pid=4242)
        with pytest.raises(LeaseError, match="process 4242"):
            check_for(20, lease)
    assert content(tmp_path)["token"] == "another"  # it belongs to another driver


def test_check_renews_where_the_thread_was_held_up(tmp_path):
    lease = Lease(str(tmp_path), seconds=0.2)
    lease.acquire()  # no thread renews it
    before = content(tmp_path)
    time.sleep(0.3)
    lease.check()
    assert content(tmp_path)["expires"] > before["expires"]
    lease.release()


def test_it_is_renewed_as_long_as_it_is_held(tmp_path):
    with hold_lease(str(tmp_path), seconds=0.6):
        seen = set()
        deadline = time.monotonic() + 20
        while len(seen) < 3 and time.monotonic() < deadline:
            seen.add(content(tmp_path)["renewed"])
            time.sleep(0.05)
        assert len(seen) == 3
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("skew_s", [-300, 300])
def test_a_dead_holder_on_another_host_is_watched_whatever_its_clock(tmp_path, live, skew_s):
    change(tmp_path, machine="another", seconds=0.5, expires=ago(skew_s))
    live.kill()
    started = time.monotonic()
    with hold_lease(str(tmp_path)):
        assert content(tmp_path)["pid"] == os.getpid()
    assert time.monotonic() - started > 0.5


def test_a_live_holder_on_another_host_is_refused_when_it_renews(tmp_path, monkeypatch):
    other = holder(tmp_path, seconds=3.0)
    try:
        assert other.stdout.readline() == "held\n"
        monkeypatch.setattr(lease_module, "_machine", lambda: "another")
        with pytest.raises(LeaseError), hold_lease(str(tmp_path), seconds=3.0):
            pass
    finally:
        other.kill()
        other.communicate()


def test_a_lease_long_over_is_taken_at_once(tmp_path, live):
    live.kill()
    change(tmp_path, machine="another", expires=ago(3600))
    with hold_lease(str(tmp_path)):
        assert content(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("cut", ["", '{"token": "a'])
def test_a_lease_whose_writer_was_killed_is_free(tmp_path, cut):
    (tmp_path / "lease.json").write_text(cut)
    with hold_lease(str(tmp_path)):
        assert content(tmp_path)["pid"] == os.getpid()


RACE = """
import sys
from scellst_ray.runs import lease
print("ready", flush=True)
sys.stdin.readline()
try:
    lease.Lease(sys.argv[1]).acquire()
    print("won", flush=True)
except lease.LeaseError:
    print("lost", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("before", ["nothing", "a dead one"])
def test_of_several_that_start_together_one_wins(tmp_path, live, before):
    live.kill()
    live.wait()
    if before == "nothing":
        (tmp_path / "lease.json").unlink()
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    racers = [subprocess.Popen(command, **pipes) for _ in range(4)]
    assert {racer.stdout.readline() for racer in racers} == {"ready\n"}
    for racer in racers:
        racer.stdin.write("go\n")
    # The winner lives until all have tried.
    found = sorted(racer.stdout.readline().strip() for racer in racers)
    for racer in racers:
        racer.communicate(timeout=60)
    assert found == ["lost", "lost", "lost", "won"]


def test_object_storage_is_read_back(monkeypatch):
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.1)
    run = "memory://lease/run"
    fs = fsspec.filesystem("memory")
    with hold_lease(run) as lease:
        lease.check()
        with pytest.raises(LeaseError), hold_lease(run):
            pass
        assert json.loads(fs.cat_file("/lease/run/lease.json"))["pid"] == os.getpid()
    assert not fs.exists("/lease/run/lease.json")


def test_the_last_to_write_wins_where_nothing_is_locked(monkeypatch):
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.1)
    fs = fsspec.filesystem("memory")
    late = Lease("memory://lease/race")
    write = late._holder | {"acquired": ago(0), "expires": ago(-60), "seconds": 60.0}

    def sleeping(_):
        fs.pipe_file("/lease/race/lease.json", json.dumps(write).encode())

    monkeypatch.setattr(lease_module.time, "sleep", sleeping)
    with pytest.raises(LeaseError, match="has held"):
        Lease("memory://lease/race").acquire()
    fs.rm("/lease", recursive=True)


def test_a_second_driver_is_refused_before_it_starts_anything(tmp_path, monkeypatch):
    from scellst_ray.pipelines import extract as cells

    def started():
        message = "Ray is started"
        raise RuntimeError(message)

    monkeypatch.setattr(cells, "ray_session", started)
    (tmp_path / "slide.png").write_bytes(b"never opened")
    (tmp_path / "manifest.csv").write_text("slide_id,uri,mpp\na,slide.png,0.5\n")
    run = tmp_path / "run"
    config = cells.ExtractConfig(
        manifest=str(tmp_path / "manifest.csv"), out=str(run), encoder="none"
    )
    with pytest.raises(RuntimeError, match="Ray is started"):
        cells.extract(config)
    assert not (run / "lease.json").exists()
    other = holder(run)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LeaseError, match=f"process {other.pid} on"):
            cells.extract(config)
    finally:
        other.kill()
        other.communicate()
    # After it is killed, its lease is no obstacle.
    with pytest.raises(RuntimeError, match="Ray is started"):
        cells.extract(config)
