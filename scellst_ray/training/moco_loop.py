"""The steps of pretraining: plain functions, the same for one process and for many workers.

All random numbers are drawn from (seed, epoch, step), so a run continues from any step as if it had
never stopped.

Worker r of n takes lanes r, r + n, ... of every global batch, and its rows of the augmentation
drawn for the whole batch. So the result of a step does not depend on the number of workers, with
two exceptions: the order of sums, and batch-norm statistics where a batch is cut to fit memory.

Shapes: N crops of this worker, H W px.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scellst_ray.models.moco.augment import AugmentConfig, apply, draw
from scellst_ray.models.moco.network import Moco, MocoConfig, learning_rate_at, momentum_at
from scellst_ray.models.moco.step import Collective, StepResult, moco_step
from scellst_ray.runs.crop_store import CropStore
from scellst_ray.training.crop_order import CropOrder, prefetch

MAX_LANES = 64


@dataclass(frozen=True)
class Recipe:
    """Settings that decide the result of pretraining.

    Attributes:
        arch: Backbone: 'resnet18', 'resnet34', 'resnet50' or 'timm:NAME'.
        moco: Settings of the contrastive network.
        augment: Settings of the augmentation that makes views.
        batch: Number of crops in a step, over all workers.
        epochs: Number of passes over the crops.
        warmup_epochs: Number of first epochs in which the learning rate rises.
        base_lr: Learning rate for a batch of 256 crops; it grows in proportion to the batch.
        optimiser: 'lars' or 'adamw'.
        weight_decay: Weight decay of the optimiser.
        precision: Precision of the networks: 'float32' or 'bfloat16'.
        recompute: Whether to recompute activations in the backward pass, which saves memory.
        seed: Seed of weights, order and augmentation.
    """

    arch: str = "resnet50"
    moco: MocoConfig = field(default_factory=MocoConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    batch: int = 4096
    epochs: int = 150
    warmup_epochs: int = 10
    base_lr: float = 0.6
    optimiser: str = "lars"
    weight_decay: float = 1e-6
    precision: str = "float32"
    recompute: bool = False
    seed: int = 0


@dataclass(frozen=True)
class PretrainIdentity:
    """Identity of a run of `pretrain`: every setting that changes its results.

    Attributes:
        recipe: Settings of the training.
        crops: Digest of the crops.
        init: Digest of the first weights, or 'random'.
    """

    recipe: Recipe
    crops: str
    init: str

    def as_json(self) -> dict[str, object]:
        """Return the fields as `run.json` holds them."""
        return asdict(self)


class Step(NamedTuple):
    """Result of one step.

    Attributes:
        epoch: Number of the epoch, from 0.
        number: Number of the step in its epoch, from 0.
        lr: Learning rate of the step.
        result: Loss, gradient and spread of the embeddings.
        waited_s: Seconds that this process has waited for crops in this epoch so far.
    """

    epoch: int
    number: int
    lr: float
    result: StepResult
    waited_s: float


def crop_order(store: CropStore, recipe: Recipe) -> CropOrder:
    """Return the order of crops for a recipe.

    Raises:
        ValueError: there are too few crops for a batch.
    """
    return CropOrder(store, recipe.batch, recipe.seed, math.gcd(recipe.batch, MAX_LANES))


def run_steps(
    model: Moco,
    optimiser: torch.optim.Optimizer,
    order: CropOrder,
    recipe: Recipe,
    collective: Collective,
    *,
    first_step: int = 0,
    crops_at_once: int | None = None,
) -> Iterator[Step]:
    """Take the steps of a run, one each time the iterator is advanced.

    Args:
        model: Network on its device, with synchronised norms if there are several workers.
        optimiser: Optimiser of the network's parameters.
        order: Order of the crops, from `crop_order`.
        recipe: Settings of the run.
        collective: Rank of this worker, and its communication with other workers.
        first_step: Number of steps already taken, over all epochs.
        crops_at_once: Largest number of crops that a worker's device holds. A larger share of a
            batch is computed in parts, and the keys of all parts serve as negatives.

    Yields:
        Each step after it was taken.

    Raises:
        ValueError: there are more workers than lanes.
        FloatingPointError: loss or gradient is not finite; the network did not change.
    """
    _check_workers(collective, order, recipe)
    device = next(model.parameters()).device
    num_steps = recipe.epochs * order.steps_per_epoch
    lanes = range(collective.rank, order.num_lanes, collective.world_size)
    # Every worker has the same number of parts; the first worker has the most lanes.
    largest = -(-order.num_lanes // collective.world_size) * order.lane_crops
    num_parts = -(-largest // (crops_at_once or largest))
    for epoch in range(first_step // order.steps_per_epoch, recipe.epochs):
        first = max(0, first_step - epoch * order.steps_per_epoch)
        with prefetch(order.batches(epoch, first, lanes)) as batches:
            for number, crops in enumerate(batches, first):
                step = epoch * order.steps_per_epoch + number
                lr = learning_rate_at(
                    step,
                    order.steps_per_epoch,
                    recipe.epochs,
                    recipe.warmup_epochs,
                    recipe.base_lr,
                    recipe.batch,
                )
                crops_NHWC = torch.from_numpy(crops).to(device)
                result = moco_step(
                    model,
                    optimiser,
                    _views(crops_NHWC, order, lanes, recipe, step, num_parts),
                    lr=lr,
                    momentum=momentum_at(step, num_steps, recipe.moco),
                    collective=collective,
                    precision=recipe.precision,
                )
                yield Step(epoch, number, lr, result, batches.waited_s)


def _check_workers(collective: Collective, order: CropOrder, recipe: Recipe) -> None:
    if collective.world_size > order.num_lanes:
        message = (
            f"there are {collective.world_size} workers, and a batch of {recipe.batch} serves at "
            f"most {order.num_lanes}; use fewer workers, or a batch that is a multiple of 64"
        )
        raise ValueError(message)


def _views(
    crops_NHWC: Tensor,
    order: CropOrder,
    lanes: range,
    recipe: Recipe,
    step: int,
    num_parts: int,
) -> list[tuple[Tensor, Tensor]]:
    """Return two random views of this worker's crops, in `num_parts` parts."""
    seed = np.random.SeedSequence([recipe.seed, step]).generate_state(1, np.uint64)[0] >> 1
    generator = torch.Generator().manual_seed(int(seed))
    drawn = [draw(recipe.batch, recipe.augment, generator) for _ in range(2)]
    rows = torch.arange(recipe.batch).view(order.num_lanes, -1)[list(lanes)].flatten()
    views = [
        apply(crops_NHWC, parameters[rows], recipe.augment, order.store.mean, order.store.std)
        for parameters in drawn
    ]
    return list(zip(*(view.tensor_split(num_parts) for view in views), strict=True))
