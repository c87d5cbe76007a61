"""Fitting the MIL head: plain functions, the same for one process and for each of many workers.

Every worker sees the same global batches and takes every world_size-th spot of each. Local losses
are weighted so that the average of the gradients over workers, which is what
DistributedDataParallel computes, is the gradient one process would get.

Shape letters: L instances of all bags (a cell under two spots counts twice), S spots, D, G.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scellst_ray.models.bags import BagSet, epoch_batches
from scellst_ray.models.mil import MilHead, bag_mean, mil_loss

# Sums a tensor over all workers, in place or not, and returns it.
AllReduce = Callable[[Tensor], Tensor]


class Among(TypedDict, total=False):
    """Which worker this is, among how many: keywords of what workers run together."""

    rank: int
    world_size: int
    all_reduce: AllReduce | None


@dataclass(frozen=True)
class FitConfig:
    """How the head is fitted; defaults are those of sCellST.

    Attributes:
        lr: AdamW learning rate.
        weight_decay: AdamW weight decay.
        batch_spots: Spots per global batch, over all workers.
        max_epochs: Upper bound on epochs.
        patience: Epochs without a better validation loss before stopping.
        seed: Fixes initial weights, the split and the order of spots.
        val_share: Share of each slide's spots held out for early stopping.
    """

    lr: float = 1e-4
    weight_decay: float = 0.01
    batch_spots: int = 128
    max_epochs: int = 400
    patience: int = 20
    seed: int = 0
    val_share: float = 0.2

    def __post_init__(self) -> None:
        """Refuse values that cannot be trained with.

        Raises:
            ValueError: Naming the field, its value and what is allowed.
        """
        allowed = {
            "lr": (math.isfinite(self.lr) and self.lr > 0, "a positive number"),
            "weight_decay": (
                math.isfinite(self.weight_decay) and self.weight_decay >= 0,
                "0 or a positive number",
            ),
            "batch_spots": (self.batch_spots >= 1, "at least 1"),
            "max_epochs": (self.max_epochs >= 1, "at least 1"),
            "patience": (self.patience >= 1, "at least 1"),
            "seed": (self.seed >= 0, "0 or above"),
            "val_share": (0 < self.val_share < 1, "between 0 and 1, both excluded"),
        }
        for name, (is_allowed, expected) in allowed.items():
            if not is_allowed:
                message = f"{name} is {getattr(self, name)}, expected {expected}."
                raise ValueError(message)


def backward_batch(
    model: nn.Module, bags: BagSet, batch: NDArray[np.int64], rank: int = 0, world_size: int = 1
) -> Tensor:
    """Add this worker's gradient for one global batch; return its summed squared error, float64.

    The worker takes batch[rank::world_size]. Its loss is weighted by world_size over the size of
    the global batch, so that averaging gradients over workers gives those of one process. A
    worker without spots still runs forward and backward, on nothing: the collective calls inside
    backward need every worker, and its gradient is zero.

    Raises:
        FloatingPointError: Where the loss is not finite, before any step is taken.
    """
    device = next(model.parameters()).device
    local = bags.take(batch[rank::world_size])
    targets_SG = local.targets_SG.to(device)
    prediction_SG = bag_mean(model(local.embeddings_LD.to(device)), local.offsets)
    loss = mil_loss(prediction_SG, targets_SG, len(batch))
    if not torch.isfinite(loss):
        message = (
            f"training loss is {loss.item()}: stopped before the step. Check embeddings for NaN "
            "and lower the learning rate."
        )
        raise FloatingPointError(message)
    (loss * world_size).backward()  # type: ignore[no-untyped-call]
    return loss.detach().double() * (len(batch) * targets_SG.shape[1])


def train_epoch(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    bags: BagSet,
    batches: Sequence[NDArray[np.int64]],
    *,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: AllReduce | None = None,
) -> float:
    """Take one optimiser step per global batch.

    Args:
        model: The head, or the head wrapped in DistributedDataParallel when world_size > 1.
        optimiser: Over the model's parameters.
        bags: All training bags (each worker holds the same).
        batches: The epoch's global batches, the same on every worker (see epoch_batches).
        rank: This worker.
        world_size: Workers.
        all_reduce: Sums a tensor over workers, for the reported loss; needed when world_size > 1.

    Returns:
        The mean squared error over the epoch's spots and genes, the same on every worker.
    """
    model.train()
    total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    for batch in batches:
        optimiser.zero_grad(set_to_none=True)
        total += backward_batch(model, bags, batch, rank, world_size)
        optimiser.step()
    num_spots = sum(len(batch) for batch in batches)
    return _mean_over_workers(total, num_spots * bags.targets_SG.shape[1], world_size, all_reduce)


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    bags: BagSet,
    batch_spots: int = 128,
    *,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: AllReduce | None = None,
) -> float:
    """Return the mean squared error over all bags and genes, the same on every worker.

    Workers share the spots as in training; the model's mode is left as it was found. With
    DistributedDataParallel pass the wrapped `.module`, since workers may run different numbers
    of batches.
    """
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=parameter.device)
    mine = np.arange(len(bags), dtype=np.int64)[rank::world_size]
    for start in range(0, len(mine), batch_spots):
        part = bags.take(mine[start : start + batch_spots])
        prediction_SG = bag_mean(model(part.embeddings_LD.to(parameter.device)), part.offsets)
        error_SG = prediction_SG.double() - part.targets_SG.to(parameter.device).double()
        total += error_SG.square().sum()
    model.train(was_training)
    return _mean_over_workers(total, bags.targets_SG.numel(), world_size, all_reduce)


def _mean_over_workers(
    total: Tensor, count: int, world_size: int, all_reduce: AllReduce | None
) -> float:
    """Sum over workers and divide by the global count."""
    if world_size > 1 and all_reduce is None:
        message = f"world_size is {world_size}: pass all_reduce, or the loss is one worker's share."
        raise ValueError(message)
    return float(all_reduce(total) if all_reduce is not None else total) / count


@dataclass
class EarlyStopping:
    """Counts epochs without a better validation loss.

    Attributes:
        patience: Epochs to wait.
        best: Lowest loss so far.
        wait: Epochs since then.
    """

    patience: int = 20
    best: float = math.inf
    wait: int = 0

    def update(self, loss: float) -> bool:
        """Take an epoch's loss; return whether it is the best so far (NaN never is)."""
        if loss < self.best:
            self.best, self.wait = loss, 0
            return True
        self.wait += 1
        return False

    @property
    def should_stop(self) -> bool:
        """Whether patience is spent."""
        return self.wait >= self.patience


