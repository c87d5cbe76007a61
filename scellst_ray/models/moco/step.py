"""One optimiser step of MoCo v3, the same for one process and for each of several workers.

The effective batch consists of the micro-batches of all workers. A step has these parts:

1. All keys of the effective batch are embedded. Every query has all of them as negatives, however
   the batch is split. Only batch norms see a single micro-batch, of all workers.
2. Each micro-batch adds its share of the gradient.
3. Gradients are summed over workers and checked, then the optimiser steps.
4. The momentum encoder moves.

Chen, Xie, He 2021 move the momentum encoder after the optimiser (Algorithm 1), as is done here. The
published code moves it in the next step, before the keys. Both give the same keys, since both
encoders are equal in the first step of the published code.

Shape letters: N crops of a micro-batch, L crops of this worker, M crops of all workers, D
embedding, P projection.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scellst_ray.models.moco.network import Moco, contrastive_loss
from scellst_ray.models.moco.sync_norm import AllReduce

Views = Sequence[tuple[Tensor, Tensor]]
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_ROWS = 128  # number of crops in the measurement of collapse


@dataclass(frozen=True)
class Collective:
    """The place of this worker among all workers, and their collective calls; default: one worker.

    Attributes:
        rank: Number of this worker, from 0.
        world_size: Number of workers.
        all_reduce: Function that returns the sum of a tensor over workers, the same bits on every
            worker. It may work in place.
        all_gather: Function that returns the tensors of all workers in order of rank. All have one
            shape.
    """

    rank: int = 0
    world_size: int = 1
    all_reduce: AllReduce = lambda tensor: tensor
    all_gather: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: [tensor]


def process_group() -> Collective:
    """Return the collective of torch.distributed's default group, or of one process without it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Collective()
    world_size = torch.distributed.get_world_size()

    def all_reduce(tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor

    def all_gather(tensor: Tensor) -> Sequence[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(world_size)]
        torch.distributed.all_gather(gathered, tensor.contiguous())
        return gathered

    return Collective(torch.distributed.get_rank(), world_size, all_reduce, all_gather)


@dataclass(frozen=True)
class StepResult:
    """The result of one step.

    Loss and gradient are the same on every worker. All other numbers are those of this worker. The
    spread of vectors is 1 if they point evenly in all directions, and 0 if all are equal. Their
    effective rank is the number of dimensions that they fill. Keys pass a batch norm that hides
    collapse from their spread. Therefore collapse shows in their rank and in both numbers of the
    embeddings.

    Attributes:
        loss: Symmetric loss over the effective batch. It is 4 T log M if queries hold no
            information, with temperature T.
        grad_norm: Length of the gradient over all parameters.
        embedding_spread: Spread of the momentum backbone's embeddings of the first views.
        embedding_rank: Effective rank of these embeddings.
        key_spread: Spread of the keys of the first views.
        key_rank: Effective rank of these keys.
    """

    loss: float
    grad_norm: float
    embedding_spread: float
    embedding_rank: float
    key_spread: float
    key_rank: float


def moco_step(
    model: Moco,
    optimiser: torch.optim.Optimizer,
    views: Views,
    *,
    lr: float,
    momentum: float,
    collective: Collective | None = None,
    precision: str = "float32",
) -> StepResult:
    """Take one step.

    Args:
        model: Model; with several workers its norms are those of `sync_norm.convert`.
        optimiser: Optimiser over the trainable parameters; this function sets its learning rate.
        views: This worker's micro-batches. Each holds the first and the second view of the same
            crops, augmented, [N, 3, H, W] each, on the model's device. Every worker has the same
            number of micro-batches. Their sizes may differ, also between workers.
        lr: Learning rate of this step.
        momentum: Share of its own weights that the momentum encoder keeps, 0 to 1.
        collective: Place of this worker among all; None: one worker.
        precision: Precision of the networks, 'float32' or 'bfloat16'. Losses and sums are float32.

    Raises:
        FloatingPointError: The loss or the gradient of a worker is not finite. All workers raise
            the error, and no parameter has changed. Running statistics of norms may have changed.
        ValueError: Views or workers do not fit together, or the precision is unknown.
    """
    collective = Collective() if collective is None else collective
    _check_views(views)
    model.train()
    embedding_ND, first_MP, second_MP, row = _gather_keys(model, views, collective, precision)
    gradients = _FlatGradients(model)
    loss = first_MP.new_zeros(())
    for pair in views:
        # Each view's graph is freed before the next one is built, which halves the memory.
        for x, k_MP in zip(pair, (second_MP, first_MP), strict=True):
            with _autocast(x, precision):
                q_NP = model.queries(x)
            share = contrastive_loss(q_NP, k_MP, row, model.config.temperature, len(k_MP))
            share.backward()  # type: ignore[no-untyped-call]
            loss += share.detach()
        row += len(pair[0])
    total, grad_norm = gradients.join(loss, collective)
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    model.update_momentum(momentum)
    embedding, key = collapse(embedding_ND), collapse(first_MP)
    return StepResult(total, grad_norm, *embedding, *key)


def _autocast(x: Tensor, precision: str) -> torch.autocast:
    """Return the context that sets the precision of the networks."""
    if precision not in PRECISIONS:
        message = (
            f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}; float16 would "
            "lose small gradients."
        )
        raise ValueError(message)
    # Without autocast the type is not used, but torch checks that it is a valid one.
    return torch.autocast(x.device.type, torch.bfloat16, enabled=precision != "float32")


