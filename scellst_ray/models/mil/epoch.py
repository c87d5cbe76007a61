"""One epoch of fitting the MIL head, in one process or over several workers.

MIL is multiple-instance learning: a bag (spot) has a target, its instances (cells) have none.
Every worker sees the same global batches and takes every world_size-th spot of each.
DistributedDataParallel averages the gradients of workers. Local losses are weighted so that this
average is the gradient that one process would compute. With dropout each worker draws its own
masks.

Shape letters: S spots (bags), K members of an ensemble, G genes.
"""

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scellst_ray.models.mil.bags import BagSet, bag_mean
from scellst_ray.models.mil.head import MilHead, loss_sum

# Sums a tensor over all workers, in place or not, and returns it.
AllReduce = Callable[[Tensor], Tensor]


class WorkerOptions(TypedDict, total=False):
    """Keyword arguments of functions that all workers run together.

    Attributes:
        rank: Number of this worker, from 0.
        world_size: Number of workers.
        all_reduce: Function that sums a tensor over all workers.
    """

    rank: int
    world_size: int
    all_reduce: AllReduce | None


def bag_loss(model: nn.Module, bags: BagSet) -> Tensor:
    """Return the loss of these bags, summed over spots, members of the ensemble and genes.

    Args:
        model: The head, or the head in DistributedDataParallel.
        bags: Bags; they are moved to the device of the head if necessary.
    """
    head = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(head, MilHead)
    bags = bags.to(head.mean_D.device)
    prediction_SG = bag_mean(model(bags.embeddings_LD), bags.offsets)
    return loss_sum(head, prediction_SG, bags.targets_SG, bags.size_factors_S)


def num_terms(model: nn.Module, num_spots: int) -> int:
    """Return the number of terms in the loss of `num_spots` spots: spots x members x genes."""
    head = model.module if isinstance(model, DistributedDataParallel) else model
    return num_spots * len(head.last.bias)  # type: ignore[union-attr, arg-type]


def backward_batch(
    model: nn.Module, bags: BagSet, batch: NDArray[np.int64], rank: int = 0, world_size: int = 1
) -> Tensor:
    """Add this worker's gradient for one global batch; return its summed loss, float64.

    The worker takes batch[rank::world_size]. Its loss is weighted by world_size over the size of
    the global batch. Then the average of the gradients over workers is that of one process. A
    worker without spots still runs forward and backward, with a gradient of zero, since the
    collective calls inside backward need every worker.

    Raises:
        FloatingPointError: The loss is not finite. No step has been taken.
    """
    total = bag_loss(model, bags.take(batch[rank::world_size]))
    if not torch.isfinite(total):
        message = (
            f"training loss is {total.item()}: training stopped before the step. Check the "
            "embeddings for NaN and lower the learning rate."
        )
        raise FloatingPointError(message)
    weight = world_size / num_terms(model, len(batch))
    (total * weight).backward()  # type: ignore[no-untyped-call]
    return total.detach().double()


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
        optimiser: Optimiser over the model's parameters.
        bags: All training bags; every worker holds the same.
        batches: The epoch's global batches, the same on every worker (see epoch_batches).
        rank: Number of this worker, from 0.
        world_size: Number of workers.
        all_reduce: Function that sums a tensor over workers, for the returned loss. Needed when
            world_size > 1.

    Returns:
        The mean loss over the epoch's spots and genes, the same on every worker.
    """
    model.train()
    total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    for batch in batches:
        optimiser.zero_grad(set_to_none=True)
        total += backward_batch(model, bags, batch, rank, world_size)
        optimiser.step()
    count = num_terms(model, sum(len(batch) for batch in batches))
    return _mean_over_workers(total, count, world_size, all_reduce)


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
    """Return the mean loss over all bags and genes, the same on every worker.

    Workers share the spots as in training. The model's mode (training or evaluation) does not
    change. With DistributedDataParallel pass the wrapped `.module`, since workers may run different
    numbers of batches.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    mine = np.arange(len(bags), dtype=np.int64)[rank::world_size]
    for start in range(0, len(mine), batch_spots):
        total += bag_loss(model, bags.take(mine[start : start + batch_spots])).double()
    model.train(was_training)
    return _mean_over_workers(total, num_terms(model, len(bags)), world_size, all_reduce)


def _mean_over_workers(
    total: Tensor, count: int, world_size: int, all_reduce: AllReduce | None
) -> float:
    """Return the sum over workers divided by the global count."""
    if world_size > 1 and all_reduce is None:
        message = (
            f"world_size is {world_size}: pass all_reduce; without it the loss is that of one "
            "worker."
        )
        raise ValueError(message)
    return float(all_reduce(total) if all_reduce is not None else total) / count
