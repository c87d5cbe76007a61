"""Negative binomial likelihoods against scipy, torch and arithmetic of 50 digits."""

import itertools

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scellst_ray.models.mil.likelihood import inverse_dispersion, nb_log_prob, nb_total_log_prob

COUNTS = st.one_of(st.just(0), st.integers(1, 30), st.integers(31, 10**6))
MEANS = st.floats(-6, 6).map(lambda power: 10.0**power)
THETAS = st.floats(-4, 6).map(lambda power: 10.0**power)


def double(value) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def exact(count, mu, theta) -> float:
    """Return the log-probability; arithmetic has 50 digits."""
    with mpmath.workdps(50):
        y, m, t = (mpmath.mpf(value) for value in (count, mu, theta))
        choose = mpmath.loggamma(y + t) - mpmath.loggamma(t) - mpmath.loggamma(y + 1)
        return float(choose + t * mpmath.log(t / (t + m)) + y * mpmath.log(m / (t + m)))


@settings(max_examples=100, deadline=None)
@given(COUNTS, MEANS, THETAS)
def test_mean_form_equals_50_digits(count, mu, theta):
    found = nb_log_prob(double(float(count)), double(mu), double(theta))
    assert found.item() == pytest.approx(exact(count, mu, theta), rel=1e-6, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(COUNTS, st.floats(-20, 20), THETAS)
def test_total_count_form_equals_the_mean_form_and_torch(count, logits, total):
    y, size, odds = double(float(count)), double(total), double(logits)
    found = nb_total_log_prob(y, size, odds)
    expected = exact(count, total * np.exp(logits), total)
    assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    peer = torch.distributions.NegativeBinomial(size, logits=odds).log_prob(y)
    assert found.item() == pytest.approx(peer.item(), rel=1e-6, abs=1e-7)


def test_both_equal_scipy_on_a_grid():
    # scipy takes theta / (theta + mu), whose distance from 1 has few digits if mu << theta. With
    # fewer than seven digits scipy's result is wrong, as the tests with 50 digits show.
    counts = np.array([0, 1, 2, 5, 100, 10**4], float)
    grid = np.array(list(itertools.product(counts, 10.0 ** np.arange(-6, 7), THETA_GRID)))
    y, mu, theta = grid[grid[:, 1] / grid[:, 2] > 1e-9].T
    assert len(y) > 700
    expected = stats.nbinom.logpmf(y, theta, theta / (theta + mu))
    found = nb_log_prob(*map(torch.from_numpy, (y, mu, theta)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    logits = np.log(mu / theta)
    found = nb_total_log_prob(*map(torch.from_numpy, (y, theta, logits)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


THETA_GRID = 10.0 ** np.arange(-4, 7)


def test_without_overdispersion_it_is_poisson():
    y, mu = np.arange(50.0), 7.3
    found = nb_log_prob(torch.from_numpy(y), double(mu), double(1e7))
    np.testing.assert_allclose(found, stats.poisson.logpmf(y, mu), atol=2e-4)


def test_probabilities_sum_to_one_and_have_their_mean_and_variance():
    y = torch.arange(20000.0, dtype=torch.float64)
    for mu, theta in [(0.3, 0.5), (5.0, 2.0), (40.0, 1.5)]:
        probability = nb_log_prob(y, double(mu), double(theta)).exp()
        mean = (probability * y).sum()
        assert probability.sum().item() == pytest.approx(1, rel=1e-9)
        assert mean.item() == pytest.approx(mu, rel=1e-9)
        variance = (probability * (y - mean) ** 2).sum().item()
        assert variance == pytest.approx(mu + mu**2 / theta, rel=1e-8)


@pytest.mark.parametrize("form", [nb_log_prob, nb_total_log_prob])
def test_gradients_are_finite_at_every_extreme(form):
    second = [0.0, 1e-40, 1e-6, 1.0, 1e6]
    third = THETA_GRID if form is nb_log_prob else np.linspace(-40, 40, 9)
    grid = list(itertools.product([0.0, 1.0, 1e6], second, third))
    y, b, c = (torch.tensor(column, dtype=torch.float32) for column in zip(*grid, strict=True))
    b, c = b.requires_grad_(), c.requires_grad_()
    found = form(y, b, c)
    assert torch.isfinite(found).all()
    assert (found <= 1e-9).all()
    found.sum().backward()
    assert torch.isfinite(b.grad).all()
    assert torch.isfinite(c.grad).all()


def test_gradients_equal_finite_differences():
    y = double([0.0, 1.0, 7.0, 300.0])
    mean = double([0.5, 2.0, 6.0, 200.0]).requires_grad_()
    theta = double([0.3, 5.0, 1e3, 20.0]).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, t: nb_log_prob(y, m, t), (mean, theta))
    logits = double([-3.0, 0.1, 1.0, 4.0]).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, g: nb_total_log_prob(y, r, g), (theta, logits))


def test_inverse_dispersion_is_bounded():
    theta = inverse_dispersion(torch.tensor([-1e9, -1.0, 0.0, 2.0, 1e9]))
    np.testing.assert_allclose(theta[1:4], np.exp([-1.0, 0.0, 2.0]), rtol=1e-12)
    assert 0 < theta[0] < 1e-6
    assert 1e6 < theta[4] < np.inf
