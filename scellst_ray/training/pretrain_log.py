"""Log of pretraining: one line per step as JSON and in TensorBoard, and warnings of collapse."""

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
# Below these values, embeddings of different cells are almost equal.
MIN_SPREAD, MIN_RANK = 0.05, 2.0
logger = logging.getLogger(__name__)


class PretrainLog:
    """The log of a run. Checkpoints include it, so a resumed run has the whole log.

    Attributes:
        steps: One dict per step.
    """

    def __init__(self, steps: list[dict[str, Any]] | None = None) -> None:
        """Begin an empty log, or continue from the steps of a checkpoint."""
        self.steps = list(steps or [])
        self._last = time.monotonic()
        self._waited_s = 0.0

    @classmethod
    def from_json(cls, text: str) -> "PretrainLog":
        """Return the log that `to_json` wrote."""
        return cls(json.loads(text))

    def to_json(self) -> str:
        """Return the steps as JSON."""
        return json.dumps(self.steps)

    def add(self, step: Step, num_crops: int, num_workers: int) -> None:
        """Add a step.

        Args:
            step: The step.
            num_crops: Number of crops in the step, over all workers.
            num_workers: Number of workers.
        """
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        waited_s = step.waited_s if step.number == 0 else step.waited_s - self._waited_s
        self._waited_s = step.waited_s
        place = {"step": len(self.steps), "epoch": step.epoch, "learning_rate": step.lr}
        results = {k: float(v) for k, v in step.result.__dict__.items()}
        timing = {"seconds": seconds, "waited_s": max(waited_s, 0.0)}
        timing |= {"crops_per_s": num_crops / seconds, "num_workers": num_workers}
        self.steps.append(place | results | timing)

    def epoch_means(self) -> dict[str, float]:
        """Return the means over the steps of the latest epoch, by name."""
        epoch = self.steps[-1]["epoch"]
        steps = [step for step in self.steps if step["epoch"] == epoch]
        names = [name for name in steps[0] if name not in {"step", "epoch", "num_workers"}]
        means = {name: sum(step[name] for step in steps) / len(steps) for name in names}
        return {"epoch": epoch, "step": steps[-1]["step"]} | means

    def warn_of_collapse(self) -> None:
        """Log a warning if embeddings of different cells have become almost equal."""
        last = self.epoch_means()
        if last["embedding_spread"] < MIN_SPREAD or last["embedding_rank"] < MIN_RANK:
            logger.warning(
                "epoch %d: embeddings have collapsed (spread %.3f of 1, effective rank %.1f): the "
                "encoder no longer separates cells; lower the learning rate, or raise the "
                "temperature or the batch",
                last["epoch"] + 1,
                last["embedding_spread"],
                last["embedding_rank"],
            )

    def format_epoch(self, num_epochs: int) -> str:
        """Return the latest epoch in one line of text."""
        last = self.epoch_means()
        share = last["waited_s"] / max(last["seconds"], 1e-9)
        return (
            f"epoch {last['epoch'] + 1} of {num_epochs}: loss {last['loss']:.4f}, "
            f"{last['crops_per_s']:,.0f} crops/s, {share:.1%} of the time waiting for crops, "
            f"effective rank of embeddings {last['embedding_rank']:.1f}"
        )


class Board:
    """Writer of a log to a run folder: `log.jsonl`, and `tensorboard/` for TensorBoard."""

    def __init__(self, uri: str, folder: Path, log: PretrainLog) -> None:
        """Begin to write.

        Args:
            uri: Run folder.
            folder: Local folder for TensorBoard's files; `publish` copies them to the run folder.
            log: The log to write.
        """
        self.uri, self.folder, self.log = uri, folder, log
        # Files of an earlier attempt may hold steps that are taken again: TensorBoard drops them.
        self._next = 0
        self._writer = SummaryWriter(str(folder), purge_step=len(log.steps))

    def publish(self) -> None:
        """Publish all steps since the last call."""
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
def open_board(uri: str, log: PretrainLog) -> Iterator[Board]:
    """Yield a Board that writes a log to the run folder `uri`; it is closed at the end."""
    with tempfile.TemporaryDirectory(prefix="scellst-ray-board-") as folder:
        board = Board(uri, Path(folder), log)
        try:
            yield board
        finally:
            board.close()
