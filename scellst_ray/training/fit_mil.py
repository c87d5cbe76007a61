"""Fitting the expression head with Ray Train: the plain fit, shared out over workers."""

import json
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import torch
from ray.train import Checkpoint, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model
from safetensors.torch import load_file, save_file

from scellst_ray import storage
from scellst_ray.models.bags import BagSet, split_spots
from scellst_ray.models.mil import MilHead
from scellst_ray.models.mil_fit import (
    FitConfig,
    FitResult,
    fit_head,
    new_head,
)

WEIGHTS, HISTORY = "head.safetensors", "history.json"


@dataclass(frozen=True)
class Workers:
    """What Ray Train may use: how many workers, their CPUs, and whether each has a GPU."""

    num_workers: int
    cpus_per_worker: int
    use_gpu: bool


def load_bags(uris: Sequence[str]) -> tuple[BagSet, list[str]]:
    """Read BAGS files, in order, into one set; return it with each spot's slide_id."""
    tables = [storage.read_table(uri, ["slide_id", "embedding", "target"]) for uri in uris]
    table = pa.concat_tables(tables).combine_chunks()
    bags = table["embedding"].combine_chunks()
    flat = bags.flatten()
    embeddings_LD = np.asarray(flat.flatten()).reshape(len(flat), -1)
    offsets = np.asarray(bags.offsets).astype(np.int64)
    targets = table["target"].combine_chunks()
    targets_SG = np.asarray(targets.flatten(), np.float32).reshape(len(targets), -1)
    bag_set = BagSet(
        torch.from_numpy(embeddings_LD.copy()),
        torch.from_numpy(offsets - offsets[0]),
        torch.from_numpy(targets_SG.copy()),
    )
    return bag_set, table["slide_id"].to_pylist()


def fit(
    uris: Sequence[str], config: FitConfig, workers: Workers, storage_path: str
) -> tuple[MilHead, FitResult]:
    """Fit a head on BAGS files.

    Args:
        uris: BAGS files, readable from every worker; their order matters to the result's digits.
        config: How to fit.
        workers: How many processes; the result does not depend on it.
        storage_path: Where Ray Train keeps its checkpoint meanwhile: local on one node, else
            shared.

    Returns:
        The head with the weights of the best validation epoch, and what happened.
    """
    fs, path = storage.resolve(storage_path)
    local = storage.is_local(storage_path)
    # A name of its own: Ray Train takes up the checkpoints of an earlier run of the same name.
    name = f".fit-{uuid.uuid4().hex[:8]}"
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={
            "uris": list(uris),
            "config": asdict(config),
            "num_threads": workers.cpus_per_worker,
        },
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus_per_worker}
            | ({"GPU": 1} if workers.use_gpu else {}),
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=name,
            storage_path=path,
            logging_config=LoggingConfig(log_level="WARNING"),
            storage_filesystem=None if local else pa.fs.PyFileSystem(pa.fs.FSSpecHandler(fs)),
        ),
    )
    try:
        result = trainer.fit()
        assert result.checkpoint is not None
        with result.checkpoint.as_directory() as folder:
            tensors = load_file(Path(folder) / WEIGHTS)
            found = json.loads((Path(folder) / HISTORY).read_text())
    finally:
        storage.remove_tree(storage.join(storage_path, name))
    weight = tensors["last.weight"]
    head = MilHead(len(tensors["mean_D"]), weight.shape[0], weight.shape[1])
    head.load_state_dict(tensors)
    history = [(train_loss, val_loss) for train_loss, val_loss in found["history"]]
    return head.eval(), FitResult(found["best_epoch"], found["best_loss"], history)


def _train_loop(loop: dict[str, Any]) -> None:
    """What each worker runs: `fit_head` with a rank."""
    config = FitConfig(**loop["config"])
    torch.set_num_threads(loop["num_threads"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    bags, slide_ids = load_bags(loop["uris"])
    train_spots, val_spots = split_spots(slide_ids, config.val_share, config.seed)
    train, val = bags.take(train_spots), bags.take(val_spots)
    head = new_head(train, config.seed).to(get_device())
    model = prepare_model(head, move_to_device=False) if world_size > 1 else head
    all_reduce = _all_reduce if world_size > 1 else None
    result = fit_head(
        head,
        train,
        val,
        config,
        model=model,
        rank=rank,
        world_size=world_size,
        all_reduce=all_reduce,
    )
    found = {"best_epoch": result.best_epoch, "best_loss": result.best_loss}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            state = {name: value.cpu().contiguous() for name, value in head.state_dict().items()}
            save_file(state, Path(folder) / WEIGHTS)
            (Path(folder) / HISTORY).write_text(json.dumps(found | {"history": result.history}))
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(found, checkpoint=checkpoint)


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(tensor)
    return tensor
