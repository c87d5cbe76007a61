"""Bootstrap intervals of scores: rows (spots or cells) are drawn with replacement.

Neighbouring spots resemble each other, so intervals over spots are narrower than over tissue.
Scores that are sums over rows are computed for all draws at once. They are matrix products with
the number of times that each draw holds each row. Shape letters: R draws, S rows, G genes.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scellst_ray.evaluation.expression.metrics import spearman_by_column

Array = NDArray[np.float64]
# A draw is constant if its variance is below this share of the whole sample's: rounding noise.
NOISE = 1e-10


def draws(num_rows: int, num_draws: int, seed: int) -> NDArray[np.int64]:
    """Return the rows of each draw [R, S], fixed by the seed."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, num_rows, (num_draws, num_rows), dtype=np.int64)


def times_drawn(rows_RS: NDArray[np.int64]) -> Array:
    """Return the number of times that each draw holds each row [R, S]."""
    num_draws, num_rows = rows_RS.shape
    places = rows_RS + num_rows * np.arange(num_draws)[:, None]
    counts = np.bincount(places.ravel(), minlength=num_draws * num_rows)
    return counts.reshape(num_draws, num_rows).astype(np.float64)


def mean_of_draws(values_SG: ArrayLike, times_RS: Array) -> Array:
    """Return the column means of every draw [R, G]."""
    return np.asarray(times_RS @ np.asarray(values_SG, np.float64) / times_RS.sum(1)[:, None])


def pearson_of_draws(
    a_SG: ArrayLike, b_SG: ArrayLike, times_RS: Array, covariate_S: ArrayLike | None = None
) -> Array:
    """Return Pearson's r by column of every draw [R, G], NaN where a column is constant.

    Args:
        a_SG: For example predicted expression.
        b_SG: For example measured expression.
        times_RS: From times_drawn.
        covariate_S: If given, partial correlations given this covariate are returned.
    """
    # Centred over the whole sample first, so that variances lose no digits by cancellation.
    a, b = (_standard(np.asarray(values, np.float64)) for values in (a_SG, b_SG))
    r_ab = _correlations(a, b, times_RS)
    if covariate_S is None:
        return r_ab
    c = _standard(np.asarray(covariate_S, np.float64)[:, None])
    r_ac, r_bc = (_correlations(x, c, times_RS) for x in (a, b))
    # A covariate that is constant in a draw explains nothing.
    r_ac, r_bc = (np.where(np.isnan(r), 0.0, r) for r in (r_ac, r_bc))
    left = (1 - r_ac**2) * (1 - r_bc**2)
    partial = np.divide(
        r_ab - r_ac * r_bc, np.sqrt(left), out=np.full_like(left, np.nan), where=left > NOISE
    )
    return np.asarray(np.clip(partial, -1, 1))


def spearman_of_draws(a_SG: ArrayLike, b_SG: ArrayLike, rows_RS: NDArray[np.int64]) -> Array:
    """Return Spearman's rho by column of every draw [R, G]; ranks are those within the draw."""
    a, b = np.asarray(a_SG), np.asarray(b_SG)
    return np.stack([spearman_by_column(a[rows], b[rows]) for rows in rows_RS])


def interval(values: ArrayLike, level: float = 0.95) -> Array:
    """Return lower and upper quantile along the first axis [2, ...], NaN left out.

    A value that is NaN in every draw stays NaN.
    """
    array = np.asarray(values, np.float64)
    flat = array.reshape(len(array), -1)
    quantiles = np.full((2, flat.shape[1]), np.nan)
    some = ~np.isnan(flat).all(axis=0)
    tail = 50 * (1 - level)
    quantiles[:, some] = np.nanpercentile(flat[:, some], (tail, 100 - tail), axis=0)
    return quantiles.reshape(2, *array.shape[1:])


def mean_over_genes(values_RG: Array) -> Array:
    """Return the mean over genes of every draw [R], NaN left out; NaN where all are."""
    is_number = ~np.isnan(values_RG)
    num = is_number.sum(axis=-1)
    total = np.where(is_number, values_RG, 0.0).sum(axis=-1)
    return np.asarray(np.divide(total, num, out=np.full(num.shape, np.nan), where=num > 0))


def _standard(values_SG: Array) -> Array:
    """Centre and scale columns by the whole sample; a constant column becomes zero."""
    centred = values_SG - values_SG.mean(axis=0)
    length = np.sqrt((centred**2).mean(axis=0))
    constant = values_SG.min(axis=0) == values_SG.max(axis=0)
    return np.asarray(np.where(constant, 0.0, centred / np.where(constant, 1.0, length)))


def _correlations(a_SG: Array, b_SG: Array, times_RS: Array) -> Array:
    """Return r by column of every draw; columns must be standardised over the whole sample."""
    num = times_RS.sum(axis=1)[:, None]
    mean_a, mean_b = times_RS @ a_SG / num, times_RS @ b_SG / num
    variance_a = times_RS @ a_SG**2 / num - mean_a**2
    variance_b = times_RS @ b_SG**2 / num - mean_b**2
    together = times_RS @ (a_SG * b_SG) / num - mean_a * mean_b
    some = (variance_a > NOISE) & (variance_b > NOISE)
    product = np.where(some, variance_a, 1.0) * np.where(some, variance_b, 1.0)
    return np.asarray(np.where(some, np.clip(together / np.sqrt(product), -1, 1), np.nan))
