"""Scores column by column: genes are columns, cells or spots are rows.

Columns are scored in blocks that fit into the cache of a CPU, several blocks at a time. The score
of a column does not depend on other columns. Shape letters: S spots (or cells), G genes, B genes of
a block.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Values in a block; 256 kB as float64.
BLOCK_VALUES = 1 << 15
# Below this many values threads cost more than they save.
FEW_VALUES = 1 << 17
MAX_THREADS = 8

Array = NDArray[np.float64]


def pearson_by_column(a_SG: ArrayLike, b_SG: ArrayLike) -> Array:
    """Return Pearson's r of each column of a with the same column of b.

    Args:
        a_SG: [S, G], for example predicted expression.
        b_SG: [S, G], for example measured expression.

    Returns:
        float64 [G]. NaN where either column is constant or holds a NaN, since no correlation
        exists. Next to a mean, report how many columns are NaN.

    Raises:
        ValueError: the shapes differ or are not two-dimensional.
    """
    return _by_block(
        lambda a_BS, b_BS: _correlate(_centre_rows(a_BS), _centre_rows(b_BS)), a_SG, b_SG
    )


def spearman_by_column(a_SG: ArrayLike, b_SG: ArrayLike) -> Array:
    """Return Spearman's rho of each column of a with the same column of b (average ranks).

    Arguments, result and errors as in pearson_by_column.
    """

    def rho(a_BS: Array, b_BS: Array) -> Array:
        return _correlate(_centre_rows(average_ranks(a_BS)), _centre_rows(average_ranks(b_BS)))

    return _by_block(rho, a_SG, b_SG)


def partial_pearson_by_column(a_SG: ArrayLike, b_SG: ArrayLike, covariate_S: ArrayLike) -> Array:
    """Return Pearson's r of each pair of columns with one covariate partialled out of both.

    With log total counts as covariate, it shows whether a prediction knows more than the amount of
    tissue in a spot.

    Args:
        a_SG: [S, G], for example predicted expression.
        b_SG: [S, G], for example measured expression.
        covariate_S: [S]. A constant covariate changes nothing.

    Returns:
        float64 [G], the correlation of residuals after linear regression of each column on the
        covariate. NaN where a column is constant or a linear function of the covariate.

    Raises:
        ValueError: the shapes differ.
    """
    covariate = np.asarray(covariate_S, np.float64)
    if covariate.shape != (len(np.asarray(a_SG)),):
        rows = len(np.asarray(a_SG))
        message = f"covariate of shape {covariate.shape}, expected one value per row: ({rows},)."
        raise ValueError(message)
    axis_S = _centre_rows(covariate[None])[0]

    def partial(a_BS: Array, b_BS: Array) -> Array:
        return _correlate(
            _residual(_centre_rows(a_BS), axis_S), _residual(_centre_rows(b_BS), axis_S)
        )

    return _by_block(partial, a_SG, b_SG)


def rmse_by_column(a_SG: ArrayLike, b_SG: ArrayLike) -> Array:
    """Return the root mean squared difference of each pair of columns, float64 [G]."""
    return _by_block(lambda a_BS, b_BS: np.sqrt(((a_BS - b_BS) ** 2).mean(axis=1)), a_SG, b_SG)


def mae_by_column(a_SG: ArrayLike, b_SG: ArrayLike) -> Array:
    """Return the mean absolute difference of each pair of columns, float64 [G]."""
    return _by_block(lambda a_BS, b_BS: np.abs(a_BS - b_BS).mean(axis=1), a_SG, b_SG)


def average_ranks(values_BS: Array) -> Array:
    """Return ranks from 1 along each row; ties share their mean rank.

    The result equals scipy.stats.rankdata(axis=1) and takes a fifth of its time. A row with a NaN
    becomes NaN.
    """
    num_rows, length = values_BS.shape
    order_BS = np.argsort(values_BS, axis=1)
    sorted_BS = np.take_along_axis(values_BS, order_BS, axis=1)
    is_first = np.ones((num_rows, length), bool)
    np.not_equal(sorted_BS[:, 1:], sorted_BS[:, :-1], out=is_first[:, 1:])
    first = np.flatnonzero(is_first)
    num_tied = np.diff(first, append=num_rows * length)
    ranks = np.repeat(first % length + (num_tied + 1) / 2.0, num_tied).reshape(num_rows, length)
    result = np.empty_like(ranks)
    np.put_along_axis(result, order_BS, ranks, axis=1)
    result[np.isnan(sorted_BS[:, -1])] = np.nan  # NaN is sorted to the end
    return result


def _by_block(score: Callable[[Array, Array], Array], a_SG: ArrayLike, b_SG: ArrayLike) -> Array:
    """Apply `score` to blocks of columns, laid out as rows; return its values, float64 [G]."""
    a, b = np.asarray(a_SG), np.asarray(b_SG)
    if a.ndim != 2 or a.shape != b.shape or len(a) == 0:
        message = (
            f"shapes {a.shape} and {b.shape}, expected two equal shapes [rows, genes] with at "
            "least one row. Align rows (cells or spots) and genes first."
        )
        raise ValueError(message)
    num_rows, num_genes = a.shape
    size = max(1, BLOCK_VALUES // num_rows)
    result = np.empty(num_genes)

    def one(start: int) -> None:
        part = slice(start, start + size)
        result[part] = score(
            *(np.ascontiguousarray(values[:, part].T, np.float64) for values in (a, b))
        )

    starts = range(0, num_genes, size)
    if a.size < FEW_VALUES:
        for start in starts:
            one(start)
        return result
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(one, starts))
    return result


def _centre_rows(values_BS: Array) -> Array:
    """Subtract row means; a constant row becomes exactly zero, not rounding noise."""
    centred: Array = values_BS - values_BS.mean(axis=1, keepdims=True)
    centred[values_BS.min(axis=1) == values_BS.max(axis=1)] = 0.0
    return centred


def _residual(centred_BS: Array, axis_S: Array) -> Array:
    """Remove from centred rows the part that is linear in the centred covariate."""
    length = axis_S @ axis_S
    if length == 0:
        return centred_BS
    residual = centred_BS - np.outer(centred_BS @ axis_S / length, axis_S)
    # A row that is linear in the covariate leaves rounding noise, which has no correlation.
    noise = (residual**2).sum(axis=1) <= 1e-24 * len(axis_S) * (centred_BS**2).sum(axis=1)
    residual[noise] = 0.0
    return residual


def _correlate(a_BS: Array, b_BS: Array) -> Array:
    """Correlate centred rows; NaN where either is zero."""
    # Each row is scaled by its largest entry first, so that squares cannot underflow.
    a_unit, b_unit = _unit(a_BS), _unit(b_BS)
    return np.asarray(np.clip((a_unit * b_unit).sum(axis=1), -1.0, 1.0))


def _unit(centred_BS: Array) -> Array:
    """Scale rows to length 1; a zero row becomes NaN."""
    peak = np.abs(centred_BS).max(axis=1, keepdims=True)
    scaled = np.divide(centred_BS, peak, out=np.full_like(centred_BS, np.nan), where=peak > 0)
    return np.asarray(scaled / np.sqrt((scaled**2).sum(axis=1, keepdims=True)))
