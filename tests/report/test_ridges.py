"""Distributions lie where the values are, between the gene's lowest and highest one."""

import numpy as np
import pytest

from scellst_ray.report.distributions import add_up, count_values
from scellst_ray.report.ridges import HEIGHT, STEPS, WIDTH, draw_ridges, shares_of
from scellst_ray.runs.profiles import histograms


def shares(values, low, high):
    return shares_of(histograms(np.asarray(values, np.float32)[:, None])[0], low, high)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.gamma(2, 1, 20_000),
        lambda rng: rng.uniform(0, 5, 20_000),
        lambda rng: 100 + rng.normal(0, 10, 20_000),
        lambda rng: rng.exponential(0.01, 20_000),
    ],
)
def test_shares_are_those_of_a_histogram(draw):
    values = np.abs(draw(np.random.default_rng(0))).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    found, median = shares(values, low, high)
    true, _ = np.histogram((values - low) / (high - low), STEPS, (0, 1))
    assert found.sum() == pytest.approx(1)
    # Bins are 3 % of their value wide: what lies next to an edge may count on either side.
    assert np.abs(np.cumsum(found) - np.cumsum(true / len(values))).max() < 0.02
    assert median == pytest.approx((np.median(values) - low) / (high - low), abs=0.02)


@pytest.mark.parametrize(("values", "step"), [([0.0, 0.0], 0), ([8.0, 8.0], STEPS - 1)])
def test_cells_at_an_end_stay_there(values, step):
    found, _ = shares(values, 0.0, 8.0)
    assert found[step - 1 if step else step :][:2].sum() == pytest.approx(1, abs=1e-6)


def test_a_gene_that_does_not_vary_lies_at_its_lowest_value():
    found, median = shares([3.0, 3.0], 3.0, 3.0)
    assert found[0] == 1
    assert median == 0


def test_drawings_state_range_and_median():
    rng = np.random.default_rng(0)
    values_NG = np.concatenate([rng.uniform(0, 1, 100), rng.uniform(9, 10, 50)])[:, None]
    codes_N = np.repeat([0, 1], [100, 50])
    found = count_values(("CD3E",), values_NG.astype(np.float32), ("low", "high"), codes_N)
    (drawn,) = draw_ridges(add_up([found]), {"low": "#000000", "high": "#ffffff"})
    assert float(drawn.high) == pytest.approx(10, abs=0.1)
    low, high = drawn.ridges
    assert (low.name, low.colour, high.colour) == ("low", "#000000", "#ffffff")
    assert low.mark == pytest.approx(0.05 * WIDTH, abs=4)
    assert high.mark == pytest.approx(0.95 * WIDTH, abs=6)
    assert low.about.startswith("CD3E in 100 cells of low: median 0.")
    places = [tuple(map(float, point.split(","))) for point in high.points.split()]
    assert min(y for _, y in places) == pytest.approx(2, abs=0.1)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    assert all(y > HEIGHT - 0.5 for x, y in places if x < 0.8 * WIDTH)


def test_nothing_to_draw():
    assert draw_ridges(None, {}) == []
