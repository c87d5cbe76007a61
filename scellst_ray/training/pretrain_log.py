"""What pretraining tells: a line per step as JSON and in TensorBoard, and warnings of collapse."""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from scellst_ray import storage
from scellst_ray.training.moco_loop import Step

LOG_NAME, BOARD_NAME = "log.jsonl", "tensorboard"
# Below these, embeddings of different cells are hardly different.
MIN_SPREAD, MIN_RANK = 0.05, 2.0
logger = logging.getLogger(__name__)


class PretrainLog:
    """The steps of a run so far: it travels in checkpoints, so a resumed run has it whole.

    Attributes:
        steps: One dictionary a step.
    """

    def __init__(self, steps: list[dict[str, Any]] | None = None) -> None:
        """Begin, or go on from the steps of a checkpoint."""
        self.steps = list(steps or [])
        self._last = time.monotonic()
        self._waited_s = 0.0

    @classmethod
    def from_json(cls, text: str) -> "PretrainLog":
        """Return what `to_json` wrote."""
        return cls(json.loads(text))

    def to_json(self) -> str:
        """Return the steps as JSON."""
        return json.dumps(self.steps)

    def add(self, step: Step, num_crops: int, num_workers: int) -> None:
        """Note a step of so many crops over all workers."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        waited_s = step.waited_s if step.number == 0 else step.waited_s - self._waited_s
        self._waited_s = step.waited_s
        place = {"step": len(self.steps), "epoch": step.epoch, "learning_rate": step.lr}
        found = {k: float(v) for k, v in step.result.__dict__.items()}
        timing = {"seconds": seconds, "waited_s": max(waited_s, 0.0)}
        timing |= {"crops_per_s": num_crops / seconds, "num_workers": num_workers}
        self.steps.append(place | found | timing)

    def epoch(self) -> dict[str, float]:
        """Return the means over the steps of the latest epoch."""
        epoch = self.steps[-1]["epoch"]
        mine = [step for step in self.steps if step["epoch"] == epoch]
        names = [name for name in mine[0] if name not in {"step", "epoch", "num_workers"}]
        means = {name: sum(step[name] for step in mine) / len(mine) for name in names}
        return {"epoch": epoch, "step": mine[-1]["step"]} | means

    def warn_of_collapse(self) -> None:
        """Say so when embeddings of different cells have become alike."""
        last = self.epoch()
        if last["embedding_spread"] < MIN_SPREAD or last["embedding_rank"] < MIN_RANK:
            logger.warning(
                "epoch %d: embeddings have collapsed (spread %.3f of 1, effective rank %.1f): the "
                "encoder tells cells apart no more; lower the learning rate, or raise the "
                "temperature or the batch",
                last["epoch"] + 1,
                last["embedding_spread"],
                last["embedding_rank"],
            )

    def line(self, num_epochs: int) -> str:
        """Return the latest epoch in a line for people."""
        last = self.epoch()
        share = last["waited_s"] / max(last["seconds"], 1e-9)
        return (
            f"epoch {last['epoch'] + 1} of {num_epochs}: loss {last['loss']:.4f}, "
            f"{last['crops_per_s']:,.0f} crops/s, {share:.1%} of the time waiting for crops, "
            f"effective rank of embeddings {last['embedding_rank']:.1f}"
        )


class Board:
    """Publishes a log below a run's folder: `log.jsonl`, and `tensorboard/` for its viewer."""

    def __init__(self, uri: str, folder: Path, log: PretrainLog) -> None:
        """Write TensorBoard's files to a local folder first."""
        self.uri, self.folder, self.log = uri, folder, log
        # Another attempt's files may hold steps that are taken anew: the viewer drops them.
        self._next = 0
        self._writer = SummaryWriter(str(folder), purge_step=len(log.steps))

    def publish(self) -> None:
        """Publish all that is new."""
        for step in self.log.steps[self._next :]:
            for name, value in step.items():
                if name not in {"step", "epoch"}:
                    self._writer.add_scalar(f"pretrain/{name}", value, step["step"])
        self._next = len(self.log.steps)
        self._writer.flush()
        lines = "".join(json.dumps(step) + "\n" for step in self.log.steps)
        storage.publish_text(storage.join(self.uri, LOG_NAME), lines)
        for path in self.folder.iterdir():
            copy = partial(shutil.copyfile, path)
            storage.publish(storage.join(self.uri, BOARD_NAME, path.name), copy)

    def close(self) -> None:
        """Close TensorBoard's files."""
        self._writer.close()


@contextmanager
def board(uri: str, log: PretrainLog) -> Iterator[Board]:
    """Publish a log below `uri` inside a `with`."""
    with tempfile.TemporaryDirectory(prefix="scellst-ray-board-") as folder:
        shown = Board(uri, Path(folder), log)
        try:
            yield shown
        finally:
            shown.close()
