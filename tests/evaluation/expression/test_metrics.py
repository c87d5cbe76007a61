import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from scellst_ray.evaluation.expression.metrics import (
    FEW_VALUES,
    average_ranks,
    mae_by_column,
    partial_pearson_by_column,
    pearson_by_column,
    rmse_by_column,
    spearman_by_column,
)


def pair(num_rows=50, num_genes=6, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(num_rows, num_genes))
    b = 0.5 * a + rng.normal(size=a.shape)
    return a, np.round(b, 1)  # rounded, so that ranks tie


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_equals_scipy(dtype):
    a, b = (x.astype(dtype) for x in pair())
    columns = range(a.shape[1])
    pearson = [stats.pearsonr(a[:, g].astype(float), b[:, g].astype(float))[0] for g in columns]
    spearman = [stats.spearmanr(a[:, g], b[:, g])[0] for g in columns]
    np.testing.assert_allclose(pearson_by_column(a, b), pearson, rtol=1e-12)
    np.testing.assert_allclose(spearman_by_column(a, b), spearman, rtol=1e-12)
    assert pearson_by_column(a, b).dtype == np.float64


def test_constant_columns_are_nan_and_others_are_not_touched():
    a, b = pair()
    expected = pearson_by_column(a, b)
    a[:, 1] = 0.1  # its mean is not exactly 0.1
    b[:, 4] = -7.3
    for found in (
        pearson_by_column(a, b),
        spearman_by_column(a, b),
        partial_pearson_by_column(a, b, np.arange(50.0)),
    ):
        assert np.isnan(found).tolist() == [False, True, False, False, True, False]
    np.testing.assert_array_equal(pearson_by_column(a, b)[[0, 2]], expected[[0, 2]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-160, 1e150), st.floats(-100, 100))
def test_pearson_ignores_scale_and_shift_and_is_symmetric(seed, scale, shift):
    a, b = pair(seed=seed)
    expected = pearson_by_column(a, b)
    np.testing.assert_allclose(pearson_by_column(b, a), expected, rtol=1e-12)
    np.testing.assert_allclose(pearson_by_column(a * scale, b + shift), expected, rtol=1e-8)


def test_partial_equals_the_correlation_of_residuals():
    a, b = pair()
    rng = np.random.default_rng(1)
    covariate = rng.normal(size=50) + a[:, 0] + b[:, 1]
    design = np.column_stack([np.ones(50), covariate])

    def residual(y):
        return y - design @ np.linalg.lstsq(design, y, rcond=None)[0]

    expected = [stats.pearsonr(residual(a[:, g]), residual(b[:, g]))[0] for g in range(6)]
    found = partial_pearson_by_column(a, b, covariate)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert abs(found[0] - pearson_by_column(a, b)[0]) > 0.01


def test_partial_with_a_closed_form():
    a, b = pair(num_genes=1)
    covariate = np.random.default_rng(2).normal(size=50) + a[:, 0]
    r_ab, r_ac, r_bc = (
        np.corrcoef(x, y)[0, 1]
        for x, y in [(a[:, 0], b[:, 0]), (a[:, 0], covariate), (b[:, 0], covariate)]
    )
    expected = (r_ab - r_ac * r_bc) / np.sqrt((1 - r_ac**2) * (1 - r_bc**2))
    np.testing.assert_allclose(partial_pearson_by_column(a, b, covariate), [expected], rtol=1e-10)


def test_partial_is_nan_where_the_covariate_explains_a_column_and_plain_where_it_is_constant():
    a, b = pair()
    covariate = np.linspace(0, 1, 50) ** 2
    a[:, 2] = 3 * covariate - 7
    assert np.isnan(partial_pearson_by_column(a, b, covariate)).tolist() == [
        g == 2 for g in range(6)
    ]
    np.testing.assert_allclose(
        partial_pearson_by_column(a, b, np.full(50, 3.3)), pearson_by_column(a, b), rtol=1e-12
    )


def test_shapes_that_do_not_fit_are_refused():
    a, b = pair()
    with pytest.raises(ValueError, match=r"shapes \(50, 6\) and \(50, 5\)"):
        pearson_by_column(a, b[:, :5])
    with pytest.raises(ValueError, match="covariate of shape"):
        partial_pearson_by_column(a, b, np.ones(49))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 30), st.integers(0, 4))
def test_ranks_equal_scipy(seed, num_rows, length, decimals):
    values = np.round(np.random.default_rng(seed).normal(size=(num_rows, length)), decimals)
    np.testing.assert_array_equal(average_ranks(values), stats.rankdata(values, axis=1))


def test_ranks_of_infinities_signed_zeros_and_nan():
    values = np.array([[np.inf, -0.0, 0.0, -np.inf, 1.0], [1.0, np.nan, 0.0, 2.0, 3.0]])
    found = average_ranks(values)
    assert found[0].tolist() == [5, 2.5, 2.5, 1, 4]
    assert np.isnan(found[1]).all()
    a, b = pair()
    a[3, 2] = np.nan
    for score in (pearson_by_column, spearman_by_column, rmse_by_column, mae_by_column):
        assert np.isnan(score(a, b)).tolist() == [g == 2 for g in range(6)]


@pytest.mark.parametrize("num_rows", [2, 700, 40000])
def test_blocks_on_threads_equal_columns_one_by_one(num_rows):
    num_genes = FEW_VALUES // num_rows + 37
    a, b = pair(num_rows, num_genes)
    chosen = np.random.default_rng(0).choice(num_genes, 5)
    for score in (pearson_by_column, spearman_by_column, rmse_by_column, mae_by_column):
        whole = score(a, b)
        for gene in chosen:
            np.testing.assert_array_equal(whole[gene], score(a[:, [gene]], b[:, [gene]])[0])


def test_errors_equal_sklearn():
    a, b = pair()
    expected = sk.root_mean_squared_error(b, a, multioutput="raw_values")
    np.testing.assert_allclose(rmse_by_column(a, b), expected)
    expected = sk.mean_absolute_error(b, a, multioutput="raw_values")
    np.testing.assert_allclose(mae_by_column(a, b), expected)
