"""One optimiser step of MoCo v3, the same for one process and for each of many workers.

A step first embeds all keys, of all micro-batches and workers, so that every query has every key
of the effective batch as negatives, however the batch is split. Only statistics of batch norms are
those of a micro-batch over all workers. Then each micro-batch adds its share of the gradient,
gradients are summed over workers, checked, and the optimiser steps.

Order of the momentum update: Algorithm 1 of Chen, Xie, He 2021 moves the momentum encoder after the
optimiser, and so does this. The published code moves it in the next step instead, before its keys,
which gives the same keys: in its first step both encoders are still equal.

Shape letters: N crops of a micro-batch, L crops of this worker, M of all workers, P projection.
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
MAX_ROWS = 128  # crops that collapse is measured on


@dataclass(frozen=True)
class Collective:
    """This worker among all, and how tensors travel; by default it is alone.

    Attributes:
        rank: This worker.
        world_size: Workers.
        all_reduce: Sums a tensor over workers, in place or not, and returns the sum, the same bits
            on every worker.
        all_gather: Returns every worker's tensor, all of one shape, in order of rank.
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
        found = [torch.empty_like(tensor) for _ in range(world_size)]
        torch.distributed.all_gather(found, tensor.contiguous())
        return found

    return Collective(torch.distributed.get_rank(), world_size, all_reduce, all_gather)


@dataclass(frozen=True)
class StepResult:
    """What one step did. Loss and gradient are the same on every worker, the rest is its own.

    A spread is 1 where unit vectors point everywhere alike and 0 where all are equal; an effective
    rank counts the dimensions they fill. Keys pass a batch norm that hides collapse from their
    spread: read their rank, and both numbers of the embedding.

    Attributes:
        loss: Symmetric loss over the effective batch; 4 T log M where queries know nothing.
        grad_norm: Length of the gradient over all parameters.
        embedding_spread: Of the momentum backbone's embeddings of the first views.
        embedding_rank: Their effective rank.
        key_spread: Of the keys.
        key_rank: Their effective rank.
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
        model: With norms from `sync_norm.convert` where there are several workers.
        optimiser: Over the parameters that take gradients; its learning rate is set here.
        views: This worker's micro-batches: first and second view of the same crops, each
            [N, 3, H, W], already augmented, on the model's device. Every worker holds the same
            number of micro-batches; their sizes may differ, also between workers.
        lr: Learning rate of this step.
        momentum: Of the momentum encoder.
        collective: This worker among others; alone by default.
        precision: What the networks compute in, 'float32' or 'bfloat16'; losses and sums are
            float32.

    Raises:
        FloatingPointError: Loss or gradient of any worker is not finite: raised on all workers,
            before any parameter has changed. Running statistics of norms may have taken it in.
        ValueError: Views or workers that do not fit together, or another precision.
    """
    collective = Collective() if collective is None else collective
    _check_views(views)
    model.train()
    embedding_ND, first_MP, second_MP, row = _all_keys(model, views, collective, precision)
    gradients = _FlatGradients(model)
    loss = first_MP.new_zeros(())
    for pair in views:
        # Each view's graph is freed before the next is built: half the memory, the same gradient.
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
    """Return the context the networks compute in."""
    if precision not in PRECISIONS:
        message = (
            f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}; float16 would "
            "lose small gradients."
        )
        raise ValueError(message)
    # The type is not used where autocast is off, but must be one that it knows.
    return torch.autocast(x.device.type, torch.bfloat16, enabled=precision != "float32")


def _check_views(views: Views) -> None:
    """Refuse what no step can be taken on."""
    sizes = [(tuple(x.shape), tuple(y.shape)) for x, y in views]
    if not sizes or any(x != y for x, y in sizes):
        message = (
            f"views have the shapes {sizes}, expected at least one micro-batch, and as many crops "
            "in its first view as in its second."
        )
        raise ValueError(message)


def _all_keys(
    model: Moco, views: Views, collective: Collective, precision: str
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return this worker's first embeddings, all workers' keys [M, P] of both views, and a row.

    Keys are in order of rank, then of micro-batch; this worker's begin at the row.
    """
    counts = _counts(views, collective)
    embeddings, firsts, seconds = [], [], []
    for x, y in views:
        with _autocast(x, precision):
            embedding_ND, first_NP = model.embed_keys(x)
            seconds.append(model.keys(y))
        firsts.append(first_NP)
        embeddings.append(embedding_ND)
    # Both views of this worker, 2 x L x P, with zeros below up to the most that a worker has.
    mine = torch.stack([torch.cat(firsts), torch.cat(seconds)])
    mine = torch.nn.functional.pad(mine, (0, 0, 0, max(counts) - mine.shape[1]))
    gathered = collective.all_gather(mine)
    both = torch.cat([part[:, :n] for part, n in zip(gathered, counts, strict=True)], dim=1)
    first_MP, second_MP = both.unbind()
    return torch.cat(embeddings), first_MP, second_MP, sum(counts[: collective.rank])


def _counts(views: Views, collective: Collective) -> list[int]:
    """Return how many crops each worker has, in order of rank.

    Raises:
        ValueError: Workers differ in their number of micro-batches; all workers raise it.
    """
    mine = torch.tensor([len(views), sum(len(x) for x, _ in views)], device=views[0][0].device)
    found = [part.tolist() for part in collective.all_gather(mine)]
    if len(found) != collective.world_size or len({parts for parts, _ in found}) != 1:
        message = (
            f"workers hold {[parts for parts, _ in found]} micro-batches, expected the same number "
            f"on each of {collective.world_size} workers: they would wait for each other forever."
        )
        raise ValueError(message)
    return [count for _, count in found]


class _FlatGradients:
    """All gradients of a model in one buffer, so that they travel and are checked at once."""

    def __init__(self, model: nn.Module) -> None:
        """Give every parameter that learns a zero gradient that lies in the buffer."""
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.params = [parameter for _, parameter in named]
        sizes = [parameter.numel() for parameter in self.params]
        # The last number is for the loss, which travels with them.
        self.flat = self.params[0].new_zeros(sum(sizes) + 1)
        parts = torch.split(self.flat[:-1], sizes)
        for parameter, part in zip(self.params, parts, strict=True):
            # Laid out as the parameter is, channels last or not; its memory has no gaps.
            parameter.grad = part.as_strided(
                parameter.shape, parameter.stride(), part.storage_offset()
            )

    def join(self, loss: Tensor, collective: Collective) -> tuple[float, float]:
        """Sum gradients and loss over workers, check them, and return loss and gradient norm.

        Raises:
            FloatingPointError: Some number is not finite; workers hold the same sums and agree.
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
            f"{self._first_bad(gradient)}: stopped before the step, parameters are as they were. "
            "Lower the learning rate or warm up for longer, use bfloat16 or float32, and check "
            "the crops' mean and standard deviation."
        )
        raise FloatingPointError(message)

    def _first_bad(self, gradient: Tensor) -> str:
        """Name the first parameter whose gradient is not finite."""
        parts = torch.split(gradient, [parameter.numel() for parameter in self.params])
        bad = [n for n, p in zip(self.names, parts, strict=True) if not p.isfinite().all()]
        return f" (not finite in {len(bad)} tensors, {bad[0]} first)" if bad else ""


@torch.no_grad()
def collapse(x_NP: Tensor) -> tuple[float, float]:
    """Measure how far vectors have collapsed, on at most 128 rows spread over the batch.

    Returns:
        Spread: the standard deviation of unit vectors, averaged over dimensions, times sqrt(P).
        Effective rank (Roy, Vetterli 2007): exp of the entropy of the singular values, made to
        sum to 1, of the centred unit vectors; 1 where they do not differ at all. NaN of no rows.
    """
    if len(x_NP) == 0:
        return math.nan, math.nan
    rows = torch.linspace(0, len(x_NP) - 1, min(len(x_NP), MAX_ROWS)).long()
    unit = torch.nn.functional.normalize(x_NP[rows.to(x_NP.device)].float(), dim=1)
    spread = unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5
    centred = unit.double() - unit.double().mean(dim=0)
    # Squares of singular values, from the smaller of the two Gram matrices; what is below the
    # rounding of float32 is no dimension.
    small = centred @ centred.T if len(rows) < unit.shape[1] else centred.T @ centred
    squares = torch.linalg.eigvalsh(small)
    floor = torch.finfo(torch.float32).eps * max(float(unit.square().sum()), 1e-30)
    singular = squares[squares > floor].sqrt()
    share = singular / singular.sum()
    return float(spread), float(torch.exp(-(share * share.log()).sum()))
