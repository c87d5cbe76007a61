"""`ray job submit` of jobs/predict.py and jobs/train.py on a cluster started for the test."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch

import scellst_ray
from scellst_ray.models.mil.fit import FitConfig, fit_head, new_head
from scellst_ray.models.mil.head import MilHead, load_head, save_head
from scellst_ray.slides.synthetic.slide import SyntheticConfig, write_synthetic_slide
from scellst_ray.training.bag_files import load_split
from tests.support.paths import ROOT
from tests.support.small_run import write_small_run

pytestmark = [pytest.mark.ray, pytest.mark.e2e]
PORT, DASHBOARD = 26479, 28265


@pytest.fixture(scope="module")
def ray_head(tmp_path_factory):
    """Start a Ray head with its dashboard on loopback; stop just that one."""
    folder = tmp_path_factory.mktemp("ray", numbered=False)
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ADDRESS": f"http://127.0.0.1:{DASHBOARD}",
        # Its own, and short: sockets lie in it. A head notes its address there for others to find.
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray"),
    }
    environment.pop("RAY_JOB_CONFIG_JSON_ENV_VAR", None)
    ray = shutil.which("ray", path=str(Path(sys.executable).parent))
    # Blocking, so that the head and all its children are this process's to end.
    process = subprocess.Popen(
        [
            ray,
            "start",
            "--head",
            "--block",
            "--num-cpus=2",
            f"--port={PORT}",
            "--node-ip-address=127.0.0.1",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={DASHBOARD}",
            # Else all heads of a machine listen on one port, and all but the first take no jobs.
            f"--dashboard-agent-listen-port={DASHBOARD + 1}",
            "--disable-usage-stats",
        ],
        env={k: v for k, v in environment.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until_up(ray, environment)
        yield ray, environment, process.pid
    finally:
        # After SIGTERM a head waits half a minute for its agents.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
        shutil.rmtree(environment["RAY_TMPDIR"])


def test_predict_as_a_job(ray_head, tmp_path):
    paths = write_synthetic_slide(
        tmp_path / "s0", SyntheticConfig(seed=5, width_um=200.0, height_um=160.0, num_genes=4)
    )
    (tmp_path / "manifest.csv").write_text(f"slide_id,uri\ns0,{paths.slide}\n")
    torch.manual_seed(0)
    genes = ["ERBB2", "CD3E", "COL1A1"]
    info = {
        "genes": genes,
        "scaling": {},
        "embedding_dim": 2048,
        "encoder_digest": "random:0",
        "encoder": "random:0",
        "training_slides": [],
        "metrics": {},
        "cells": {},
    }
    save_head(str(tmp_path / "head.safetensors"), MilHead(2048, len(genes)), info)
    settings = {
        "manifest": str(tmp_path / "manifest.csv"),
        "out": str(tmp_path / "run"),
        "head": str(tmp_path / "head.safetensors"),
        "memory_gb": 0.5,
        "tiles_per_task": 2,
    }
    submitted = submit(ray_head, tmp_path, "predict", settings)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in submitted.stdout
    run = scellst_ray.open_run(str(tmp_path / "run"))
    assert run.slides["status"].to_list() == ["done"]
    assert run.genes == genes
    values = run.expression_numpy(genes, "s0")
    assert values.shape == (run.slides["num_cells"][0], 3)
    assert (values > 0).all()


def submit(ray_head, folder, job, settings, *words):
    """Submit a job and wait for its end, or with `--no-wait` for its start."""
    ray, environment, _ = ray_head
    config = folder / f"{job}.yaml"
    config.write_text(json.dumps(settings))
    script = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--config", str(config)]
    return subprocess.run(
        [ray, "job", "submit", *words, "--", *script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=folder,
    )


@pytest.mark.slow  # tests/training kills the same fit without a job server
@pytest.mark.parametrize(("loss", "ending"), [("mse", "the job"), ("nb", "its worker")])
def test_train_as_a_job_goes_on_after_a_kill(ray_head, tmp_path, loss, ending):
    ray, environment, head_pid = ray_head
    small, out = write_small_run(tmp_path), tmp_path / "head"
    settings = {"manifest": str(small.manifest), "cells": small.run.uri, "out": str(out)}
    settings |= {"genes": "variable:4", "loss": loss, "batch_spots": 8, "cpus_per_worker": 1}
    settings |= {"max_epochs": 400, "patience": 400}
    name = f"train-{loss}"
    started = submit(ray_head, tmp_path, "train", settings, "--no-wait", "--submission-id", name)
    assert started.returncode == 0, started.stdout + started.stderr
    (kept,) = wait_for(lambda: list(out.glob(".fit-*.pt")))
    if ending == "the job":
        subprocess.run(
            [ray, "job", "stop", name], env=environment, capture_output=True, timeout=60, check=True
        )
        assert kept.exists()
        assert not (out / "head.safetensors").exists()
        again = submit(ray_head, tmp_path, "train", settings)
        assert again.returncode == 0, again.stdout + again.stderr
    else:
        (worker,) = (
            process
            for process in psutil.Process(head_pid).children(recursive=True)
            if "RayTrainWorker" in " ".join(process.cmdline())
        )
        worker.kill()
        wait_for((out / "head.safetensors").exists)
    assert not kept.exists()
    head, info = load_head(str(out / "head.safetensors"))
    config = FitConfig(loss=loss, batch_spots=8, max_epochs=400, patience=400)
    uris = [str(out / "bags" / f"{slide_id}.parquet") for slide_id in ("s0", "s1")]
    train, val = load_split(uris, config, 1e9)
    plain = new_head(train, 0, config.formula())
    result = fit_head(plain, train, val, config)
    assert info["metrics"]["best_epoch"] == result.best_epoch > 20
    for key, value in head.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-4, atol=1e-4)


def wait_for(condition):
    """Return what a condition gives once that is something."""
    for _ in range(6000):
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    return pytest.fail("waited for two minutes")


def wait_until_up(ray, environment):
    """Wait until a job can be submitted: the server answers before the node's agent is there."""
    command = [ray, "job", "submit", "--no-wait", "--", "true"]
    for _ in range(60):
        tried = subprocess.run(
            command, env=environment, capture_output=True, timeout=120, check=False
        )
        if tried.returncode == 0:
            return
        time.sleep(1)
    pytest.fail(f"no job server within 60 tries: {tried.stderr.decode()[-500:]}")
