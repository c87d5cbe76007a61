"""Fits: early stopping, resuming, and the recovery of known cells from means of bags."""

import copy

import numpy as np
import pytest
import torch

from scellst_ray.models.mil.bags import BagSet, split_spots
from scellst_ray.models.mil.epoch import validation_loss
from scellst_ray.models.mil.fit import EarlyStopping, FitConfig, fit_head, new_head
from tests.support.mil_bags import make_bags, make_counts


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
    for gene in range(4):  # instances that are not in training, where only means are known
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


def test_heads_on_counts_need_size_factors_and_begin_at_the_genes_means():
    bags = make_bags(dtype=torch.float32)
    formula = FitConfig(loss="nb").formula()
    with pytest.raises(ValueError, match="loss 'nb' needs counts with size factors"):
        new_head(bags, 0, formula)
    counts = make_counts(bags)
    head = new_head(counts, 0, formula)
    expected = counts.targets_SG.sum(0) / counts.size_factors_S.sum()
    torch.testing.assert_close(head.gene_scale_G, expected)
    assert not head.log_dispersion.any()
    published = new_head(counts, 0, FitConfig(loss="nb", predictor="published").formula())
    assert (published.gene_scale_G == 1).all()
    assert published.log_dispersion.std() > 0.1


@pytest.mark.parametrize("loss", ["nb", "nb_total"])
def test_fit_on_counts_recovers_cells_and_dispersion(loss):
    generator = torch.Generator().manual_seed(0)
    bags = make_bags(num_spots=400, num_genes=2, dtype=torch.float32)
    factors = torch.rand(400, generator=generator) + 0.5
    mean = 20 * bags.targets_SG * factors[:, None]
    theta = torch.tensor([2.0, 50.0])
    rate = torch._standard_gamma(theta.expand(400, 2), generator=generator) * mean / theta
    counts = torch.poisson(rate, generator=generator)
    whole = BagSet(bags.embeddings_LD, bags.offsets, counts, factors)
    train, val = (whole.take(part) for part in split_spots(["A"] * 400, 0.2, seed=0))
    config = FitConfig(lr=3e-3, batch_spots=64, max_epochs=25, patience=8, loss=loss)
    head = new_head(train, 0, config.formula())
    result = fit_head(head, train, val, config)
    assert result.best_loss < result.history[0][1] - 0.05
    with torch.no_grad():
        x_ND = torch.randn(500, 6, generator=generator)
        found = head.from_hidden(head.hidden(x_ND))
    truth = 20 * torch.nn.functional.softplus(2 * x_ND[:, :2])
    for gene, least in ((0, 0.85), (1, 0.9)):
        assert np.corrcoef(found[:, gene], truth[:, gene])[0, 1] > least
    # Expression is in counts of a spot of size factor 1.
    assert found.mean().item() == pytest.approx(truth.mean().item(), rel=0.25)
    if loss == "nb":
        assert head.log_dispersion[0] < head.log_dispersion[1]
