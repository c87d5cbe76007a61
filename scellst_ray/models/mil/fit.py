"""Fitting the MIL head: plain functions, the same for one process and for each of many workers.

What an epoch does is in epoch.py; here are the settings, and when to stop and to go on.

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
from scellst_ray.models.mil.epoch import Among, train_epoch, validation_loss
from scellst_ray.models.mil.head import OURS, MilHead, formula_of
from scellst_ray.models.mil.stored_head import Formula


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
        predictor: ours, or published: LeakyReLU, dropout and softplus of the published code.
        loss: mse, nb or nb_total (see Formula).
        ensemble: Networks fitted side by side from different initial weights, on the same batches,
            with the best epoch chosen for all: each is as if fitted alone, but for that choice.
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
        self.formula()

    def formula(self) -> Formula:
        """Return what the head computes."""
        return formula_of(self.predictor, self.loss, self.ensemble)


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


def new_head(train: BagSet, seed: int, formula: Formula = OURS) -> MilHead:
    """Make a head for these bags: weights fixed by the seed, inputs standardised by the bags.

    What is trained on counts is scaled by the genes' means; the published predictor is not, and
    begins with random dispersions instead of 1. torch's global random state is left as it was.

    Raises:
        ValueError: Where there is nothing to standardise by, embeddings are not finite, or counts
            come without size factors.
    """
    ours = formula.negative_slope == 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = train.embeddings_LD.shape[1], train.targets_SG.shape[1]
        head = MilHead(*sizes, formula=formula)
        if formula.counts and not ours:
            nn.init.normal_(head.log_dispersion)
    head.standardise(train.embeddings_LD)
    if formula.counts and ours:
        if train.size_factors_S is None:
            message = f"loss {formula.loss!r} needs counts with size factors, got neither."
            raise ValueError(message)
        mean_G = train.targets_SG.double().sum(0) / train.size_factors_S.double().sum()
        head.gene_scale_G.copy_(torch.where(mean_G > 0, mean_G, 1.0))
    return head


def new_optimiser(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """Make the optimiser of the paper, AdamW."""
    return torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )


class Fit:
    """A fit under way: all that its next epochs depend on, so that another process can go on.

    Attributes:
        history: Per epoch so far, (training loss, validation loss).
    """

    def __init__(self, head: MilHead, optimiser: torch.optim.Optimizer, patience: int) -> None:
        """Begin before the first epoch."""
        self.head, self.optimiser, self.stopping = head, optimiser, EarlyStopping(patience)
        self.history: list[tuple[float, float]] = []
        self.best_epoch, self.best_head = 0, copy.deepcopy(head.state_dict())

    def after_epoch(self, train_loss: float, val_loss: float) -> None:
        """Take an epoch's losses, and its weights if they are the best so far."""
        if self.stopping.update(val_loss):
            self.best_epoch = len(self.history)
            self.best_head = copy.deepcopy(self.head.state_dict())
        self.history.append((train_loss, val_loss))

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors, numbers, and lists and dicts of them."""
        return {
            "head": self.head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "stopping": asdict(self.stopping),
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_head": self.best_head,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where state_dict was called."""
        self.head.load_state_dict(state["head"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.stopping = EarlyStopping(**state["stopping"])
        self.history = [(train_loss, val_loss) for train_loss, val_loss in state["history"]]
        self.best_epoch, self.best_head = state["best_epoch"], state["best_head"]

    def result(self) -> FitResult:
        """Return what fitting has done so far."""
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
    **among: Unpack[Among],
) -> FitResult:
    """Fit a head; it ends with the weights of the best validation epoch.

    Args:
        head: From new_head, the same on every worker.
        train: All training bags (each worker holds the same), best on the head's device.
        val: All validation bags.
        config: How.
        model: The head wrapped for world_size > 1; the head itself when None.
        state: Fit.state_dict of an earlier fit of the same, to go on from; the result is that of
            the undisturbed fit.
        each_epoch: Called after every epoch.
        **among: rank, world_size and all_reduce as train_epoch takes them; without them this is
            the plain fit in this process.
    """
    model = head if model is None else model
    fit = Fit(head, new_optimiser(model, config), config.patience)
    if state is not None:
        fit.load_state_dict(state)
    device = head.mean_D.device
    while len(fit.history) < config.max_epochs and not fit.stopping.should_stop:
        epoch = len(fit.history)
        batches = epoch_batches(len(train), config.batch_spots, config.seed, epoch)
        # Dropout draws from a state of the epoch's own, so that a fit can go on anywhere.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_random_state(config.seed, epoch, among.get("rank", 0)))
            train_loss = train_epoch(model, fit.optimiser, train, batches, **among)
        fit.after_epoch(train_loss, validation_loss(head, val, config.batch_spots, **among))
        each_epoch(fit)
    head.load_state_dict(fit.best_head)
    return fit.result()


def _random_state(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
