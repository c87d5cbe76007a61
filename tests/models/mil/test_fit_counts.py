"""Fitting heads on counts, by either likelihood."""

import numpy as np
import pytest
import torch

from scellst_ray.models.mil.bags import BagSet, split_spots
from scellst_ray.models.mil.fit import FitConfig, fit_head, new_head
from tests.support.mil_bags import make_bags, make_counts, single_cells


@pytest.mark.parametrize(
    ("targets", "factors", "words"),
    [
        ([[1.0], [2.5]], [1.0, 1.0], "whole numbers from 0, got 2.5 in bag 1, gene 0"),
        ([[-1.0], [2.0]], [1.0, 1.0], "got -1.0 in bag 0"),
        ([[1.0], [2.0]], [1.0, 0.0], "one positive number for each of 2 bags"),
        ([[1.0], [2.0]], [1.0], r"size factors have shape \(1,\)"),
    ],
)
def test_counts_that_are_none_are_refused(targets, factors, words):
    with pytest.raises(ValueError, match=words):
        single_cells(torch.ones(2, 3), torch.tensor(targets), torch.tensor(factors))


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
    # In counts of a spot of size factor 1.
    assert found.mean().item() == pytest.approx(truth.mean().item(), rel=0.25)
    if loss == "nb":
        assert head.log_dispersion[0] < head.log_dispersion[1]
