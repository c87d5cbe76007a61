"""Ray Train takes the steps of the plain loop, also when workers, nodes or the driver die."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import ray.train
import torch
from ray.cluster_utils import Cluster

from scellst_ray.models.moco.lars import new_moco_optimiser
from scellst_ray.models.moco.network import MocoConfig
from scellst_ray.models.moco.step import Collective
from scellst_ray.pipelines.session import ray_session
from scellst_ray.runs.crop_store import open_store
from scellst_ray.training.moco_loop import Recipe, crop_order, run_steps
from scellst_ray.training.pretrain import (
    Keeping,
    PretrainWorkers,
    encoder_state,
    new_model,
    pretrain,
)
from tests.support.crop_runs import write_crop_run
from tests.support.paths import ROOT

RECIPE = Recipe(
    arch="timm:test_resnet",
    moco=MocoConfig(projector_dim=16, out_dim=8, temperature=0.2),
    batch=16,
    epochs=3,
    warmup_epochs=1,
    base_lr=0.1,
)
ONE = PretrainWorkers(1, 1, use_gpu=False, max_failures=2, crops_at_once=None)
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    rng = np.random.default_rng(0)
    images = {s: rng.integers(0, 256, (n, 72, 72, 3), np.uint8) for s, n in (("a", 40), ("b", 15))}
    counts = {slide_id: len(crops) for slide_id, crops in images.items()}
    return write_crop_run(tmp_path_factory.mktemp("crops"), counts, images)


@pytest.fixture(scope="module")
def plain(crops):
    """Return the plain loop's losses, and its encoder after the epoch of the lowest."""
    torch.set_num_threads(1)
    model = new_model(RECIPE, None).to(memory_format=torch.channels_last)
    optimiser = new_moco_optimiser("lars", model, lr=0.6, weight_decay=RECIPE.weight_decay)
    order = crop_order(open_store([crops]), RECIPE)
    found, states = [], []
    for step in run_steps(model, optimiser, order, RECIPE, Collective()):
        found.append(step.result.loss)
        if step.number + 1 == order.steps_per_epoch:
            state = model.online.backbone.state_dict()
            states.append({name: value.clone() for name, value in state.items()})
    means = np.array(found).reshape(RECIPE.epochs, -1).mean(axis=1)
    return found, states[int(means.argmin())], means


def logged(folder):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_plain(folder, result, plain):
    losses, state, means = plain
    checkpoint, metrics = result
    steps = logged(folder)
    assert [step["loss"] for step in steps] == losses
    assert [step["step"] for step in steps] == list(range(9))
    assert metrics["loss"] == pytest.approx(means.min())
    assert metrics["epoch"] == means.argmin()
    found = encoder_state(checkpoint)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert list((Path(folder) / "tensorboard").iterdir())


@pytest.mark.usefixtures("local_ray")
def test_a_killed_worker_changes_nothing(crops, plain, tmp_path):
    killed, at = tmp_path / "killed", random.SystemRandom().randrange(1, 9)
    print(f"killed at step {at}")

    def kill_once(step):
        if step.epoch * 3 + step.number == at and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    keep = Keeping(str(tmp_path / "out"), steps=2, num_best=2)
    result = pretrain([crops], RECIPE, None, ONE, keep, kill_once)
    assert killed.exists()
    assert_plain(tmp_path / "out", result, plain)


def in_a_process(function, crops, out, folder):
    """Start a function of this file, in a process and a session of its own."""
    script = folder / "run.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}]\n"
        "from tests.training import test_pretrain\n"
        "from ray import cloudpickle\n"
        # Workers cannot import this file.
        "cloudpickle.register_pickle_by_value(test_pretrain)\n"
        f"test_pretrain.{function}(*sys.argv[1:])\n"
    )
    return subprocess.Popen([sys.executable, script, crops, str(out)], start_new_session=True)


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(crops, plain, tmp_path):
    out = tmp_path / "out"
    driver = in_a_process("until_killed", crops, out, tmp_path)
    deadline = time.monotonic() + 240
    while not (out / "fourth").exists():
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    # The driver and the Ray it started: a host that is lost.
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    with ray_session(num_cpus=2, dashboard=True):
        result = pretrain([crops], RECIPE, None, ONE, Keeping(str(out), steps=2, num_best=2))
    assert_plain(out, result, plain)


def wait_until_kept(out):
    """Wait until the first epoch's checkpoint, uploaded while training goes on, can be resumed."""
    while not (Path(out) / "checkpoints" / "checkpoint_manager_snapshot.json").exists():
        time.sleep(0.2)


def until_killed(crops, out):
    """Train, and wait at the fourth step to be killed."""

    def wait_at_fourth(step):
        if (step.epoch, step.number) == (1, 0):
            wait_until_kept(out)
            (Path(out) / "fourth").touch()
            time.sleep(600)

    with ray_session(num_cpus=2, dashboard=True):
        pretrain([crops], RECIPE, None, ONE, Keeping(out, steps=2, num_best=2), wait_at_fourth)


@pytest.mark.slow
def test_training_goes_on_with_the_workers_that_are_left(crops, plain, tmp_path):
    out = tmp_path / "out"
    # A process of its own: Ray's test cluster leaves sockets open.
    ended = in_a_process("until_alone", crops, out, tmp_path).wait(timeout=500)
    assert ended == 0
    steps = logged(out)
    assert [step["num_workers"] for step in steps] == [2, 2, 2, 1, 1, 1, 1, 1, 1]
    np.testing.assert_allclose([step["loss"] for step in steps], plain[0], rtol=5e-3)


def until_alone(crops, out):
    """Train on two nodes, one of which is lost after the first epoch."""
    lost = Path(out).with_name("lost")

    def lose_a_node(step):
        context = ray.train.get_context()
        if (step.epoch, step.number, context.get_world_rank()) == (1, 0, 1):
            wait_until_kept(out)
            lost.write_text(ray.get_runtime_context().get_node_id())
        while step.epoch == 1 and context.get_world_size() == 2:
            time.sleep(0.5)
        # Ray may begin with one worker, and add the other when it looks again.
        while context.get_world_size() == 1 and not lost.exists():
            time.sleep(0.5)

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False)
        workers = replace(ONE, num_workers=(1, 2))
        keep = Keeping(out, steps=100, num_best=2)
        run = ray.remote(num_cpus=0)(pretrain).remote(
            [crops], RECIPE, None, workers, keep, lose_a_node
        )
        while not lost.exists() or not lost.read_text():
            ray.wait([run], timeout=0.5)
        cluster.remove_node(next(n for n in nodes if n.node_id == lost.read_text()))
        ray.get(run, timeout=300)
    finally:
        ray.shutdown()
        cluster.shutdown()
