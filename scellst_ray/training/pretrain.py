"""Pretraining of the encoder with Ray Train: the plain loop of moco_loop.py on several workers.

A checkpoint holds network, momentum network, optimiser, step and log. A run continues from it after
a worker, a node or the driver died, and when the number of workers changes.
"""

import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from scellst_ray import storage
from scellst_ray.core.logs import log_own_lines
from scellst_ray.models.encoder.encoder import load_encoder
from scellst_ray.models.encoder.weights_file import local_weights
from scellst_ray.models.moco.lars import new_moco_optimiser
from scellst_ray.models.moco.model import new_moco
from scellst_ray.models.moco.network import Moco
from scellst_ray.models.moco.step import process_group
from scellst_ray.models.moco.sync_norm import convert
from scellst_ray.runs.crop_store import open_store
from scellst_ray.training.known_address import fit_trainer
from scellst_ray.training.moco_loop import Recipe, Step, crop_order, run_steps
from scellst_ray.training.pretrain_log import PretrainLog, open_board

STATE, LOG = "state.pt", "log.json"
# Loss reported for a checkpoint in the middle of an epoch, so that it is never the best.
UNFINISHED = 1e9
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainWorkers:
    """Resources of pretraining.

    Attributes:
        num_workers: Number of workers, or the smallest and the largest number.
        cpus_per_worker: CPUs of each worker.
        use_gpu: Whether each worker has a GPU.
        max_failures: Number of times that workers may die before the run fails.
        crops_at_once: Largest number of crops that a worker's device holds; None: its whole share
            of a batch.
    """

    num_workers: int | tuple[int, int]
    cpus_per_worker: int
    use_gpu: bool
    max_failures: int
    crops_at_once: int | None


@dataclass(frozen=True)
class Keeping:
    """Settings of checkpoints.

    Attributes:
        uri: Folder of the run, readable from every worker: local on one node, else shared.
        steps: Number of steps between checkpoints. The end of each epoch always has one.
        num_best: Number of epochs with the lowest training loss to keep, besides the latest.
    """

    uri: str
    steps: int
    num_best: int


def pretrain(
    crops: Sequence[str],
    recipe: Recipe,
    init: str | None,
    workers: PretrainWorkers,
    keep: Keeping,
    each_step: Callable[[Step], None] | None = None,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Pretrain an encoder, or continue an earlier call on the same folder.

    Args:
        crops: Run folders of `extract` that have crops.
        recipe: Settings that decide the result.
        init: Encoder file with the first weights, readable from every worker; None: random weights.
        workers: Resources. The result does not depend on them, except for rounding.
        keep: Settings of checkpoints.
        each_step: Called by every worker after each of its steps.

    Returns:
        The checkpoint of the epoch with the lowest mean training loss, and its metrics.

    Raises:
        RuntimeError: training ended without a checkpoint.
    """
    loop = {
        "crops": list(crops),
        "recipe": recipe,
        "init": init,
        "workers": workers,
        "keep": keep,
        "each_step": each_step,
    }
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config=loop,
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,  # type: ignore[arg-type]
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus_per_worker}
            | ({"GPU": 1} if workers.use_gpu else {}),
        ),
        run_config=_run_config(workers, keep),
    )
    result = fit_trainer(trainer)
    best = min(result.best_checkpoints or [], key=lambda pair: pair[1]["loss"], default=None)
    if best is None:
        message = (
            f"{keep.uri}: training ended without a checkpoint; see the workers' errors above, and "
            "run the command again"
        )
        raise RuntimeError(message)
    return best


def _run_config(workers: PretrainWorkers, keep: Keeping) -> RunConfig:
    fs, path = storage.resolve(keep.uri)
    local = storage.is_local(keep.uri)
    return RunConfig(  # type: ignore[call-arg]
        # The name is always the same, so Ray Train continues from the checkpoints it finds there.
        name="checkpoints",
        storage_path=path,
        storage_filesystem=None if local else pa.fs.PyFileSystem(pa.fs.FSSpecHandler(fs)),
        failure_config=FailureConfig(max_failures=workers.max_failures),
        checkpoint_config=CheckpointConfig(
            num_to_keep=keep.num_best,
            checkpoint_score_attribute="loss",
            checkpoint_score_order="min",
        ),
        logging_config=LoggingConfig(log_level="WARNING"),
    )


def encoder_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the weights of the online backbone in a checkpoint."""
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)
    prefix = "online.backbone."
    model = state["model"]
    return {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}


def _train_loop(loop: dict[str, Any]) -> None:
    """Run the steps of pretraining on one worker."""
    # A worker's standard error reaches the driver.
    log_own_lines()
    torch.set_num_threads(loop["workers"].cpus_per_worker)
    recipe: Recipe = loop["recipe"]
    collective, device = process_group(), get_device()
    order = crop_order(open_store(loop["crops"]), recipe)
    model = new_model(recipe, loop["init"])
    model.to(device).to(memory_format=torch.channels_last)
    convert(model, collective.all_reduce, collective.world_size)
    optimiser = new_moco_optimiser(
        recipe.optimiser, model, lr=recipe.base_lr, weight_decay=recipe.weight_decay
    )
    log = PretrainLog()
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)
            log = PretrainLog.from_json((Path(folder) / LOG).read_text())
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
    steps = run_steps(
        model,
        optimiser,
        order,
        recipe,
        collective,
        first_step=len(log.steps),
        crops_at_once=loop["workers"].crops_at_once,
    )
    is_first = collective.rank == 0
    with ExitStack() as stack:
        board = stack.enter_context(open_board(loop["keep"].uri, log)) if is_first else None
        for step in steps:
            log.add(step, recipe.batch, collective.world_size)
            if loop["each_step"] is not None:
                loop["each_step"](step)
            is_last = step.number + 1 == order.steps_per_epoch
            if not is_last and len(log.steps) % loop["keep"].steps:
                continue
            if board is not None:
                board.publish()
            if is_first and is_last:
                logger.info("%s", log.format_epoch(recipe.epochs))
                log.warn_of_collapse()
            metrics = log.epoch_means() if is_last else log.epoch_means() | {"loss": UNFINISHED}
            _report(metrics, model, optimiser, log if is_first else None)


def new_model(recipe: Recipe, init: str | None) -> Moco:
    """Return the network with its first weights, on the CPU."""
    model = new_moco(recipe.arch, recipe.seed, recipe.moco, checkpointing=recipe.recompute)
    if init is not None:
        state = load_encoder(local_weights(init)).network.state_dict()
        model.online.backbone.load_state_dict(state)
        model.momentum.backbone.load_state_dict(state)
    return model


def _report(
    metrics: dict[str, Any],
    model: Moco,
    optimiser: torch.optim.Optimizer,
    log: PretrainLog | None,
) -> None:
    """Report metrics to Ray Train; if there is a log, with a checkpoint.

    The checkpoint is uploaded while training continues.
    """
    if log is None:
        ray.train.report(metrics)
        return
    folder = Path(tempfile.mkdtemp(prefix="scellst-ray-checkpoint-"))
    state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
    torch.save(state, folder / STATE)
    (folder / LOG).write_text(log.to_json())
    ray.train.report(
        metrics,
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )
