"""MoCo v3: two encoders, a symmetric contrastive loss and the schedules of its training.

The method is from Chen, Xie, He 2021, "An empirical study of training self-supervised vision
transformers", Algorithm 1 and the appendix on ResNet-50.

Shape letters: N crops of this worker, M crops of the global batch, D embedding, P projection.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@dataclass(frozen=True)
class MocoConfig:
    """Settings of the method; defaults are those of sCellST.

    Attributes:
        projector_dim: Width of the hidden layers of projector and predictor.
        out_dim: Length of queries and keys, the vectors that the loss compares.
        temperature: Divisor of the cosine similarities.
        momentum: Share of its own weights that the momentum encoder keeps at each step, 0 to 1.
        momentum_cosine: Whether the momentum rises to 1 along a cosine over the whole run.
    """

    projector_dim: int = 4096
    out_dim: int = 256
    temperature: float = 1.0
    momentum: float = 0.99
    momentum_cosine: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside of their range.

        Raises:
            ValueError: A value is out of range. The message names the field, its value and the
                range.
        """
        allowed = {
            "projector_dim": (self.projector_dim >= 1, "at least 1"),
            "out_dim": (self.out_dim >= 2, "at least 2"),
            "temperature": (
                math.isfinite(self.temperature) and self.temperature > 0,
                "a positive number",
            ),
            "momentum": (0 <= self.momentum <= 1, "between 0 and 1"),
        }
        for name, (is_allowed, expected) in allowed.items():
            if not is_allowed:
                message = f"{name} is {getattr(self, name)}, expected {expected}."
                raise ValueError(message)


class ProjectedBackbone(nn.Module):
    """A backbone and its projector."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        """Join both; neither is copied."""
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings [N, D] of crops [N, 3, H, W], and their projections [N, P]."""
        embedding_ND = self.backbone(x)
        return embedding_ND, self.projector(embedding_ND)


class Moco(nn.Module):
    """The online encoder with its predictor, and the momentum encoder that follows it."""

    def __init__(self, backbone: nn.Module, embedding_dim: int, config: MocoConfig) -> None:
        """Add heads to a backbone and copy the result as momentum encoder.

        The weights of heads come from torch's global random state. See `new_moco` for a seeded
        model.

        Args:
            backbone: Network that maps crops [N, 3, H, W] to embeddings [N, D]; it is not copied.
            embedding_dim: Length D of an embedding.
            config: Settings of the method.
        """
        super().__init__()
        self.config = config
        self.online = ProjectedBackbone(backbone, _make_projector(embedding_dim, config))
        self.predictor = _make_predictor(config)
        self.momentum = copy.deepcopy(self.online).requires_grad_(requires_grad=False)

    def queries(self, x: Tensor) -> Tensor:
        """Return the predictions of the online encoder for crops, [N, P], of unit length."""
        _, projection_NP = self.online(x)
        return _normalise_rows(self.predictor(projection_NP))

    def keys(self, x: Tensor) -> Tensor:
        """Return the keys of the momentum encoder, [N, P], of unit length and without gradient."""
        return self.embed_keys(x)[1]

    @torch.no_grad()
    def embed_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the momentum backbone's embeddings [N, D], and the keys [N, P]."""
        embedding_ND, projection_NP = self.momentum(x)
        return embedding_ND, _normalise_rows(projection_NP)

    @torch.no_grad()
    def update_momentum(self, m: float) -> None:
        """Set the momentum encoder to m of itself and 1 - m of the online encoder.

        As published, only parameters move. The running statistics of its batch norms come from the
        batches of keys.

        Raises:
            ValueError: m is outside 0 to 1.
        """
        if not 0 <= m <= 1:
            message = f"momentum is {m}, expected between 0 and 1."
            raise ValueError(message)
        # All parameters in one call of torch's fused loop.
        average = get_ema_multi_avg_fn(m)  # type: ignore[no-untyped-call]
        average(list(self.momentum.parameters()), list(self.online.parameters()), None)


def _make_projector(embedding_dim: int, config: MocoConfig) -> nn.Module:
    hidden, out = config.projector_dim, config.out_dim
    return nn.Sequential(
        nn.Linear(embedding_dim, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False),
        nn.BatchNorm1d(out, affine=False),
    )


def _make_predictor(config: MocoConfig) -> nn.Module:
    hidden, out = config.projector_dim, config.out_dim
    return nn.Sequential(
        nn.Linear(out, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False),
    )


def _normalise_rows(x_NP: Tensor) -> Tensor:
    """Return rows scaled to length 1, in float32 or float64."""
    return F.normalize(x_NP.to(torch.promote_types(x_NP.dtype, torch.float32)), dim=1)


def contrastive_loss(
    q_NP: Tensor, k_MP: Tensor, first: int, temperature: float, num_total: int
) -> Tensor:
    """Return this worker's share of one direction of the loss.

    The loss is ctr(q, k) of Algorithm 1. It is the cross entropy of a query's similarities with
    all keys, divided by the temperature T, and multiplied by 2 T. The right class is the key of the
    same crop. The symmetric loss is ctr(q1, k2) + ctr(q2, k1).

    Args:
        q_NP: Queries of unit length.
        k_MP: Keys of unit length, of all workers and all micro-batches.
        first: Row of k_MP that belongs to the first query; the next rows belong to the next ones.
        temperature: Temperature T.
        num_total: Divisor of the sum over queries: M, so that shares add up to the mean.

    Raises:
        ValueError: A query has no key.
    """
    N, M = len(q_NP), len(k_MP)
    if not 0 <= first <= M - N:
        message = f"{N} queries begin at row {first}, expected rows within the {M} keys."
        raise ValueError(message)
    logits_NM = q_NP @ k_MP.T / temperature
    labels_N = torch.arange(first, first + N, device=q_NP.device)
    total = F.cross_entropy(logits_NM, labels_N, reduction="sum")
    return total * (2 * temperature / num_total)


def momentum_at(step: int, num_steps: int, config: MocoConfig) -> float:
    """Return the momentum at a step, counted from 0, of a run of `num_steps` steps."""
    if not config.momentum_cosine:
        return config.momentum
    return 1 - (1 - config.momentum) * (1 + math.cos(math.pi * step / num_steps)) / 2


def learning_rate_at(
    step: int, steps_per_epoch: int, epochs: int, warmup_epochs: int, base_lr: float, batch: int
) -> float:
    """Return the learning rate at a step: a linear warm-up from 0, then a cosine to 0.

    Args:
        step: Number of steps before this one, over all epochs.
        steps_per_epoch: Number of optimiser steps in an epoch.
        epochs: Number of epochs of the whole run.
        warmup_epochs: Number of first epochs in which the rate rises.
        base_lr: Learning rate for a batch of 256 crops.
        batch: Number of crops in the effective batch, over workers and micro-batches.
    """
    peak = base_lr * batch / 256
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    share = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1)
    return peak * (1 + math.cos(math.pi * share)) / 2
