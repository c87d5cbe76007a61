"""Bootstraps by matrix products equal bootstraps that draw rows one draw at a time."""

import numpy as np
import pytest
from scipy import stats

from scellst_ray.evaluation.expression.bootstrap import (
    draws,
    interval,
    mean_of_draws,
    mean_over_genes,
    pearson_of_draws,
    spearman_of_draws,
    times_drawn,
)
from scellst_ray.evaluation.expression.metrics import partial_pearson_by_column, pearson_by_column


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(40, 5)) + 1e4  # far from 0, where variances would cancel
    b = 0.7 * a + rng.normal(size=a.shape)
    b[:, 3] = 7.1
    b[:38, 4] = 2.0  # some draws hold none of the last two rows
    return a, b, rng.normal(size=40) + a[:, 0]


def test_draws_are_fixed_by_their_seed_and_hold_every_row_equally_often():
    rows = draws(30, 400, seed=1)
    assert rows.shape == (400, 30)
    np.testing.assert_array_equal(rows, draws(30, 400, seed=1))
    assert (rows != draws(30, 400, seed=2)).any()
    times = times_drawn(rows)
    np.testing.assert_array_equal(times.sum(1), 30)
    assert times[7].tolist() == [(rows[7] == row).sum() for row in range(30)]
    assert times.mean(0) == pytest.approx(np.ones(30), abs=0.25)


def test_scores_of_draws_equal_scores_of_drawn_rows(pair):
    a, b, covariate = pair
    rows = draws(40, 60, seed=3)
    times = times_drawn(rows)
    pearson = np.stack([pearson_by_column(a[r], b[r]) for r in rows])
    assert np.isnan(pearson[:, 4]).any()
    assert not np.isnan(pearson[:, 4]).all()
    np.testing.assert_allclose(pearson_of_draws(a, b, times), pearson, rtol=1e-9, atol=1e-12)
    partial = np.stack([partial_pearson_by_column(a[r], b[r], covariate[r]) for r in rows])
    found = pearson_of_draws(a, b, times, covariate)
    np.testing.assert_allclose(found, partial, rtol=1e-7, atol=1e-9)
    plain = pearson_of_draws(a, b, times, np.full(40, 2.0))
    np.testing.assert_allclose(plain, pearson, rtol=1e-9, atol=1e-12)
    ranked = [stats.spearmanr(a[r, 0], b[r, 0])[0] for r in rows]
    np.testing.assert_allclose(spearman_of_draws(a, b, rows)[:, 0], ranked, rtol=1e-12)
    np.testing.assert_allclose(mean_of_draws(a, times), [a[r].mean(0) for r in rows])


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = []
    for trial in range(200):
        sample = rng.normal(size=(60, 1))
        means = mean_of_draws(sample, times_drawn(draws(60, 200, seed=trial)))
        low, high = interval(means)
        held.append(low[0] < 0 < high[0])
    assert 0.88 < np.mean(held) < 0.985


def test_intervals_leave_nan_out_and_keep_the_shape():
    values = np.arange(101.0)[:, None, None] + np.array([[0.0, 10.0, np.nan]])
    values[5, 0, 1] = np.nan
    found = interval(values)
    assert found.shape == (2, 1, 3)
    np.testing.assert_allclose(found[:, 0, 0], [2.5, 97.5])
    np.testing.assert_allclose(
        found[:, 0, 1], np.percentile(np.delete(np.arange(101) + 10.0, 5), (2.5, 97.5))
    )
    assert np.isnan(found[:, 0, 2]).all()
    np.testing.assert_allclose(interval(np.arange(101.0)), [2.5, 97.5])


def test_mean_over_genes_leaves_nan_out():
    values = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]])
    np.testing.assert_array_equal(mean_over_genes(values), [2.0, np.nan])
