"""Fits on row numbers equal fits on embeddings, and the search drops the worse learning rates."""

import numpy as np
import pytest
import torch

from scellst_ray.evaluation.simulation.fit import RowHead, Search, fit_rows, predict_rows, row_bags
from scellst_ray.models.mil.bags import BagSet, bag_mean
from scellst_ray.models.mil.fit import FitConfig, fit_head
from scellst_ray.models.mil.head import MilHead
from scellst_ray.models.mil.head_file import Formula


def test_a_row_head_is_the_plain_head_on_the_rows():
    torch.manual_seed(0)
    matrix_ND = torch.randn(12, 5)
    head = RowHead(matrix_ND, 4, Formula())
    plain = MilHead(5, 4)
    plain.load_state_dict(head.state_dict())
    rows_SK = np.array([[1, 1, 7], [7, 0, 11]])
    targets = np.random.default_rng(0).random((2, 4)).astype(np.float32)
    bags = row_bags(rows_SK, targets)
    for model, inputs in ((head, bags.embeddings_LD), (plain, matrix_ND[rows_SK.ravel()])):
        prediction_SP = bag_mean(model(inputs), bags.offsets)
        (prediction_SP - torch.from_numpy(targets)).square().sum().backward()
    for one, other in zip(head.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    rows = np.array([3, 3, 0])
    expected = plain(matrix_ND[rows]).detach().numpy()
    np.testing.assert_allclose(predict_rows(head, rows, block=2), expected, rtol=1e-5)


def small_bags(num_cells=40, num_spots=60):
    """Return inputs, and training and validation bags of row numbers, from a planted rule."""
    rng = np.random.default_rng(1)
    matrix_ND = rng.normal(0, 1, (num_cells, 6)).astype(np.float32)
    rows_SK = rng.integers(0, num_cells, (num_spots, 4))
    targets = np.exp(matrix_ND[rows_SK][:, :, :3]).mean(axis=1).astype(np.float32)
    cut = num_spots * 4 // 5
    return matrix_ND, row_bags(rows_SK[:cut], targets[:cut]), row_bags(rows_SK[cut:], targets[cut:])


def plain_fit(matrix_ND, bags, config, num_cells):
    """Return what fit_head does with the embeddings themselves."""
    torch.manual_seed(config.seed)
    plain = MilHead(6, 3)
    plain.standardise(torch.from_numpy(matrix_ND[:num_cells]))
    own = [
        BagSet(torch.from_numpy(matrix_ND[b.embeddings_LD[:, 0]]), b.offsets, b.targets_SG)
        for b in bags
    ]
    return fit_head(plain, *own, config), plain


@pytest.mark.parametrize("rungs", [[], [2, 3], [3, 99]])
def test_fitting_rows_is_fitting_their_embeddings(rungs):
    matrix_ND, *bags = small_bags()
    config = FitConfig(lr=5e-3, max_epochs=7, patience=7, batch_spots=16)
    fitted = fit_rows(matrix_ND, np.arange(30), *bags, Search(config, [5e-3], rungs))
    result, plain = plain_fit(matrix_ND, bags, config, 30)
    assert fitted.validation_loss == pytest.approx(result.best_loss, rel=1e-5)
    assert fitted.num_epochs == len(result.history)
    expected = plain(torch.from_numpy(matrix_ND)).detach().numpy()
    np.testing.assert_allclose(predict_rows(fitted.head, np.arange(40)), expected, rtol=1e-3)


def test_the_worse_half_is_dropped_at_every_rung():
    matrix_ND, *bags = small_bags()
    rates = [1e-2, 3e-3, 1e-3, 1e-9]
    config = FitConfig(max_epochs=12, patience=12, batch_spots=16)
    fitted = fit_rows(matrix_ND, np.arange(40), *bags, Search(config, rates, [2, 5]))
    alone = {}
    for rate in rates:
        own = FitConfig(lr=rate, max_epochs=12, patience=12, batch_spots=16)
        alone[rate] = [val for _, val in plain_fit(matrix_ND, bags, own, 40)[0].history]
    best = {rate: np.minimum.accumulate(losses) for rate, losses in alone.items()}
    second = sorted(rates, key=lambda rate: best[rate][1])[:2]
    winner = min(second, key=lambda rate: best[rate][4])
    assert fitted.learning_rate == winner
    last = {rate: 1 if rate not in second else 4 for rate in rates} | {winner: 11}
    for rate, epoch in last.items():
        assert fitted.search[rate] == pytest.approx(best[rate][epoch], rel=1e-4)
    assert (fitted.num_epochs, fitted.validation_loss) == (12, fitted.search[winner])


def test_a_fit_that_has_stopped_is_not_taken_up_again():
    matrix_ND, *bags = small_bags()
    config = FitConfig(max_epochs=40, patience=1, batch_spots=64)
    fitted = fit_rows(matrix_ND, np.arange(40), *bags, Search(config, [3e-2], [30, 35]))
    own = FitConfig(lr=3e-2, max_epochs=40, patience=1, batch_spots=64)
    result, plain = plain_fit(matrix_ND, bags, own, 40)
    assert fitted.num_epochs == len(result.history) < 30
    expected = plain(torch.from_numpy(matrix_ND)).detach().numpy()
    np.testing.assert_allclose(predict_rows(fitted.head, np.arange(40)), expected, rtol=1e-3)


def test_rates_that_diverge_are_passed_over():
    matrix_ND, *bags = small_bags()
    config = FitConfig(max_epochs=4, patience=4, batch_spots=4)
    fitted = fit_rows(matrix_ND, np.arange(40), *bags, Search(config, [1e30, 1e-3], [3]))
    assert fitted.learning_rate == 1e-3
    assert fitted.search[1e30] is None
    with pytest.raises(ValueError, match=r"all learning rates .* diverged"):
        fit_rows(matrix_ND, np.arange(40), *bags, Search(config, [1e30], [3]))
