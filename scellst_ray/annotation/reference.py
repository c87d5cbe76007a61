"""Markers of cell types from a single-cell reference (`.h5ad`), read in blocks.

Equal to scanpy's `rank_genes_groups` with the method 't-test_overestim_var'.

Shape letters: N cells of a block, G genes, T types.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import anndata as ad
import h5py
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scellst_ray.annotation.moments import Moments, t_test
from scellst_ray.spots.anndata_file import MISSING, read_column, read_index, read_text_column
from scellst_ray.spots.h5ad_counts import SYMBOLS
from scellst_ray.spots.hdf5 import DAMAGE, find_part, names_in, open_hdf5
from scellst_ray.storage.node_cache import hold

# Values of a block, stored or not: 64 MB of float64.
BLOCK_VALUES = 1 << 23
# Counts are normalised to this total and become log(1 + x), as is usual before a t-test.
TARGET_TOTAL = 10_000.0
# No logarithm of counts is above this, whatever its base.
MOST_LOG = 50.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """Moments of a reference by type.

    Attributes:
        genes: Names of the genes, G.
        moments: Moments of each type's cells, by its name.
        whole: Moments of all cells, those without a type included.
    """

    genes: list[str]
    moments: dict[str, Moments]
    whole: Moments


def read_reference(uri: str, key: str, panel: Sequence[str]) -> Reference:
    """Return the moments of log-normalised expression of a reference.

    X is taken; raw.X if X holds negative (scaled) values. Whole numbers are counts: they are
    normalised to 10,000 and become log(1 + x). Other values are logarithms already.

    Args:
        uri: Local path or fsspec URI of an `.h5ad` file.
        key: Column of obs that names the type of each cell.
        panel: Genes of the run. Genes are named by the index of var, or by the column of symbols
            that shares more names with the panel.

    Raises:
        ValueError: the file cannot be used. The message names it.
    """
    try:
        held = hold(uri)
    except FileNotFoundError as error:
        message = f"{uri}: no such reference"
        raise ValueError(message) from error
    with held, open_hdf5(str(held.path), uri) as file:
        labels, names = _labels(file, key, uri)
        problem = "it has neither X nor raw.X"
        for where, var in (("X", "var"), ("raw/X", "raw/var")):
            part = find_part(file, where, uri)
            frame = find_part(file, var, uri)
            if part is None or frame is None or _shape(part) == ():
                continue
            genes = _genes(frame, panel, uri)
            try:
                matrix = _Matrix(part, (len(labels), len(genes)), f"{uri}: {where}")
                return _reference(matrix, genes, labels, names)
            except _ScaledError as error:
                problem = str(error)
            except DAMAGE as error:
                if isinstance(error, ValueError) and str(error).startswith(uri):
                    raise
                message = f"{uri}: {where} cannot be read ({error}); copy the file again"
                raise ValueError(message) from error
        message = (
            f"{uri}: {problem}; save counts, or log-normalised expression (scanpy's "
            "normalize_total and log1p), as X or raw"
        )
        raise ValueError(message)


def top_markers(
    reference: Reference, number: int, among: Sequence[str] | None
) -> dict[str, list[str]]:
    """Return the genes of highest t of each type against all other cells.

    Args:
        reference: The reference.
        number: Number of genes for each type.
        among: Genes to choose from; all if None.
    """
    allowed = None if among is None else set(among)
    found = {}
    for name, group in reference.moments.items():
        t_G, _ = t_test(group, reference.whole.without(group), overestimate_variance=True)
        order = np.argsort(-t_G, kind="stable")
        ranked = [reference.genes[i] for i in order]
        found[name] = [g for g in ranked if allowed is None or g in allowed][:number]
    return found


def _labels(file: h5py.File, key: str, uri: str) -> tuple[NDArray[np.int64], list[str]]:
    """Return the type of each cell as an index, -1 for none, and the names of the types."""
    obs = find_part(file, "obs", uri)
    columns = names_in(obs, uri)
    if not isinstance(obs, h5py.Group) or key not in columns:
        near = get_close_matches(key, columns, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        message = f"{uri}: obs has no column {key!r}: {hint}it has {', '.join(columns[:10])}"
        raise ValueError(message)
    values = read_column(find_part(obs, key, uri), f"{uri}: obs[{key!r}]")
    if values.dtype.kind == "f":
        message = f"{uri}: obs[{key!r}] holds numbers, not types; give another --reference-key"
        raise ValueError(message)
    texts = np.array([str(value) for value in values], object)
    names = sorted({text for text in texts if text.lower() not in (MISSING, "", "none", "<na>")})
    place = {name: number for number, name in enumerate(names)}
    labels = np.array([place.get(text, -1) for text in texts], np.int64)
    if len(names) < 2:
        message = f"{uri}: obs[{key!r}] names {len(names)} type(s); expected at least 2 to compare"
        raise ValueError(message)
    few = [name for name, n in zip(names, np.bincount(labels[labels >= 0]), strict=True) if n < 2]
    if few:
        message = (
            f"{uri}: type {few[0]!r} of obs[{key!r}] has a single cell ({len(few)} such type(s)); "
            "a t-test needs 2: remove such cells"
        )
        raise ValueError(message)
    return labels, names


def _genes(frame: h5py.Group, panel: Sequence[str], uri: str) -> list[str]:
    """Return the names of genes that share most with the panel: the index, or a column."""
    there = set(panel)
    index = read_index(frame, f"{uri}: var")
    stored = {name.lower(): name for name in names_in(frame, uri)}
    namings = [index]
    for name in (stored[symbol] for symbol in SYMBOLS if symbol in stored):
        column = read_text_column(frame, name, f"{uri}: var")
        if column is not None and len(column) == len(index):
            namings.append(column)
    best = max(namings, key=lambda names: len(there.intersection(names)))
    if not there.intersection(best):
        message = (
            f"{uri}: none of its {len(best)} genes, such as {', '.join(best[:3])}, is in the run's "
            f"panel, such as {', '.join(panel[:3])}; name genes by the same symbols"
        )
        raise ValueError(message)
    return best


class _ScaledError(ValueError):
    """A matrix holds negative values."""


def _shape(part: h5py.Group | h5py.Dataset) -> tuple[int, ...]:
    found = part.attrs.get("shape", ()) if isinstance(part, h5py.Group) else part.shape
    return tuple(int(n) for n in (() if found is None else found))


class _Matrix:
    """A stored matrix, read in blocks of rows or, if it is stored by columns, of columns.

    Args:
        part: Its place in the file.
        shape: Expected number of cells and genes.
        source: Name of the file and the matrix in errors.

    Raises:
        ValueError: it has another shape.
    """

    def __init__(
        self, part: h5py.Group | h5py.Dataset, shape: tuple[int, int], source: str
    ) -> None:
        self.source, self.shape = source, shape
        if _shape(part) != shape:
            message = f"{source} has shape {_shape(part)}, expected {shape}; write the file again"
            raise ValueError(message)
        is_group = isinstance(part, h5py.Group)
        self.values: Any = ad.io.sparse_dataset(part) if is_group else part
        self.by_column = is_group and self.values.format == "csc"

    def blocks(self) -> Iterator[tuple[slice, slice, sparse.csr_matrix]]:
        """Yield (rows, columns, values float64 as CSR)."""
        num_rows, num_columns = self.shape
        if self.by_column:
            step = max(1, BLOCK_VALUES // max(1, num_rows))
            for start in range(0, num_columns, step):
                columns = slice(start, min(start + step, num_columns))
                yield slice(0, num_rows), columns, self._csr(self.values[:, columns])
            return
        step = max(1, BLOCK_VALUES // max(1, num_columns))
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            yield rows, slice(0, num_columns), self._csr(self.values[rows])

    def _csr(self, block: Any) -> sparse.csr_matrix:  # noqa: ANN401 - sparse or dense
        found = sparse.csr_matrix(block).astype(np.float64)
        if not np.isfinite(found.data).all():
            message = f"{self.source} holds values that are not finite; write the file again"
            raise ValueError(message)
        if found.nnz and found.data.min() < 0:
            message = f"{self.source.rpartition(': ')[2]} holds negative values, as after scaling"
            raise _ScaledError(message)
        return found


@dataclass
class _Facts:
    """What a first reading of a matrix finds.

    Attributes:
        total_N: Sum of each cell.
        is_whole: Whether all values are whole numbers.
        highest: The highest value.
    """

    total_N: NDArray[np.float64]
    is_whole: bool = True
    highest: float = field(default=0.0)


def _facts(matrix: _Matrix) -> _Facts:
    found = _Facts(np.zeros(matrix.shape[0]))
    for rows, _, block in matrix.blocks():
        found.total_N[rows] += np.asarray(block.sum(axis=1)).ravel()
        if block.nnz:
            found.is_whole &= bool((block.data == np.round(block.data)).all())
            found.highest = max(found.highest, float(block.data.max()))
    return found


def _reference(
    matrix: _Matrix, genes: list[str], labels: NDArray[np.int64], names: list[str]
) -> Reference:
    facts = _facts(matrix)
    if not facts.highest:
        message = f"{matrix.source} holds nothing but 0"
        raise ValueError(message)
    if facts.is_whole:
        logger.info(
            "%s holds counts: they are normalised to %s a cell and become log(1 + x)",
            matrix.source,
            f"{TARGET_TOTAL:,.0f}",
        )
    elif facts.highest > MOST_LOG:
        message = (
            f"{matrix.source} holds {facts.highest:g}: it is neither counts nor their logarithm; "
            "save counts, or take the logarithm (scanpy's log1p)"
        )
        raise ValueError(message)
    else:
        logger.info("%s holds logarithms: they are taken as they are", matrix.source)
    factor_N = TARGET_TOTAL / np.where(facts.total_N == 0, 1, facts.total_N)
    # Row T is of cells without a type.
    row_N = np.where(labels < 0, len(names), labels)
    shape = (len(names) + 1, len(genes))
    sum_TG, squares_TG = np.zeros(shape), np.zeros(shape)
    for rows, columns, block in matrix.blocks():
        if facts.is_whole:
            block.data *= np.repeat(factor_N[rows], np.diff(block.indptr))
            np.log1p(block.data, out=block.data)
        size = rows.stop - rows.start
        ones = (np.ones(size), (row_N[rows], np.arange(size)))
        of_type_TN = sparse.csr_matrix(ones, shape=(shape[0], size))
        sum_TG[:, columns] += (of_type_TN @ block).toarray()
        squares_TG[:, columns] += (of_type_TN @ block.multiply(block).tocsr()).toarray()
    counts_T = np.bincount(row_N, minlength=shape[0])
    moments = {
        name: _moments(int(counts_T[t]), sum_TG[t], squares_TG[t]) for t, name in enumerate(names)
    }
    whole = _moments(len(labels), sum_TG.sum(axis=0), squares_TG.sum(axis=0))
    return Reference(genes, moments, whole)


def _moments(count: int, sum_G: NDArray[np.float64], squares_G: NDArray[np.float64]) -> Moments:
    mean_G = sum_G / count
    return Moments(count, mean_G, np.maximum(squares_G - count * mean_G**2, 0))
