"""Epochs over several workers against one process, and losses against direct ones."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from scellst_ray.models.mil.bags import BagSet, bag_mean, epoch_batches
from scellst_ray.models.mil.epoch import backward_batch, train_epoch, validation_loss
from scellst_ray.models.mil.fit import FitConfig, new_head, new_optimiser
from scellst_ray.models.mil.head import (
    MilHead,
)
from tests.support.mil_bags import make_bags, make_counts, single_cells


def make_head(bags: BagSet, seed=0, loss="mse", ensemble=1) -> MilHead:
    head = new_head(bags, seed, FitConfig(loss=loss, ensemble=ensemble).formula())
    return head.double() if bags.embeddings_LD.dtype == torch.float64 else head


def gradients(head) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in head.parameters()]


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("num_in_batch", [7, 2, 1])
@pytest.mark.parametrize(("loss", "ensemble"), [("mse", 1), ("nb", 1), ("nb_total", 2)])
def test_workers_average_to_the_gradient_of_one_process(world_size, num_in_batch, loss, ensemble):
    # With 5 workers and 2 spots, three workers have no spot. Their gradient must be zero.
    bags = make_bags() if loss == "mse" else make_counts(make_bags())
    head = make_head(bags, 0, loss, ensemble)
    batch = epoch_batches(len(bags), 7, seed=3, epoch=0)[0][:num_in_batch]
    total = backward_batch(head, bags, batch)
    expected = gradients(head)
    if loss == "mse":
        direct = (bag_mean(head(bags.embeddings_LD), bags.offsets) - bags.targets_SG)[batch]
        torch.testing.assert_close(total, direct.square().sum().detach())
    parts, totals = [], []
    for rank in range(world_size):
        head.zero_grad()
        totals.append(backward_batch(head, bags, batch, rank, world_size))
        parts.append(gradients(head))
    torch.testing.assert_close(sum(totals), total)
    for number, gradient in enumerate(expected):
        average = sum(part[number] for part in parts) / world_size
        torch.testing.assert_close(average, gradient, rtol=1e-6, atol=1e-12)
    assert all(any(gradient.abs().max() > 0 for gradient in part) for part in parts[:num_in_batch])
    assert all(not gradient.any() for part in parts[num_in_batch:] for gradient in part)


class LockStep:
    """Two workers in one process: gradients of each batch are averaged before both steps."""

    def __init__(self, heads, optimisers):
        self.heads, self.optimisers = heads, optimisers

    def epoch(self, bags, batches):
        for batch in batches:
            for rank, head in enumerate(self.heads):
                head.zero_grad()
                backward_batch(head, bags, batch, rank, len(self.heads))
            for same in zip(*(head.parameters() for head in self.heads), strict=True):
                average = sum(parameter.grad for parameter in same) / len(self.heads)
                for parameter in same:
                    parameter.grad = average.clone()
            for optimiser in self.optimisers:
                optimiser.step()


def test_two_workers_reach_the_weights_of_one_after_many_steps():
    # AdamW divides by the size of the gradient, so rounding grows. Hence float64 and a loose bound.
    bags = make_bags()
    config = FitConfig(lr=1e-3, batch_spots=11)  # the last batch has 1 spot, so worker 1 has none
    one = make_head(bags)
    heads = [copy.deepcopy(one), copy.deepcopy(one)]
    optimiser = new_optimiser(one, config)
    workers = LockStep(heads, [new_optimiser(head, config) for head in heads])
    for epoch in range(4):
        batches = epoch_batches(len(bags), config.batch_spots, config.seed, epoch)
        assert len(batches[-1]) == 1
        train_epoch(one, optimiser, bags, batches)
        workers.epoch(bags, batches)
    for head in heads:
        for found, expected in zip(head.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_reported_loss_sums_over_workers_and_ignores_batch_size():
    bags = make_bags()
    head = make_head(bags)
    frozen = torch.optim.SGD(head.parameters(), lr=0.0)
    whole = train_epoch(head, frozen, bags, epoch_batches(len(bags), len(bags), 0, 0))
    for size in (1, 4, 10):
        assert train_epoch(head, frozen, bags, epoch_batches(len(bags), size, 0, 0)) == (
            pytest.approx(whole, rel=1e-12)
        )
        assert validation_loss(head, bags, size) == pytest.approx(whole, rel=1e-12)
    for function in (
        lambda **kwargs: train_epoch(head, frozen, bags, epoch_batches(23, 4, 0, 0), **kwargs),
        lambda **kwargs: validation_loss(head, bags, 4, **kwargs),
    ):
        shares = [
            function(rank=rank, world_size=2, all_reduce=lambda total: total) for rank in (0, 1)
        ]
        assert sum(shares) == pytest.approx(whole, rel=1e-12)
        with pytest.raises(ValueError, match="pass all_reduce"):
            function(rank=0, world_size=2)


def test_validation_leaves_the_mode_and_the_gradients_alone():
    bags = make_bags()
    head = make_head(bags)
    for mode in (True, False):
        head.train(mode)
        validation_loss(head, bags)
        assert head.training is mode
    assert all(parameter.grad is None for parameter in head.parameters())


def test_training_stops_before_a_step_on_a_loss_that_is_not_finite():
    bags = make_bags()
    head = make_head(bags)
    with torch.no_grad():
        head.last.bias[0] = torch.inf
    before = copy.deepcopy(head.state_dict())
    optimiser = new_optimiser(head, FitConfig())
    with pytest.raises(FloatingPointError, match="training loss is inf"):
        train_epoch(head, optimiser, bags, epoch_batches(23, 8, 0, 0))
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())


def test_supervised_fit_is_that_of_every_cell_on_its_own():
    bags = make_bags()
    targets = torch.randn(len(bags.embeddings_LD), 3, dtype=torch.float64)
    cells = single_cells(bags.embeddings_LD, targets)
    assert len(cells) == len(targets)
    head = make_head(cells)
    backward_batch(head, cells, np.arange(len(cells)))
    found = gradients(head)
    head.zero_grad()
    torch.nn.functional.mse_loss(head(cells.embeddings_LD), targets).backward()
    for gradient, expected in zip(found, gradients(head), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("loss", ["mse", "nb"])
def test_loss_does_not_depend_on_order_batches_or_repeated_cells(loss):
    bags = make_bags() if loss == "mse" else make_counts(make_bags())
    head = make_head(bags, 0, loss)
    whole = validation_loss(head, bags)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(bags))
    spans = list(zip(bags.offsets[:-1].tolist(), bags.offsets[1:].tolist(), strict=True))
    # Cells have another order within their bag, and some bags hold every cell three times.
    rows = [
        np.repeat(rng.permutation(np.arange(*span)), 1 + 2 * (i % 2))
        for i, span in enumerate(spans)
    ]
    offsets = torch.tensor(np.cumsum([0, *map(len, rows)]))
    shuffled = replace(
        bags, embeddings_LD=bags.embeddings_LD[np.concatenate(rows)], offsets=offsets
    )
    for size in (1, 5, 128):
        assert validation_loss(head, shuffled.take(order), size) == pytest.approx(whole, rel=1e-12)
