"""Correlation column by column: genes are columns, cells or spots are rows."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


def pearson_by_column(a_SG: ArrayLike, b_SG: ArrayLike) -> NDArray[np.float64]:
    """Return Pearson's r of each column of a with the same column of b.

    Args:
        a_SG: [S, G], for example predicted expression.
        b_SG: [S, G], for example measured expression.

    Returns:
        float64 [G]; NaN where either column is constant (or holds a NaN), since no correlation
        exists there: count those columns beside any mean.

    Raises:
        ValueError: Where the shapes differ or are not two-dimensional.
    """
    a, b = _pair(a_SG, b_SG)
    return _correlate(_centred(a), _centred(b))


def spearman_by_column(a_SG: ArrayLike, b_SG: ArrayLike) -> NDArray[np.float64]:
    """Return Spearman's rho of each column of a with the same column of b (average ranks).

    Arguments, result and errors as in pearson_by_column.
    """
    a, b = _pair(a_SG, b_SG)
    return pearson_by_column(stats.rankdata(a, axis=0), stats.rankdata(b, axis=0))


def partial_pearson_by_column(
    a_SG: ArrayLike, b_SG: ArrayLike, covariate_S: ArrayLike
) -> NDArray[np.float64]:
    """Return Pearson's r of each pair of columns with one covariate partialled out of both.

    With log total counts as covariate it tells whether a prediction knows more than how much
    tissue a spot holds.

    Args:
        a_SG: [S, G].
        b_SG: [S, G].
        covariate_S: [S]; a constant one changes nothing.

    Returns:
        float64 [G]: the correlation of the residuals of the linear regressions of each column on
        the covariate. NaN where a column is constant or a linear function of the covariate.

    Raises:
        ValueError: Where the shapes differ.
    """
    a, b = _pair(a_SG, b_SG)
    covariate = np.asarray(covariate_S, np.float64)
    if covariate.shape != (len(a),):
        message = f"covariate of shape {covariate.shape}, expected one value per row: ({len(a)},)."
        raise ValueError(message)
    axis_S = _centred(covariate[:, None])[:, 0]
    return _correlate(_residual(_centred(a), axis_S), _residual(_centred(b), axis_S))


def _pair(a_SG: ArrayLike, b_SG: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both as float64 [S, G]."""
    a, b = np.asarray(a_SG, np.float64), np.asarray(b_SG, np.float64)
    if a.ndim != 2 or a.shape != b.shape or len(a) == 0:
        message = (
            f"shapes {a.shape} and {b.shape}, expected two equal shapes [rows, genes] with at "
            "least one row. Align rows (cells or spots) and genes first."
        )
        raise ValueError(message)
    return a, b


def _centred(values_SG: NDArray[np.float64]) -> NDArray[np.float64]:
    """Subtract column means; a constant column becomes exactly zero, not rounding noise."""
    centred: NDArray[np.float64] = values_SG - values_SG.mean(axis=0)
    centred[:, values_SG.min(axis=0) == values_SG.max(axis=0)] = 0.0
    return centred


def _residual(centred_SG: NDArray[np.float64], axis_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """Remove from centred columns what is linear in the centred covariate."""
    length = axis_S @ axis_S
    if length == 0:
        return centred_SG
    residual = centred_SG - np.outer(axis_S, axis_S @ centred_SG / length)
    # What is left of a column that is linear in the covariate is rounding noise: no correlation.
    noise = (residual**2).sum(axis=0) <= 1e-24 * len(axis_S) * (centred_SG**2).sum(axis=0)
    residual[:, noise] = 0.0
    return residual


def _correlate(a_SG: NDArray[np.float64], b_SG: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlate centred columns; NaN where either is zero."""
    # Each column is scaled by its largest entry first, so that squares cannot underflow.
    a_unit, b_unit = _unit(a_SG), _unit(b_SG)
    return np.asarray(np.clip((a_unit * b_unit).sum(axis=0), -1.0, 1.0))


def _unit(centred_SG: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale columns to length 1; a zero column becomes NaN."""
    peak = np.abs(centred_SG).max(axis=0)
    scaled = np.divide(centred_SG, peak, out=np.full_like(centred_SG, np.nan), where=peak > 0)
    return np.asarray(scaled / np.sqrt((scaled**2).sum(axis=0)))
