"""`ray job submit` of jobs/predict.py on a cluster started for the test."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import scellst_ray
from scellst_ray.models.mil import MilHead, save_head
from scellst_ray.slides.synthetic import SyntheticConfig, write_synthetic_slide

pytestmark = [pytest.mark.ray, pytest.mark.e2e]
ROOT = Path(__file__).resolve().parents[2]
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
            "--disable-usage-stats",
        ],
        env={k: v for k, v in environment.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    yield ray, environment
    process.terminate()
    process.wait(timeout=60)
    shutil.rmtree(environment["RAY_TMPDIR"])


def test_predict_as_a_job(ray_head, tmp_path):
    ray, environment = ray_head
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
    (tmp_path / "predict.yaml").write_text(json.dumps(settings))
    wait_until_up(ray, environment)
    submitted = subprocess.run(
        [
            ray,
            "job",
            "submit",
            "--",
            sys.executable,
            str(ROOT / "jobs" / "predict.py"),
            "--config",
            str(tmp_path / "predict.yaml"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=tmp_path,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in submitted.stdout
    run = scellst_ray.open_run(str(tmp_path / "run"))
    assert run.slides["status"].to_list() == ["done"]
    assert run.genes == genes
    values = run.expression_numpy(genes, "s0")
    assert values.shape == (run.slides["num_cells"][0], 3)
    assert (values > 0).all()


def wait_until_up(ray, environment):
    """Wait for the job server to answer."""
    for _ in range(60):
        listed = subprocess.run(
            [ray, "job", "list"], env=environment, capture_output=True, timeout=60, check=False
        )
        if listed.returncode == 0:
            return
    pytest.fail(f"no job server within 60 tries: {listed.stderr.decode()[-500:]}")
