"""MoCo v3: two encoders, a symmetric contrastive loss and the schedules it is trained with.

Chen, Xie, He 2021, "An empirical study of training self-supervised vision transformers",
Algorithm 1 and its appendix on ResNet-50.

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
    """The method's settings; defaults are those of sCellST.

    Attributes:
        projector_dim: Hidden numbers of projector and predictor.
        out_dim: Numbers of a query or key.
        temperature: Cosine similarities are divided by it.
        momentum: Of the momentum encoder: the share it keeps of itself at each step.
        momentum_cosine: Whether the momentum rises to 1 along a cosine over the whole run.
    """

    projector_dim: int = 4096
    out_dim: int = 256
    temperature: float = 1.0
    momentum: float = 0.99
    momentum_cosine: bool = False

    def __post_init__(self) -> None:
        """Refuse values that cannot be trained with.

        Raises:
            ValueError: Naming the field, its value and what is allowed.
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


class Projected(nn.Module):
    """A backbone and its projector."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        """Take both."""
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings [N, D] of crops [N, 3, H, W], and their projections [N, P]."""
        embedding_ND = self.backbone(x)
        return embedding_ND, self.projector(embedding_ND)


class Moco(nn.Module):
    """The online encoder with its predictor, and the momentum encoder that follows it."""

    def __init__(self, backbone: nn.Module, embedding_dim: int, config: MocoConfig) -> None:
        """Put heads on a backbone and copy the whole as momentum encoder.

        Heads are drawn from torch's global random state; see `new_moco` for a seeded model.

        Args:
            backbone: Crops [N, 3, H, W] to embeddings [N, D]; taken, not copied.
            embedding_dim: D.
            config: Sizes of the heads, and the rest.
        """
        super().__init__()
        self.config = config
        self.online = Projected(backbone, _projector(embedding_dim, config))
        self.predictor = _predictor(config)
        self.momentum = copy.deepcopy(self.online).requires_grad_(requires_grad=False)

    def queries(self, x: Tensor) -> Tensor:
        """Return the predictions [N, P] for crops [N, 3, H, W], of unit length."""
        _, projection_NP = self.online(x)
        return _unit(self.predictor(projection_NP))

    def keys(self, x: Tensor) -> Tensor:
        """Return what the momentum encoder makes of crops: [N, P] of unit length, no gradient."""
        return self.embed_keys(x)[1]

    @torch.no_grad()
    def embed_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the momentum backbone's embeddings [N, D] as they are, and the keys [N, P]."""
        embedding_ND, projection_NP = self.momentum(x)
        return embedding_ND, _unit(projection_NP)

    @torch.no_grad()
    def update_momentum(self, m: float) -> None:
        """Move the momentum encoder: m of itself and 1 - m of the online encoder.

        Parameters only, as published: running statistics of batch norms are the momentum encoder's
        own, gathered from the keys' batches.

        Raises:
            ValueError: m outside 0 to 1.
        """
        if not 0 <= m <= 1:
            message = f"momentum is {m}, expected between 0 and 1."
            raise ValueError(message)
        # All parameters in one call of torch's fused loop.
        average = get_ema_multi_avg_fn(m)  # type: ignore[no-untyped-call]
        average(list(self.momentum.parameters()), list(self.online.parameters()), None)


def _projector(embedding_dim: int, config: MocoConfig) -> nn.Module:
    hidden, out = config.projector_dim, config.out_dim
    return nn.Sequential(
        nn.Linear(embedding_dim, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False),
        nn.BatchNorm1d(out, affine=False),
    )


def _predictor(config: MocoConfig) -> nn.Module:
    hidden, out = config.projector_dim, config.out_dim
    return nn.Sequential(
        nn.Linear(out, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False),
    )


def _unit(x_NP: Tensor) -> Tensor:
    """Scale rows to length 1, in float32 at least."""
    return F.normalize(x_NP.to(torch.promote_types(x_NP.dtype, torch.float32)), dim=1)


def contrastive_loss(
    q_NP: Tensor, k_MP: Tensor, first: int, temperature: float, num_total: int
) -> Tensor:
    """Return this worker's share of one direction of the loss.

    Algorithm 1's ctr(q, k): cross entropy of the similarities of a query with all keys, over the
    temperature T, where the key of the same crop is the right class; times 2 T. The symmetric loss
    is ctr(q1, k2) + ctr(q2, k1).

    Args:
        q_NP: Queries of unit length.
        k_MP: Keys of unit length, all workers' and all micro-batches'.
        first: Row of k_MP that belongs to the first query; the others follow.
        temperature: T.
        num_total: What the sum over queries is divided by: M, so that shares add up to the mean.

    Raises:
        ValueError: Where some query has no key.
    """
    N, M = len(q_NP), len(k_MP)
    if not 0 <= first <= M - N:
        message = f"{N} queries from row {first} on, but there are only {M} keys."
        raise ValueError(message)
    logits_NM = q_NP @ k_MP.T / temperature
    labels_N = torch.arange(first, first + N, device=q_NP.device)
    total = F.cross_entropy(logits_NM, labels_N, reduction="sum")
    return total * (2 * temperature / num_total)


def momentum_at(step: int, num_steps: int, config: MocoConfig) -> float:
    """Return the momentum at a step (from 0) of a run of so many."""
    if not config.momentum_cosine:
        return config.momentum
    return 1 - (1 - config.momentum) * (1 + math.cos(math.pi * step / num_steps)) / 2


def learning_rate_at(
    step: int, steps_per_epoch: int, epochs: int, warmup_epochs: int, base_lr: float, batch: int
) -> float:
    """Return the learning rate at a step (from 0): linear warm-up from 0, then a cosine to 0.

    Args:
        step: Steps taken before this one, over all epochs.
        steps_per_epoch: Optimiser steps in an epoch.
        epochs: Of the whole run.
        warmup_epochs: Of these, how many the rate rises in.
        base_lr: Rate for a batch of 256.
        batch: Effective batch, over workers and micro-batches.
    """
    peak = base_lr * batch / 256
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    share = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1)
    return peak * (1 + math.cos(math.pi * share)) / 2
