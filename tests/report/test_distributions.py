"""Distributions count every cell once, and add up to those of all cells."""

import numpy as np
import pytest

from scellst_ray.report.cells import NUM_TYPES, OTHERS
from scellst_ray.report.distributions import add_up, count_values
from scellst_ray.runs.profiles import histograms

GENES, TYPES = ("CD3E", "VIM"), ("tumour", "immune")


def values(seed, count):
    rng = np.random.default_rng(seed)
    return rng.gamma(2, 1 + seed, (count, 2)).astype(np.float32), rng.integers(0, 2, count)


def test_each_cell_counts_for_its_type():
    values_NG, codes_N = values(0, 50)
    found = count_values(GENES, values_NG, TYPES, codes_N)
    assert found.low_G.tolist() == values_NG.min(axis=0).tolist()
    assert found.high_G.tolist() == values_NG.max(axis=0).tolist()
    for code, name in enumerate(TYPES):
        of_type = values_NG[codes_N == code]
        assert found.by_type[name].num_cells == len(of_type)
        np.testing.assert_array_equal(found.by_type[name].whole(), histograms(of_type))


@pytest.mark.parametrize("sizes", [(30, 70), (1, 1, 5), (40, 2, 9, 300)])
def test_slides_add_up_to_their_cells(sizes):
    slides = [values(seed, count) for seed, count in enumerate(sizes)]
    parts = [count_values(GENES, v, TYPES, c) for v, c in slides]
    whole = count_values(
        GENES,
        np.concatenate([v for v, _ in slides]),
        TYPES,
        np.concatenate([c for _, c in slides]),
    )
    found = add_up(parts)
    assert found.low_G.tolist() == whole.low_G.tolist()
    assert found.high_G.tolist() == whole.high_G.tolist()
    assert set(found.by_type) == set(whole.by_type)
    for name, counts in whole.by_type.items():
        assert found.by_type[name].num_cells == counts.num_cells
        np.testing.assert_array_equal(found.by_type[name].whole(), counts.whole())


def test_cells_without_finite_values_or_a_type_are_left_out():
    values_NG, codes_N = values(1, 20)
    values_NG[3, 0], values_NG[4, 1], codes_N[5] = np.nan, np.inf, -1
    found = count_values(GENES, values_NG, TYPES, codes_N)
    assert sum(counts.num_cells for counts in found.by_type.values()) == 17
    assert np.isfinite(found.high_G).all()
    assert count_values(GENES, np.full((2, 2), np.nan, np.float32), TYPES, np.zeros(2, int)) is None
    assert count_values((), np.zeros((4, 0), np.float32), TYPES, np.zeros(4, int)) is None
    assert add_up([]) is None


def test_the_commonest_types_of_a_cohort_are_kept():
    parts = []
    for slide in range(3):
        names = [*(f"t{slide}_{n}" for n in range(10)), OTHERS]
        codes_N = np.repeat(np.arange(11), [*range(20, 10, -1), 50])
        parts.append(count_values(("G",), np.ones((len(codes_N), 1), np.float32), names, codes_N))
    found = add_up(parts)
    assert len(found.by_type) == NUM_TYPES + 1
    assert list(found.by_type)[-1] == OTHERS
    assert found.by_type["t0_0"].num_cells == 20
    assert sum(c.num_cells for c in found.by_type.values()) == 3 * (155 + 50)
