"""Check stored count matrices in full before anything is computed with them.

SciPy trusts the three arrays of a sparse matrix: an index outside would read or write memory that
is not its own. S: rows (spots or barcodes); G: columns (genes); L: stored values.
"""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

logger = logging.getLogger(__name__)

# float32 holds whole numbers exactly up to here; no gene has so many molecules in a spot.
LARGEST_COUNT = 2**24


def checked_csr(
    data: NDArray[Any],
    indices: NDArray[Any],
    indptr: NDArray[Any],
    shape: tuple[int, int],
    source: str,
) -> sparse.csr_matrix:
    """Return a CSR matrix [S, G] of arrays that are checked in full.

    Args:
        data: Values [L].
        indices: Column of each value [L].
        indptr: Start of each row among the values, and their number [S + 1].
        shape: (S, G).
        source: Name of the file and the matrix in errors.

    Returns:
        Matrix with sorted columns. Values of the same row and column are added, with a warning.

    Raises:
        ValueError: The arrays do not form a matrix of this shape; the message says why.
    """
    problem = _problem_of(data, indices, indptr, shape)
    if problem:
        message = f"{source}: not a sound sparse matrix: {problem}. Copy or write the file again."
        raise ValueError(message)
    if data.dtype == np.float16:  # SciPy has no such matrices
        data = data.astype(np.float32)
    is_small = max(*shape, len(data)) < np.iinfo(np.int32).max
    kind = np.int32 if is_small else np.int64
    matrix = sparse.csr_matrix(shape, dtype=data.dtype)
    # Set one by one: the constructor would look at parts of them again.
    matrix.data, matrix.indices, matrix.indptr = data, indices.astype(kind), indptr.astype(kind)
    matrix.sort_indices()
    num_stored = matrix.nnz
    matrix.sum_duplicates()
    if matrix.nnz < num_stored:
        text = "%s: %d values lie in a row and column that has a value already; added them"
        logger.warning(text, source, num_stored - matrix.nnz)
    return matrix


def _problem_of(
    data: NDArray[Any], indices: NDArray[Any], indptr: NDArray[Any], shape: tuple[int, int]
) -> str | None:
    """Return the first reason why the arrays are no matrix; None if they are one."""
    problem = _problem_of_kinds({"data": data, "indices": indices, "indptr": indptr})
    if problem is None:
        problem = _problem_of_rows(len(data), indptr, shape[0])
    if problem is None and len(data) != len(indices):
        problem = f"{len(data)} values, but {len(indices)} indices"
    if problem is None:
        outside = np.flatnonzero((indices < 0) | (indices >= shape[1]))
        if len(outside):
            first = indices[outside[0]]
            problem = f"{len(outside)} indices lie outside, such as {first} of {shape[1]}"
    return problem


def _problem_of_kinds(parts: dict[str, NDArray[Any]]) -> str | None:
    """Return the first array that is no list of numbers, or of whole numbers."""
    for name, values in parts.items():
        if values.ndim != 1:
            return f"{name} has shape {values.shape}, expected a list"
        if values.dtype.kind not in ("biuf" if name == "data" else "iu"):
            expected = "numbers" if name == "data" else "whole numbers"
            return f"{name} holds {values.dtype}, expected {expected}"
    return None


def _problem_of_rows(num_values: int, indptr: NDArray[Any], num_rows: int) -> str | None:
    """Return why the starts of rows are not sound: too many, out of order, not over all values."""
    if len(indptr) != num_rows + 1:
        return f"indptr has {len(indptr)} entries for {num_rows} rows, expected {num_rows + 1}"
    if indptr[0] != 0 or indptr[-1] != num_values:
        return f"indptr goes from {indptr[0]} to {indptr[-1]}, expected 0 to {num_values} values"
    falls = np.flatnonzero(indptr[1:] < indptr[:-1])
    if len(falls):
        row = int(falls[0])
        return f"indptr falls from {indptr[row]} to {indptr[row + 1]} at row {row}"
    return None


def first_not_count(values: NDArray[Any]) -> float | None:
    """Return the first value that is no count: negative, fractional, not finite or too large."""
    numbers = np.asarray(values).ravel()
    if numbers.dtype.kind in "biu":
        wrong = (numbers < 0) | (numbers > LARGEST_COUNT)
    else:
        with np.errstate(invalid="ignore"):
            wrong = ~((numbers >= 0) & (numbers == np.rint(numbers)) & (numbers <= LARGEST_COUNT))
    return float(numbers[wrong][0]) if wrong.any() else None


def refuse_too_large(values: NDArray[Any], source: str) -> None:
    """Refuse values that float32 cannot hold exactly.

    Raises:
        ValueError: A value is larger than LARGEST_COUNT.
    """
    if not len(values) or values.dtype.kind == "b":
        return
    largest = values.max()
    if largest > LARGEST_COUNT and np.isfinite(largest):
        message = (
            f"{source}: a count is {largest:g}, more than {LARGEST_COUNT}, which no gene of a spot "
            "has. Give raw counts of molecules; copy the file again if these should be."
        )
        raise ValueError(message)
