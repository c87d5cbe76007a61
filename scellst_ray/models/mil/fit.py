"""Fitting the MIL head: settings, early stopping and resuming.

The functions are the same for one process and for each of several workers. One epoch is in
epoch.py.

Shape letters: S spots (bags), D embedding, G genes.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import nn

from scellst_ray.models.mil.bags import BagSet, epoch_batches
from scellst_ray.models.mil.epoch import WorkerOptions, train_epoch, validation_loss
from scellst_ray.models.mil.head import OURS, MilHead, formula_of
from scellst_ray.models.mil.head_file import Formula


@dataclass(frozen=True)
class FitConfig:
    """Settings of the fit; defaults are those of sCellST.

    Attributes:
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        batch_spots: Number of spots per global batch, over all workers.
        max_epochs: Largest number of epochs.
        patience: Number of epochs without a better validation loss after which the fit stops.
        seed: Number that fixes the initial weights, the split and the order of spots.
        val_share: Share of each slide's spots held out for early stopping.
        predictor: 'ours', or 'published': LeakyReLU, dropout and softplus of the published code.
        loss: 'mse', 'nb' or 'nb_total' (see Formula).
        ensemble: Number of networks (members) fitted at the same time, on the same batches, from
            different initial weights. The best epoch is chosen for all together. But for that
            choice, each member is as if fitted alone.
    """

    lr: float = 1e-4
    weight_decay: float = 0.01
    batch_spots: int = 128
    max_epochs: int = 400
    patience: int = 20
    seed: int = 0
    val_share: float = 0.2
    predictor: Literal["ours", "published"] = "ours"
    loss: Literal["mse", "nb", "nb_total"] = "mse"
    ensemble: int = 1

    def __post_init__(self) -> None:
        """Refuse values outside of their range.

        Raises:
            ValueError: A value is out of range. The message names the field, its value and the
                range.
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
        self.formula()

    def formula(self) -> Formula:
        """Return the formula of the head."""
        return formula_of(self.predictor, self.loss, self.ensemble)


@dataclass
class EarlyStopping:
    """A counter of epochs without a better validation loss.

    Attributes:
        patience: Number of epochs to wait.
        best: Lowest loss so far.
        wait: Number of epochs since the lowest loss.
    """

    patience: int = 20
    best: float = math.inf
    wait: int = 0

    def update(self, loss: float) -> bool:
        """Count an epoch; return whether its loss is the best so far. NaN is never the best."""
        if loss < self.best:
            self.best, self.wait = loss, 0
            return True
        self.wait += 1
        return False

    @property
    def should_stop(self) -> bool:
        """Whether `patience` epochs have passed without a better loss."""
        return self.wait >= self.patience


@dataclass(frozen=True)
class FitResult:
    """The result of a fit.

    Attributes:
        best_epoch: Epoch, from 0, whose weights the head now holds.
        best_loss: Validation loss of that epoch.
        history: (training loss, validation loss) of each epoch.
    """

    best_epoch: int
    best_loss: float
    history: list[tuple[float, float]] = field(default_factory=list)


def new_head(train: BagSet, seed: int, formula: Formula = OURS) -> MilHead:
    """Make a head for these bags: the seed fixes its weights, the bags standardise its inputs.

    A head for counts is scaled by the genes' means. The published predictor is not scaled, and it
    starts from random dispersions instead of 1. torch's global random state does not change.

    Raises:
        ValueError: There are no instances, embeddings are not finite, or counts have no size
            factors.
    """
    is_ours = formula.negative_slope == 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = train.embeddings_LD.shape[1], train.targets_SG.shape[1]
        head = MilHead(*sizes, formula=formula)
        if formula.counts and not is_ours:
            nn.init.normal_(head.log_dispersion)
    head.standardise(train.embeddings_LD)
    if formula.counts and is_ours:
        if train.size_factors_S is None:
            message = (
                f"loss {formula.loss!r} needs counts with size factors, got bags without size "
                "factors: give counts, or train with loss mse."
            )
            raise ValueError(message)
        mean_G = train.targets_SG.double().sum(0) / train.size_factors_S.double().sum()
        head.gene_scale_G.copy_(torch.where(mean_G > 0, mean_G, 1.0))
    return head


def new_optimiser(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """Make AdamW, the optimiser of the paper, over the model's parameters."""
    return torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )


class Fit:
    """The state of a fit: everything that its next epochs depend on.

    Another process can continue the fit from this state.

    Attributes:
        history: (training loss, validation loss) of each epoch so far.
    """

    def __init__(self, head: MilHead, optimiser: torch.optim.Optimizer, patience: int) -> None:
        """Make the state before the first epoch."""
        self.head, self.optimiser, self.stopping = head, optimiser, EarlyStopping(patience)
        self.history: list[tuple[float, float]] = []
        self.best_epoch, self.best_head = 0, copy.deepcopy(head.state_dict())

    def after_epoch(self, train_loss: float, val_loss: float) -> None:
        """Record an epoch's losses, and keep its weights if they are the best so far."""
        if self.stopping.update(val_loss):
            self.best_epoch = len(self.history)
            self.best_head = copy.deepcopy(self.head.state_dict())
        self.history.append((train_loss, val_loss))

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors, numbers, and lists and dicts of these."""
        return {
            "head": self.head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "stopping": asdict(self.stopping),
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_head": self.best_head,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that state_dict returned."""
        self.head.load_state_dict(state["head"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.stopping = EarlyStopping(**state["stopping"])
        self.history = [(train_loss, val_loss) for train_loss, val_loss in state["history"]]
        self.best_epoch, self.best_head = state["best_epoch"], state["best_head"]

    def result(self) -> FitResult:
        """Return the result so far."""
        return FitResult(self.best_epoch, self.stopping.best, self.history)


def fit_head(
    head: MilHead,
    train: BagSet,
    val: BagSet,
    config: FitConfig,
    model: nn.Module | None = None,
    *,
    state: dict[str, Any] | None = None,
    each_epoch: Callable[[Fit], None] = lambda _: None,
    **worker: Unpack[WorkerOptions],
) -> FitResult:
    """Fit a head; it ends with the weights of the best validation epoch.

    Args:
        head: Head from new_head, the same on every worker.
        train: All training bags; every worker holds the same. The head's device is best for them.
        val: All validation bags.
        config: Settings.
        model: The head in DistributedDataParallel, for world_size > 1; None: the head itself.
        state: Fit.state_dict of an interrupted fit of the same head and bags. The result is that
            of a fit without the interruption.
        each_epoch: Function that is called after every epoch.
        **worker: rank, world_size and all_reduce of train_epoch. Without them this process fits
            alone.
    """
    model = head if model is None else model
    fit = Fit(head, new_optimiser(model, config), config.patience)
    if state is not None:
        fit.load_state_dict(state)
    device = head.mean_D.device
    while len(fit.history) < config.max_epochs and not fit.stopping.should_stop:
        epoch = len(fit.history)
        batches = epoch_batches(len(train), config.batch_spots, config.seed, epoch)
        # Each epoch seeds dropout, so that a fit continues the same way from any epoch.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_combine_seeds(config.seed, epoch, worker.get("rank", 0)))
            train_loss = train_epoch(model, fit.optimiser, train, batches, **worker)
        fit.after_epoch(train_loss, validation_loss(head, val, config.batch_spots, **worker))
        each_epoch(fit)
    head.load_state_dict(fit.best_head)
    return fit.result()


def _combine_seeds(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
