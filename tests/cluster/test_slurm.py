"""Run cluster/slurm.sh on a stand-in for Slurm: once with Ray itself, its branches without."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import psutil
import pytest

from tests.cluster import slurm_stand_in
from tests.support.object_server import wait_until
from tests.support.paths import ROOT

SCRIPT = ROOT / "cluster" / "slurm.sh"
BIN = Path(sys.executable).parent


@pytest.fixture
def slurm(tmp_path):
    """Return the environment, the folder of submission, and the log of calls."""
    programs, spool, shared = (tmp_path / name for name in ("bin", "spool", "shared"))
    for folder in (programs, spool, shared):
        folder.mkdir()
    slurm_stand_in.install(programs)
    # The path is short, because it holds sockets.
    local = Path(tempfile.mkdtemp(prefix="s"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
    environment |= {
        "PATH": f"{programs}:{BIN}:{os.environ['PATH']}",
        "STAND_IN_LOG": str(tmp_path / "log"),
        "STAND_IN_SPOOL": str(spool),
        "SCELLST_TMPDIR": str(local),
    }
    yield environment, shared, tmp_path / "log"
    shutil.rmtree(local)


@pytest.fixture
def without_ray(slurm):
    """Put stand-ins for `ray` and `sleep` before the real ones.

    A stand-in for `ray` is ready at once, so the script need not wait whole seconds for it.
    """
    environment, *_ = slurm
    programs = Path(environment["PATH"].split(":")[0])
    shutil.copy(programs / "srun", programs / "ray")
    (programs / "sleep").write_text(f"#!/bin/sh\nexec {shutil.which('sleep')} 0.1\n")
    (programs / "sleep").chmod(0o755)
    environment["SCELLST_HEAD_IP"] = "10.0.0.1"
    return slurm


def submit(slurm, *words, flags=()):
    environment, shared, _ = slurm
    return subprocess.Popen(
        ["sbatch", *flags, str(SCRIPT), *words],
        cwd=shared,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def calls(slurm, program):
    lines = [json.loads(line) for line in slurm[2].read_text().splitlines()]
    return [line[1:] for line in lines if line[0] == program]


def nothing_is_left(slurm):
    environment, shared, _ = slurm
    local = environment["SCELLST_TMPDIR"]
    running = [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(local in word for word in process.info["cmdline"] or ())
    ]
    return (list(shared.iterdir()), list(Path(local).iterdir()), running) == ([], [], [])


JOB = """
    import json, os, stat, sys, urllib.error, urllib.request
    import ray

    ray.init(logging_level="error")
    token = os.environ["RAY_AUTH_TOKEN_PATH"]
    port = int(os.environ["SCELLST_PORT"]) + 1
    try:
        refused = urllib.request.urlopen(f"http://127.0.0.1:{port}/api/jobs/").status
    except urllib.error.HTTPError as error:
        refused = error.code
    nodes = [node for node in ray.nodes() if node["Alive"]]
    found = {
        "nodes": len(nodes),
        "cpus": sorted(node["Resources"].get("CPU", 0) for node in nodes),
        "memory": nodes[0]["Resources"]["memory"],
        "store": nodes[0]["Resources"]["object_store_memory"],
        "token": oct(stat.S_IMODE(os.stat(token).st_mode)),
        "folder": oct(stat.S_IMODE(os.stat(os.path.dirname(token)).st_mode)),
        "size": os.path.getsize(token),
        "without_token": refused,
        "closed": oct(stat.S_IMODE(os.stat(os.environ["SCELLST_TMPDIR"] + "/ray_71").st_mode)),
        "temp": os.path.dirname(ray._private.worker._global_node.get_session_dir_path()),
    }
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
    sys.exit(3)
