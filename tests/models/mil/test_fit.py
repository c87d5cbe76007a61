import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from scellst_ray.models.mil.bags import BagSet, bag_mean, epoch_batches, split_spots
from scellst_ray.models.mil.epoch import backward_batch, train_epoch, validation_loss
from scellst_ray.models.mil.fit import EarlyStopping, FitConfig, fit_head, new_head, new_optimiser
from scellst_ray.models.mil.head import MilHead
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
    # With 5 workers and 2 spots, three workers have none and must still give a (zero) gradient.
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
    """Two workers in one process: each batch's gradients are averaged before either steps."""

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
    # AdamW divides by the gradient's size, so rounding grows: hence float64 and a loose bound.
    bags = make_bags()
    config = FitConfig(lr=1e-3, batch_spots=11)  # the last batch holds 1 spot: worker 1 has none
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


def test_taking_bags_equals_a_slow_loop():
    bags = make_bags()
    order = np.array([5, 0, 5, 22])
    part = bags.take(order)
    spans = list(zip(bags.offsets[:-1].tolist(), bags.offsets[1:].tolist(), strict=True))
    expected = torch.cat([bags.embeddings_LD[slice(*spans[spot])] for spot in order])
    torch.testing.assert_close(part.embeddings_LD, expected)
    assert part.offsets.diff().tolist() == [spans[s][1] - spans[s][0] for s in order]
    torch.testing.assert_close(part.targets_SG, bags.targets_SG[order])
    assert len(bags.take(order[:0])) == 0


@pytest.mark.parametrize(
    ("offsets", "targets", "words"),
    [
        ([0, 3, 3], torch.ones(2, 1), "bag 1 of 2 holds 0 instances"),
        ([0, 2], torch.ones(1, 1), "expected one-dimensional"),
        ([0, 1, 3], torch.ones(3, 1), "one row per bag"),
        ([0, 1, 3], torch.full((2, 1), torch.nan), "NaN"),
    ],
)
def test_unsound_bags_are_refused_at_construction(offsets, targets, words):
    with pytest.raises(ValueError, match=words):
        BagSet(torch.ones(3, 2), torch.tensor(offsets), targets)


def test_batches_hold_every_spot_once_and_are_fixed_by_seed_and_epoch():
    batches = epoch_batches(300, 128, seed=1, epoch=4)
    assert [len(batch) for batch in batches] == [128, 128, 44]
    assert sorted(np.concatenate(batches)) == list(range(300))
    again = epoch_batches(300, 128, seed=1, epoch=4)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    for seed, epoch in [(1, 5), (4, 1), (2, 4)]:
        assert (epoch_batches(300, 128, seed, epoch)[0] != batches[0]).any()


def test_split_is_per_slide_and_does_not_depend_on_other_slides():
    slides = ["A"] * 50 + ["B"] * 20 + ["C"] * 2 + ["D"]
    train, val = split_spots(slides, 0.2, seed=0)
    assert sorted([*train, *val]) == list(range(73))
    assert [sum(slides[i] == name for i in val) for name in "ABCD"] == [10, 4, 1, 0]
    _, only_b = split_spots(["B"] * 20, 0.2, seed=0)
    assert [i - 50 for i in val if slides[i] == "B"] == only_b.tolist()
    assert split_spots(["B"] * 20, 0.2, seed=1)[1].tolist() != only_b.tolist()
    with pytest.raises(ValueError, match="too few"):
        split_spots(["A", "B"], 0.2, seed=0)


def test_early_stopping_waits_for_its_patience():
    stopping = EarlyStopping(patience=2)
    seen = [stopping.update(loss) for loss in (3.0, 2.0, 2.0, float("nan"))]
    assert seen == [True, True, False, False]
    assert (stopping.best, stopping.wait, stopping.should_stop) == (2.0, 2, True)


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"weight_decay": -1.0}, {"batch_spots": 0}, {"val_share": 1.0}, {"seed": -1}],
)
def test_config_names_the_wrong_field(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        FitConfig(**wrong)


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


def test_new_head_is_fixed_by_its_seed_and_leaves_torch_alone():
    bags = make_bags(dtype=torch.float32)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = new_head(bags, seed=1)
    assert torch.equal(torch.rand(1), expected)
    for name, value in new_head(bags, seed=1).state_dict().items():
        assert torch.equal(value, first.state_dict()[name])
    assert not torch.equal(new_head(bags, seed=2).last.weight, first.last.weight)
    torch.testing.assert_close(first.mean_D, bags.embeddings_LD.mean(0))


def test_fit_recovers_single_instances_from_bag_means():
    bags = make_bags(num_spots=400, dtype=torch.float32)
    train, val = (bags.take(part) for part in split_spots(["A"] * 400, 0.2, seed=0))
    head = new_head(train, seed=0)
    start = validation_loss(head, val)
    config = FitConfig(lr=2e-3, batch_spots=64, max_epochs=40, patience=8)
    result = fit_head(head, train, val, config)
    assert validation_loss(head, val) == pytest.approx(result.best_loss, rel=1e-6)
    assert result.best_loss == min(loss for _, loss in result.history) < 0.2 * start
    with torch.no_grad():
        x_ND = torch.randn(500, 6, generator=torch.Generator().manual_seed(9))
        found, truth = head(x_ND), torch.nn.functional.softplus(2 * x_ND[:, :4])
    for gene in range(4):  # instances it never saw, though it was only ever told means
        assert np.corrcoef(found[:, gene], truth[:, gene])[0, 1] > 0.9


def test_fit_is_repeatable_and_stops_early():
    bags = make_bags(num_spots=40, dtype=torch.float32)
    noise = torch.randn(40, 4, generator=torch.Generator().manual_seed(1)).abs()
    train, val = split_spots(["A"] * 40, 0.2, seed=0)
    parts = [
        BagSet(b.embeddings_LD, b.offsets, noise[i]) for i in (train, val) for b in [bags.take(i)]
    ]
    results = []
    for _ in range(2):
        head = new_head(parts[0], seed=0)
        results.append(fit_head(head, *parts, FitConfig(lr=3e-3, max_epochs=60, patience=3)))
    assert results[0] == results[1]
    assert len(results[0].history) == results[0].best_epoch + 1 + 3 < 60


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
    # Cells within their bag in another order, and every cell of some bags three times.
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


@pytest.mark.parametrize("changes", [{}, {"predictor": "published", "ensemble": 2}, {"loss": "nb"}])
def test_a_fit_goes_on_from_any_epoch_to_the_same_end(changes):
    config = FitConfig(lr=3e-3, batch_spots=7, max_epochs=7, patience=3, **changes)
    bags = make_bags(num_spots=30, dtype=torch.float32)
    bags = make_counts(bags) if config.loss == "nb" else bags
    train, val = (bags.take(part) for part in split_spots(["A"] * 30, 0.2, seed=0))
    states = []
    head = new_head(train, 0, config.formula())
    torch.manual_seed(1)
    expected = fit_head(
        head, train, val, config, each_epoch=lambda f: states.append(copy.deepcopy(f.state_dict()))
    )
    assert len(states) == len(expected.history) > 2
    for state in (states[0], states[2], states[-1]):
        again = new_head(train, 5, config.formula())
        torch.manual_seed(2)
        assert fit_head(again, train, val, config, state=state) == expected
        for name, value in again.state_dict().items():
            assert torch.equal(value, head.state_dict()[name]), name