def _check_views(views: Views) -> None:
    """Refuse views without a micro-batch, and micro-batches whose two views differ in shape."""
    sizes = [(tuple(x.shape), tuple(y.shape)) for x, y in views]
    if not sizes or any(x != y for x, y in sizes):
        message = (
            f"views have the shapes {sizes}, expected at least one micro-batch whose first and "
            "second view have the same shape."
        )
        raise ValueError(message)


def _gather_keys(
    model: Moco, views: Views, collective: Collective, precision: str
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return this worker's embeddings, the keys of all workers, and a row.

    Returns:
        (embeddings [L, D] of this worker's first views, keys [M, P] of the first views, keys [M, P]
        of the second views, row where this worker's keys begin). Keys are in order of rank, then of
        micro-batch.
    """
    counts = _gather_counts(views, collective)
    embeddings, firsts, seconds = [], [], []
    for x, y in views:
        with _autocast(x, precision):
            embedding_ND, first_NP = model.embed_keys(x)
            seconds.append(model.keys(y))
        firsts.append(first_NP)
        embeddings.append(embedding_ND)
    # Both views of this worker [2, L, P], padded with zeros to the largest L of a worker.
    mine = torch.stack([torch.cat(firsts), torch.cat(seconds)])
    mine = torch.nn.functional.pad(mine, (0, 0, 0, max(counts) - mine.shape[1]))
    gathered = collective.all_gather(mine)
    both = torch.cat([part[:, :n] for part, n in zip(gathered, counts, strict=True)], dim=1)
    first_MP, second_MP = both.unbind()
    return torch.cat(embeddings), first_MP, second_MP, sum(counts[: collective.rank])


def _gather_counts(views: Views, collective: Collective) -> list[int]:
    """Return the number of crops of each worker, in order of rank.

    Raises:
        ValueError: Workers differ in their number of micro-batches. All workers raise the error.
    """
    mine = torch.tensor([len(views), sum(len(x) for x, _ in views)], device=views[0][0].device)
    gathered = [part.tolist() for part in collective.all_gather(mine)]
    if len(gathered) != collective.world_size or len({parts for parts, _ in gathered}) != 1:
        message = (
            f"workers hold {[parts for parts, _ in gathered]} micro-batches, expected the same "
            f"number on each of {collective.world_size} workers: otherwise they would wait for "
            "each other forever."
        )
        raise ValueError(message)
    return [count for _, count in gathered]


class _FlatGradients:
    """All gradients of a model in one buffer: one collective call and one check serve them all."""

    def __init__(self, model: nn.Module) -> None:
        """Give every trainable parameter a zero gradient that lies in the buffer."""
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.params = [parameter for _, parameter in named]
        sizes = [parameter.numel() for parameter in self.params]
        # The last number is the loss, which is summed in the same call.
        self.flat = self.params[0].new_zeros(sum(sizes) + 1)
        parts = torch.split(self.flat[:-1], sizes)
        for parameter, part in zip(self.params, parts, strict=True):
            # The gradient has the parameter's layout, channels last or not, without gaps.
            parameter.grad = part.as_strided(
                parameter.shape, parameter.stride(), part.storage_offset()
            )

    def join(self, loss: Tensor, collective: Collective) -> tuple[float, float]:
        """Sum gradients and loss over workers, check them, and return loss and gradient norm.

        Raises:
            FloatingPointError: A number is not finite. All workers hold the same sums, so all
                raise the error.
        """
        self.flat[-1] = loss
        if collective.world_size > 1:
            total = collective.all_reduce(self.flat)
            if total is not self.flat:
                self.flat.copy_(total)
        gradient = self.flat[:-1]
        values = torch.stack([self.flat[-1], torch.linalg.vector_norm(gradient)])
        total_loss, norm = values.tolist()
        if not math.isfinite(norm) and bool(gradient.isfinite().all()):
            norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        if math.isfinite(total_loss) and math.isfinite(norm):
            return total_loss, norm
        for parameter in self.params:
            parameter.grad = None
        message = (
            f"loss is {total_loss}, length of the gradient {norm}"
            f"{self._describe_infinite(gradient)}: stopped before the step, parameters have not "
            "changed. Lower the learning rate or warm up for longer, use bfloat16 or float32, and "
            "check the crops' mean and standard deviation."
        )
        raise FloatingPointError(message)

    def _describe_infinite(self, gradient: Tensor) -> str:
        """Return how many tensors are not finite and which one is first; '' if all are finite."""
        parts = torch.split(gradient, [parameter.numel() for parameter in self.params])
        names = [n for n, p in zip(self.names, parts, strict=True) if not p.isfinite().all()]
        return f" (not finite in {len(names)} tensors, {names[0]} first)" if names else ""


@torch.no_grad()
def collapse(x_NP: Tensor) -> tuple[float, float]:
    """Measure how far vectors have collapsed, on at most 128 rows spread evenly over the batch.

    Returns:
        (spread, effective rank). Spread is the standard deviation of the unit vectors, averaged
        over dimensions, times sqrt(P). Effective rank (Roy, Vetterli 2007) is exp of the entropy
        of the singular values of the centred unit vectors, scaled to sum to 1. It is 1 if all
        vectors are equal. Both are NaN without rows.
    """
    if len(x_NP) == 0:
        return math.nan, math.nan
    rows = torch.linspace(0, len(x_NP) - 1, min(len(x_NP), MAX_ROWS)).long()
    unit = torch.nn.functional.normalize(x_NP[rows.to(x_NP.device)].float(), dim=1)
    spread = unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5
    centred = unit.double() - unit.double().mean(dim=0)
    # The smaller of the two Gram matrices gives the squares of the singular values. Squares below
    # the rounding of float32 count as 0.
    gram = centred @ centred.T if len(rows) < unit.shape[1] else centred.T @ centred
    squares = torch.linalg.eigvalsh(gram)
    floor = torch.finfo(torch.float32).eps * max(float(unit.square().sum()), 1e-30)
    singular = squares[squares > floor].sqrt()
    share = singular / singular.sum()
    return float(spread), float(torch.exp(-(share * share.log()).sum()))
