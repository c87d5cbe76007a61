"""The log of pretraining: means of epochs, warnings of collapse, published files."""

import json
import logging

import pytest

from scellst_ray.models.moco.step import StepResult
from scellst_ray.training.moco_loop import Step
from scellst_ray.training.pretrain_log import PretrainLog, open_board


def step(epoch, number, loss, spread=0.5, rank=10.0):
    values = dict.fromkeys(StepResult.__annotations__, 1.0)
    values |= {"loss": loss, "embedding_spread": spread, "embedding_rank": rank}
    return Step(epoch, number, 0.1 * (number + 1), StepResult(**values), waited_s=0.0)


@pytest.fixture
def log():
    """Return a log of two epochs of two steps."""
    made = PretrainLog()
    for number, loss in enumerate((4.0, 3.0, 2.0, 1.0)):
        made.add(step(number // 2, number % 2, loss), num_crops=16, num_workers=2)
    return made


def test_means_are_those_of_the_latest_epoch(log):
    means = log.epoch_means()
    assert (means["epoch"], means["step"], means["loss"]) == (1, 3, 1.5)
    assert means["learning_rate"] == pytest.approx(0.15)
    assert "num_workers" not in means
    assert log.format_epoch(5).startswith("epoch 2 of 5: loss 1.5000, ")


def test_a_log_survives_a_checkpoint(log):
    again = PretrainLog.from_json(log.to_json())
    assert again.steps == log.steps
    again.add(step(2, 0, 0.5), 16, 1)
    assert (again.steps[-1]["step"], again.steps[-1]["num_workers"]) == (4, 1)


@pytest.mark.parametrize(("spread", "rank"), [(0.01, 10.0), (0.5, 1.5)])
def test_a_collapse_is_warned_of(log, caplog, spread, rank):
    caplog.set_level(logging.WARNING)
    log.warn_of_collapse()
    assert caplog.text == ""
    log.add(step(2, 0, 1.0, spread, rank), 16, 1)
    log.warn_of_collapse()
    assert "epoch 3: embeddings have collapsed" in caplog.text
    assert "lower the learning rate" in caplog.text


def test_a_board_publishes_all_steps_as_lines(log, tmp_path):
    with open_board(str(tmp_path / "run"), log) as board:
        board.publish()
        log.add(step(2, 0, 0.5), 16, 1)
        board.publish()
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [4.0, 3.0, 2.0, 1.0, 0.5]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
