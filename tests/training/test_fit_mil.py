"""Ray Train workers reach the head that one plain process reaches, also when one is killed."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import ray.train
import torch

from scellst_ray.models.mil.bags import split_spots
from scellst_ray.models.mil.fit import FitConfig, fit_head, new_head
from scellst_ray.training.bag_files import load_bags
from scellst_ray.training.fit_mil import StateFile, Workers, fit
from tests.support.bag_files import write_bag_files

# 32 training spots in batches of 9: the last has 5, which two workers cannot share evenly.
CONFIG = FitConfig(lr=2e-3, batch_spots=9, max_epochs=6, patience=2, seed=3)


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    """Return the addresses of two BAGS files of 24 and 16 spots, and their content."""
    return write_bag_files(tmp_path_factory.mktemp("bags"))


def plain_fit(bags, config):
    """Fit in this process; return the head, its last layer as it began, and what happened."""
    whole, slide_ids = load_bags(bags[0], counts=config.formula().counts)
    train, val = (
        whole.take(spots) for spots in split_spots(slide_ids, config.val_share, config.seed)
    )
    head = new_head(train, config.seed, config.formula())
    start = head.last.weight.detach().clone()
    return head, start, fit_head(head, train, val, config)


def assert_same_fit(found, expected):
    """Compare two pairs of a head and what happened."""
    (head, result), (plain_head, plain) = found, expected
    assert not head.training
    assert result.best_epoch == plain.best_epoch > 0
    np.testing.assert_allclose(result.history, plain.history, rtol=1e-5)
    assert result.best_loss == pytest.approx(plain.best_loss, rel=1e-5)
    tensors, wanted = head.state_dict(), plain_head.state_dict()
    assert list(tensors) == list(wanted)
    for name, value in tensors.items():
        # AdamW enlarges what rounding leaves where a gradient is near zero.
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-4)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("num_workers", "changes"),
    [(2, {}), (1, {"loss": "nb", "predictor": "published", "ensemble": 2})],
)
def test_workers_one_of_them_killed_reach_the_head_of_one_process(
    bags, tmp_path, num_workers, changes
):
    config = replace(CONFIG, **changes)
    epochs, stored = tmp_path / "epochs", tmp_path / "storage"

    def kill_once(progress):
        """Note the epochs of the first worker, which is killed after its third."""
        if ray.train.get_context().get_world_rank() == 0:
            first = not (epochs.exists() and "killed" in epochs.read_text())
            with epochs.open("a") as file:
                file.write(f"{len(progress.history)} ")
                if first and len(progress.history) == 3:
                    file.write("killed ")
            if first and len(progress.history) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    workers = Workers(num_workers, 1, use_gpu=False, max_failures=1, memory_gb=0.0)
    head, result = fit(bags[0], config, workers, str(stored), kill_once)
    plain_head, start, plain = plain_fit(bags, config)
    assert head.formula == config.formula()
    assert_same_fit((head, result), (plain_head, plain))
    # The fit has moved the weights by far more than that.
    assert (head.last.weight - start).abs().max() > 1e-3
    before, after = epochs.read_text().split("killed")
    assert before.split() == ["1", "2", "3"]
    again = [int(word) for word in after.split()]
    assert 1 < again[0] <= 4  # not from the beginning
    assert again == list(range(again[0], len(plain.history) + 1))
    # Nothing is left for a later fit to take up.
    assert list(stored.iterdir()) == []


def test_the_state_is_stored_now_and_then(bags, tmp_path):
    state_file = StateFile(str(tmp_path / "state.pt"))
    assert state_file.load() is None
    whole, slide_ids = load_bags(bags[0])
    train, val = (whole.take(spots) for spots in split_spots(slide_ids, 0.2, 0))
    at, states = [], []

    def each_epoch(progress):
        state_file.store_if_due(progress)
        state_file.seconds = 0.0 if len(progress.history) < 3 else 1e6
        at.append(len(state_file.load()["history"]))
        states.append(state_file.load())

    config = replace(CONFIG, max_epochs=5, patience=5)
    head = new_head(train, 0)
    expected = fit_head(head, train, val, config, each_epoch=each_epoch)
    assert at == [1, 2, 3, 3, 3]
    for state in states[:3]:
        again = new_head(train, 1)
        assert fit_head(again, train, val, config, state=state) == expected
        for name, value in again.state_dict().items():
            assert torch.equal(value, head.state_dict()[name])
    state_file.remove()
    state_file.remove()
    assert state_file.load() is None
