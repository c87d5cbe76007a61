"""Processes of a training know their Ray, also where others run on the host."""

import os
import subprocess
import sys

import pytest
import ray
from ray._private.services import canonicalize_bootstrap_address_or_die, find_gcs_addresses
from ray.train import LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api import data_parallel_trainer
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from scellst_ray.training.known_address import fit_trainer

pytestmark = pytest.mark.ray
OTHER = "192.0.2.9:1234"


@pytest.fixture
def another_ray():
    """Run a process that Ray takes for another Ray on this host."""
    command = ["raylet", "-c", "import time; time.sleep(600)", f"--gcs-address={OTHER}"]
    process = subprocess.Popen(command, executable=sys.executable)
    yield
    process.kill()
    process.wait()


@pytest.mark.usefixtures("local_ray", "another_ray")
def test_a_training_finds_its_ray_among_two(tmp_path):
    found = tmp_path / "found"

    def loop():
        others = find_gcs_addresses()
        found.write_text(f"{canonicalize_bootstrap_address_or_die(None)} {OTHER in others}")

    trainer = DataParallelTrainer(
        loop,
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(
            storage_path=str(tmp_path), logging_config=LoggingConfig(log_level="WARNING")
        ),
    )
    before = data_parallel_trainer.get_env_vars_to_propagate
    fit_trainer(trainer)
    assert found.read_text() == f"{ray.get_runtime_context().gcs_address} True"
    assert data_parallel_trainer.get_env_vars_to_propagate is before
    assert "RAY_ADDRESS" not in os.environ