"""


@pytest.mark.ray
@pytest.mark.e2e
@pytest.mark.slow
def test_a_job_runs_on_all_nodes_and_nothing_is_left(slurm, tmp_path):
    environment, *_ = slurm
    environment["SCELLST_PORT"] = "27310"
    environment["SCELLST_HEAD_IP"] = "127.0.0.1"
    (tmp_path / "job.py").write_text(textwrap.dedent(JOB))
    words = (sys.executable, str(tmp_path / "job.py"), str(tmp_path / "found.json"))
    running = submit(slurm, *words, flags=("--nodes=2", "--cpus-per-task=1", "--mem=1G"))
    _, errors = running.communicate(timeout=550)
    assert (tmp_path / "found.json").exists(), errors
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {
        "nodes": 2,
        "cpus": [1.0, 1.0],
        "memory": 2**30 * 6 // 10,
        "store": 2**30 * 2 // 10,
        "token": "0o600",
        "folder": "0o700",
        "size": 64,
        "without_token": 401,
        "temp": f"{environment['SCELLST_TMPDIR']}/ray_71/ray",
        "closed": "0o700",
    }
    assert running.returncode != 0  # the job's status
    wait_until(lambda: nothing_is_left(slurm))


def test_steps_are_where_they_belong(without_ray):
    done = submit(without_ray, "0", "0", flags=("--nodes=3",))
    _, errors = done.communicate(timeout=60)
    assert (done.returncode, errors) == (0, "")
    assert nothing_is_left(without_ray)
    starts = [words for words in calls(without_ray, "ray") if words[0] == "start"]
    head, *workers = starts
    assert "--head" in head
    assert {"--dashboard-host=127.0.0.1", "--node-ip-address=10.0.0.1"} <= set(head)
    assert len(workers) == 2
    assert all("--address=10.0.0.1:20142" in worker for worker in workers)
    assert all({"--num-cpus=16", "--block"} <= set(start) for start in starts)
    assert all(f"--temp-dir={without_ray[0]['SCELLST_TMPDIR']}/ray_71/ray" in s for s in starts)
    steps = calls(without_ray, "srun")
    ray_steps = [nodes for nodes, command, _ in steps if "ray_node" in command]
    assert ray_steps == [["node1"], ["node2", "node3"]]
    assert [nodes for nodes, command, _ in steps if command[-1] == "remove_files"] == [
        ["node1", "node2", "node3"]
    ]
    assert {cpus for *_, cpus in steps} == {"16"}


def test_the_status_is_the_jobs(without_ray):
    done = submit(without_ray, "0", "7", flags=("--nodes=1",))
    done.communicate(timeout=60)
    assert done.returncode == 7
    assert nothing_is_left(without_ray)


def test_a_notice_stops_the_job_and_all_else(without_ray):
    running = submit(without_ray, "50", "0", flags=("--nodes=2",))
    wait_until(
        lambda: (
            without_ray[2].exists()
            and any(words[:2] == ["job", "submit"] for words in calls(without_ray, "ray"))
        ),
        60,
    )
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (143, "stopping the job: Slurm ends its allocation\n")
    stops = [words for words in calls(without_ray, "ray") if words[:2] == ["job", "stop"]]
    assert [words[-1] for words in stops] == ["slurm-71-0"]
    assert nothing_is_left(without_ray)


def test_a_head_that_fails_ends_it(without_ray):
    without_ray[0]["STAND_IN_HEAD"] = "fails"
    done = submit(without_ray, "0", "0")
    _, errors = done.communicate(timeout=60)
    assert (done.returncode, errors) == (1, "the head ended: see its messages above\n")
    assert nothing_is_left(without_ray)


@pytest.mark.parametrize("kind", ["mode 777", "mode 770", "mode 755", "link", "file", "foreign"])
def test_a_folder_of_somebody_else_is_refused(without_ray, tmp_path, kind):
    taken = Path(without_ray[0]["SCELLST_TMPDIR"], "ray_71")
    (tmp_path / "own").mkdir(mode=0o700)
    if kind == "link":
        taken.symlink_to(tmp_path / "own")
    elif kind == "file":
        taken.write_text("")
    else:
        taken.mkdir()
        taken.chmod(int(kind.removeprefix("mode "), 8) if "mode" in kind else 0o700)
        (taken / "theirs").write_text("")
    if kind == "foreign":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        os.chown(taken, 65534, 65534)
    done = submit(without_ray, "0", "0", flags=("--nodes=1",))
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 1
    first, *_, last = errors.splitlines()
    assert first.startswith(f"{taken} on {socket.gethostname()}: it is no folder of mode 700")
    assert "SCELLST_TMPDIR" in first
    assert last == "the head ended: see its messages above"
    assert not calls_of_ray(without_ray)
    # It is not removed either.
    assert taken.is_symlink() if kind == "link" else taken.exists()
    assert kind in ("link", "file") or (taken / "theirs").exists()
    assert list((tmp_path / "own").iterdir()) == []


def calls_of_ray(slurm):
    """Return the nodes of Ray that were started."""
    return [words for words in calls(slurm, "ray") if words[0] == "start"]


def test_a_requeued_job_takes_its_own_folder_again(without_ray):
    own = Path(without_ray[0]["SCELLST_TMPDIR"], "ray_71")
    own.mkdir(mode=0o700)
    (own / "left").write_text("")
    done = submit(without_ray, "0", "0", flags=("--nodes=2",))
    _, errors = done.communicate(timeout=60)
    assert (done.returncode, errors) == (0, "")
    assert nothing_is_left(without_ray)


def test_without_a_command_or_slurm_it_says_so(slurm):
    done = submit(slurm)
    assert done.communicate(timeout=60)[1].startswith("usage: sbatch")
    assert done.returncode == 2
    plain = subprocess.run(
        ["bash", str(SCRIPT), "x"], env=slurm[0], capture_output=True, text=True, check=False
    )
    assert "not a Slurm job: use sbatch" in plain.stderr
    assert plain.returncode == 1
