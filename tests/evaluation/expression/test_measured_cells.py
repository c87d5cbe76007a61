"""Pairs of found and measured cells equal a slow search, and their expression is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scellst_ray.evaluation.expression.measured_cells import cell_truth, pair_cells
from scellst_ray.spots.xenium import MeasuredCells


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 30), st.integers(0, 30))
def test_pairs_equal_a_slow_search(seed, num_found, num_measured):
    rng = np.random.default_rng(seed)
    found, measured = rng.uniform(0, 50, (num_found, 2)), rng.uniform(0, 50, (num_measured, 2))
    pairs = pair_cells(found, measured, 6.0)
    expected = []
    for i in range(num_found):
        for j in range(num_measured):
            distance = np.hypot(*(found[i] - measured[j]))
            nearest = all(np.hypot(*(found[i] - other)) >= distance for other in measured)
            back = all(np.hypot(*(other - measured[j])) >= distance for other in found)
            if nearest and back and distance <= 6:
                expected.append((i, j, distance))
    assert pairs.found.tolist() == [i for i, _, _ in expected]
    assert pairs.measured.tolist() == [j for _, j, _ in expected]
    np.testing.assert_allclose(pairs.distance0, [d for _, _, d in expected])


def measured_cells() -> MeasuredCells:
    counts = sparse.csr_matrix(np.array([[0, 0, 0], [3, 0, 1], [1, 1, 2]], np.float32))
    return MeasuredCells(np.array(["a", "b", "c"]), np.zeros((3, 2)), counts, ["A", "B", "C"])


def test_truth_is_normalised_over_all_genes_measured():
    truth, kept = cell_truth(measured_cells(), np.array([2, 0, 1, 2]), ["C", "X", "A"])
    assert kept.tolist() == [True, False, True, True]
    assert truth.genes == ["C", "A"]
    expected = np.log1p(1e4 * np.array([[0.5, 0.25], [0.25, 0.75], [0.5, 0.25]]))
    np.testing.assert_allclose(truth.values_SG, expected, rtol=1e-6)
    np.testing.assert_allclose(truth.log_depth_S, np.log1p([4, 4, 4]))


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match=r"none of 2 genes.*one naming and one species"):
        cell_truth(measured_cells(), np.array([1]), ["X", "Y"])
    with pytest.raises(ValueError, match="none of 1 pairs of a found and a measured cell has"):
        cell_truth(measured_cells(), np.array([0]), ["A"])
