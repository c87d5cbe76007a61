"""Fit of the expression head with Ray Train: the plain fit, divided over workers.

A state file holds everything that later epochs depend on. If a worker dies, Ray Train starts the
workers again. If the whole job dies, the user starts it again. In both cases the fit continues from
the state file and gives the result of an undisturbed fit.

Checkpoints of Ray Train are not used. Its controller takes one report every two seconds, and an
epoch may take a hundredth of that.
"""

import hashlib
import io
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model

from scellst_ray import storage
from scellst_ray.models.mil.bags import BagSet
from scellst_ray.models.mil.fit import Fit, FitConfig, FitResult, fit_head, new_head
from scellst_ray.models.mil.head import MilHead
from scellst_ray.training.bag_files import load_split
from scellst_ray.training.known_address import fit_trainer

RESULT = "fit.pt"
# Storing the state takes at most this share of the time; epochs that were not stored are repeated.
STORING_SHARE = 0.1
# All bags are moved to the GPU if they take at most this share of its free memory.
DEVICE_SHARE = 0.6


@dataclass(frozen=True)
class Workers:
    """Resources of a fit.

    Attributes:
        num_workers: Number of processes. The result does not depend on it, except with dropout.
        cpus_per_worker: CPUs of each worker.
        use_gpu: Whether each worker has a GPU.
        max_failures: Number of times that dead workers are restarted.
        memory_gb: Memory for a worker's embeddings in GB (10^9 bytes). Larger embeddings lie in a
            file.
    """

    num_workers: int
    cpus_per_worker: int
    use_gpu: bool
    max_failures: int = 3
    memory_gb: float = 8.0


def fit(
    uris: Sequence[str],
    config: FitConfig,
    workers: Workers,
    storage_path: str,
    each_epoch: Callable[[Fit], None] | None = None,
) -> tuple[MilHead, FitResult]:
    """Fit a head on BAGS files.

    Args:
        uris: BAGS files, readable from every worker. Another order changes the last digits of the
            result.
        config: Settings of the fit.
        workers: Resources of the fit. The result does not depend on the number of workers, nor on
            their failures.
        storage_path: Folder for the state of the fit: local on one node, else shared. A fit of the
            same bags and settings that died is continued from it.
        each_epoch: Called on every worker after every epoch.

    Returns:
        The head with the weights of the best validation epoch, and the losses of all epochs.
    """
    # The name is unique, since Ray Train would continue an earlier run of the same name.
    name = f".fit-{uuid.uuid4().hex[:8]}"
    loop: dict[str, Any] = {
        "uris": list(uris),
        "config": asdict(config),
        "num_threads": workers.cpus_per_worker,
        "memory_bytes": workers.memory_gb * 1e9,
        "each_epoch": each_epoch,
        "storage_path": storage_path,
        "result": storage.join(storage_path, name, RESULT),
    }
    try:
        fit_trainer(_trainer(loop, workers, storage_path, name))
        state = _load(loop["result"])
    finally:
        storage.remove_tree(storage.join(storage_path, name))
    tensors, result = state["head"], state["result"]
    num_genes = len(tensors["last.weight"]) // config.ensemble
    hidden_dim = tensors["last.weight"].shape[1]
    head = MilHead(len(tensors["mean_D"]), num_genes, hidden_dim, config.formula())
    head.load_state_dict(tensors)
    history = [(train_loss, val_loss) for train_loss, val_loss in result["history"]]
    return head.eval(), FitResult(result["best_epoch"], result["best_loss"], history)


def _trainer(loop: dict[str, Any], workers: Workers, storage_path: str, name: str) -> TorchTrainer:
    """Return the trainer that runs _train_loop on the workers."""
    fs, path = storage.resolve(storage_path)
    local = storage.is_local(storage_path)
    return TorchTrainer(
        _train_loop,
        train_loop_config=loop,
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
            failure_config=FailureConfig(max_failures=workers.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            storage_filesystem=None if local else pa.fs.PyFileSystem(pa.fs.FSSpecHandler(fs)),
        ),
    )


def _train_loop(loop: dict[str, Any]) -> None:
    """Run `fit_head` on one worker."""
    config = FitConfig(**loop["config"])
    torch.set_num_threads(loop["num_threads"])
    context, device = ray.train.get_context(), get_device()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    train, val = load_split(loop["uris"], config, loop["memory_bytes"])
    head = new_head(train, config.seed, config.formula()).to(device)
    uri = storage.join(loop["storage_path"], f".fit-{_digest(config, train, val)}.pt")
    state_file = StateFile(uri)
    # All workers load before any can store a newer state: prepare_model waits for all of them.
    state = state_file.load()
    model = prepare_model(head, move_to_device=False) if world_size > 1 else head

    def each_epoch(fit: Fit) -> None:
        if rank == 0:
            state_file.store_if_due(fit)
        if loop["each_epoch"] is not None:
            loop["each_epoch"](fit)

    fit = fit_head(
        head,
        _move_if_room(train, device),
        _move_if_room(val, device),
        config,
        model=model,
        state=state,
        each_epoch=each_epoch,
        rank=rank,
        world_size=world_size,
        all_reduce=_all_reduce if world_size > 1 else None,
    )
    if rank == 0:
        _save(loop["result"], {"head": head.state_dict(), "result": asdict(fit)})
        state_file.remove()


class StateFile:
    """The file with the state of an unfinished fit."""

    def __init__(self, uri: str) -> None:
        """Set the address of the file; nothing is read or written yet."""
        self.uri, self.seconds, self.stored = uri, 0.0, -np.inf

    def load(self) -> dict[str, Any] | None:
        """Return the stored state; None if there is none."""
        return _load(self.uri) if storage.exists(self.uri) else None

    def store_if_due(self, fit: Fit) -> None:
        """Store the state of the fit, unless that would exceed STORING_SHARE of the time."""
        start = time.monotonic()
        if (start - self.stored) * STORING_SHARE < self.seconds:
            return
        _save(self.uri, fit.state_dict())
        self.stored = time.monotonic()
        self.seconds = self.stored - start

    def remove(self) -> None:
        """Remove the file if it exists."""
        if storage.exists(self.uri):
            storage.remove_tree(self.uri)


def _digest(config: FitConfig, train: BagSet, val: BagSet) -> str:
    """Return a digest of the settings and bags of a fit."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for bags in (train, val):
        for tensor in (bags.embeddings_LD, bags.offsets, bags.targets_SG, bags.size_factors_S):
            if tensor is not None:
                digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()[:16]


def _move_if_room(bags: BagSet, device: torch.device) -> BagSet:
    """Return bags on the GPU if they fit; else unchanged, and batches are moved one by one."""
    if device.type != "cuda":
        return bags
    size = bags.embeddings_LD.nbytes + bags.targets_SG.nbytes
    return bags.to(device) if size < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0] else bags


def _save(uri: str, state: dict[str, Any]) -> None:
    """Write tensors, numbers, and lists and dicts of them; the file is whole or absent."""
    storage.publish(uri, lambda path: torch.save(state, path))


def _load(uri: str) -> dict[str, Any]:
    """Read a file that _save wrote."""
    content = io.BytesIO(storage.read_bytes(uri))
    state: dict[str, Any] = torch.load(content, "cpu", weights_only=True)
    return state


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all workers, in place."""
    torch.distributed.all_reduce(tensor)
    return tensor