@dataclass(frozen=True)
class FitResult:
    """What fitting did.

    Attributes:
        best_epoch: Epoch (from 0) whose weights the head now holds.
        best_loss: Its validation loss.
        history: Per epoch, (training loss, validation loss).
    """

    best_epoch: int
    best_loss: float
    history: list[tuple[float, float]] = field(default_factory=list)


def new_head(train: BagSet, seed: int) -> MilHead:
    """Make a head for these bags: weights fixed by the seed, inputs standardised by the bags.

    torch's global random state is left as it was found.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = MilHead(train.embeddings_LD.shape[1], train.targets_SG.shape[1])
    head.standardise(train.embeddings_LD)
    return head


def new_optimiser(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """Make the optimiser of the paper, AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def fit_head(
    head: MilHead,
    train: BagSet,
    val: BagSet,
    config: FitConfig,
    model: nn.Module | None = None,
    **among: Unpack[Among],
) -> FitResult:
    """Fit a head; it ends with the weights of the best validation epoch.

    Args:
        head: From new_head, the same on every worker.
        train: All training bags (each worker holds the same).
        val: All validation bags.
        config: How.
        model: The head wrapped for world_size > 1; the head itself when None.
        **among: rank, world_size and all_reduce as train_epoch takes them; without them this is
            the plain fit in this process.
    """
    model = head if model is None else model
    optimiser = new_optimiser(model, config)
    stopping = EarlyStopping(config.patience)
    history: list[tuple[float, float]] = []
    best_epoch, best_state = 0, copy.deepcopy(head.state_dict())
    for epoch in range(config.max_epochs):
        batches = epoch_batches(len(train), config.batch_spots, config.seed, epoch)
        train_loss = train_epoch(model, optimiser, train, batches, **among)
        history.append((train_loss, validation_loss(head, val, config.batch_spots, **among)))
        if stopping.update(history[-1][1]):
            best_epoch, best_state = epoch, copy.deepcopy(head.state_dict())
        if stopping.should_stop:
            break
    head.load_state_dict(best_state)
    return FitResult(best_epoch, stopping.best, history)
