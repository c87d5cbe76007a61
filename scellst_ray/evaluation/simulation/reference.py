"""Single-cell references for the simulation study: counts, types, gene panels.

There are three sources: any h5ad file with counts, the 700 blood cells that come with scanpy, and
synthetic cells. All hold counts, since the study adds up counts before it normalises them.

Shape letters: C cells, G genes, T types.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scellst_ray.spots.panel import log_normalise
from scellst_ray.spots.variable import highly_variable

# Filters as published for the ovary reference.
MIN_GENES_OF_CELL, MIN_COUNTS_OF_GENE = 200, 10
# Each type is split in half, and each half needs cells to draw from.
MIN_CELLS_OF_TYPE = 20
PBMC_FILE = "datasets/10x_pbmc68k_reduced.h5ad"


@dataclass(frozen=True)
class Reference:
    """Single cells with counts and types.

    Attributes:
        counts: CSR float32 [C, G], whole numbers.
        genes: Names of the G genes.
        types: Names of the T types, sorted.
        type_C: int64 [C], index into types.
        source: Name of the source, for reports and messages.
    """

    counts: sparse.csr_matrix
    genes: list[str]
    types: list[str]
    type_C: NDArray[np.int64]
    source: str

    @property
    def library_C(self) -> NDArray[np.float64]:
        """Total counts of each cell over all genes, float64 [C]."""
        return np.asarray(self.counts.sum(axis=1, dtype=np.float64)).ravel()

    def info(self) -> dict[str, Any]:
        """Return the source and sizes for a report."""
        sizes = np.bincount(self.type_C, minlength=len(self.types))
        return {
            "source": self.source,
            "num_cells": len(self.type_C),
            "num_genes": len(self.genes),
            "types": {name: int(size) for name, size in zip(self.types, sizes, strict=True)},
            "median_library": float(np.median(self.library_C)),
        }


def read_reference(address: str, type_column: str, num_types: int, seed: int = 0) -> Reference:
    """Return a reference with num_types types.

    Args:
        address: "synthetic", "pbmc" or an h5ad file.
        type_column: Column of obs with the types, for an h5ad file.
        num_types: Number of types to return. Types of fewer than 20 cells are left out first. If
            more are left than asked for, the medoids of their mean expression are kept, so that
            the types are as different as possible (as published).
        seed: Seed of a synthetic reference.

    Raises:
        ValueError: there are no counts, no such column, or too few types.
        FileNotFoundError: the file does not exist.
    """
    if address == "synthetic":
        return synthetic_reference(num_types, seed)
    reference = pbmc_reference() if address == "pbmc" else _read_h5ad(address, type_column)
    sizes = np.bincount(reference.type_C, minlength=len(reference.types))
    large = np.flatnonzero(sizes >= MIN_CELLS_OF_TYPE)
    if len(large) < num_types:
        message = (
            f"{reference.source}: {len(large)} types have {MIN_CELLS_OF_TYPE} cells or more, "
            f"expected at least {num_types}. Give fewer num_types or another column of types."
        )
        raise ValueError(message)
    means = np.stack([reference.counts[reference.type_C == t].mean(axis=0).A1 for t in large])
    return _keep_types(reference, large[medoids(log_normalise(means), num_types)])


def _keep_types(reference: Reference, kept: NDArray[np.int64]) -> Reference:
    """Return a reference with only the cells of these types."""
    order = sorted(kept.tolist())
    new_index = np.full(len(reference.types), -1)
    new_index[order] = np.arange(len(order))
    rows = np.flatnonzero(new_index[reference.type_C] >= 0)
    names = [reference.types[t] for t in order]
    type_C = new_index[reference.type_C[rows]]
    return Reference(reference.counts[rows], reference.genes, names, type_C, reference.source)


def medoids(points: NDArray[np.floating], num: int) -> NDArray[np.int64]:
    """Return the rows with the smallest sum of Euclidean distances from all rows: k-medoids.

    The search begins with the row nearest to all, and adds the row that lowers the sum most. Then
    the best exchange of a medoid for another row is made, until no exchange lowers the sum.

    Returns:
        int64 [num], ascending.
    """
    distances = np.sqrt(((points[:, None].astype(np.float64) - points[None]) ** 2).sum(axis=2))

    def cost(rows: Sequence[int]) -> float:
        return float(distances[:, list(rows)].min(axis=1).sum())

    chosen: list[int] = []
    rest = list(range(len(points)))
    while len(chosen) < num:
        best = min(rest, key=lambda row: cost([*chosen, row]))
        chosen.append(best)
        rest.remove(best)
    while rest:
        swaps = [(cost([*chosen[:i], *chosen[i + 1 :], r]), i, r) for i, r in _pairs(num, rest)]
        lowest, i, row = min(swaps)
        if lowest >= cost(chosen) * (1 - 1e-12):
            break
        rest[rest.index(row)], chosen[i] = chosen[i], row
    return np.array(sorted(chosen), np.int64)


def _pairs(num: int, rest: list[int]) -> list[tuple[int, int]]:
    return list(product(range(num), rest))


def synthetic_reference(
    num_types: int, seed: int, num_genes: int = 2000, cells_per_type: int = 500
) -> Reference:
    """Draw a reference: negative binomial counts with a library size per cell.

    - Rates of genes are log-normal over two decades.
    - Half of the genes do not depend on the type. Each gene of the other half is raised in one
      type, by a factor of about e (log sd 0.5), and varies between all types (log sd 0.3).
    - The dispersion is 2.
    - Libraries have about 3,000 counts (log sd 0.3).
    """
    rng = np.random.default_rng([seed, 11])
    log_rate_TG = np.tile(rng.normal(0, 1.2, num_genes), (num_types, 1))
    typed = np.arange(num_genes) % 2 == 0
    log_rate_TG[:, typed] += rng.normal(0, 0.3, (num_types, typed.sum()))
    home_G = rng.integers(0, num_types, num_genes)
    raised = np.flatnonzero(typed)
    log_rate_TG[home_G[raised], raised] += rng.normal(1.0, 0.5, len(raised))
    share_TG = np.exp(log_rate_TG)
    share_TG /= share_TG.sum(axis=1, keepdims=True)
    type_C = np.repeat(np.arange(num_types), cells_per_type)
    library_C = 3000 * np.exp(rng.normal(0, 0.3, len(type_C)))
    noise = rng.gamma(2.0, 0.5, (len(type_C), num_genes))
    counts = rng.poisson(library_C[:, None] * share_TG[type_C] * noise)
    genes = [f"GENE{g + 1}" for g in range(num_genes)]
    types = [f"type {t + 1}" for t in range(num_types)]
    matrix = sparse.csr_matrix(counts.astype(np.float32))
    return Reference(matrix, genes, types, type_C, f"synthetic, seed {seed}")


def pbmc_reference() -> Reference:
    """Return the 700 blood cells x 765 genes inside scanpy (10x, Zheng et al. 2017).

    `raw` holds log(1 + 10,000 x / n_counts), rounded to three decimals, in place of the counts x.
    Counts are whole numbers, so rounding restores them; the function checks that the remainders
    are small. Counts of genes outside the file are unknown, so a library is the sum over 765 genes.

    Raises:
        ValueError: scanpy is not installed, or its file has changed.
    """
    spec = importlib.util.find_spec("scanpy")
    if spec is None or spec.origin is None:
        message = "reference 'pbmc' needs scanpy: pip install scanpy, or give an h5ad file."
        raise ValueError(message)
    with warnings.catch_warnings():
        # anndata warns of the file's old format, which users cannot change: it is scanpy's own.
        warnings.simplefilter("ignore")
        cells = ad.read_h5ad(Path(spec.origin).parent / PBMC_FILE)
    logged = cells.raw.X.toarray().astype(np.float64)
    exact = np.expm1(logged) * cells.obs["n_counts"].to_numpy()[:, None] / 1e4
    counts = np.rint(exact)
    # The rounding to three decimals leaves an error of 0.05 %; n_counts adds less than that.
    if (np.abs(exact - counts) > 0.05 + 2e-3 * counts).any():
        message = (
            "the blood cells in this release of scanpy are not counts scaled to 10,000; give an "
            "h5ad file."
        )
        raise ValueError(message)
    types, type_C = np.unique(cells.obs["bulk_labels"].astype(str), return_inverse=True)
    matrix = sparse.csr_matrix(counts.astype(np.float32))
    genes = cells.raw.var_names.astype(str).tolist()
    return Reference(matrix, genes, types.tolist(), type_C.astype(np.int64), "pbmc (in scanpy)")


def _read_h5ad(path: str, type_column: str) -> Reference:
    """Return the counts and types of a file, filtered as published.

    Raises:
        ValueError: the file has no such column, no counts, or nothing that passes the filters.
        FileNotFoundError: the file does not exist.
    """
    if not Path(path).is_file():
        message = f"{path}: no such file. Give an h5ad file with counts, or synthetic or pbmc."
        raise FileNotFoundError(message)
    cells = ad.read_h5ad(path)
    if type_column not in cells.obs:
        message = (
            f"{path}: obs has no column {type_column!r}; it has {', '.join(cells.obs.columns)}. "
            "Give one of them as reference_types."
        )
        raise ValueError(message)
    counts, names = _counts_of(cells, path)
    known = ~cells.obs[type_column].isna().to_numpy()
    enough = np.asarray((counts > 0).sum(axis=1)).ravel() >= MIN_GENES_OF_CELL
    counts = counts[known & enough]
    genes = np.flatnonzero(np.asarray(counts.sum(axis=0)).ravel() >= MIN_COUNTS_OF_GENE)
    if not (counts.shape[0] and len(genes)):
        message = (
            f"{path}: no cell has a type and {MIN_GENES_OF_CELL} genes, or no gene has "
            f"{MIN_COUNTS_OF_GENE} counts. Give a reference with more counts per cell."
        )
        raise ValueError(message)
    labels = cells.obs[type_column][known & enough].astype(str)
    types, type_C = np.unique(labels, return_inverse=True)
    kept = [names[g] for g in genes]
    return Reference(counts[:, genes], kept, types.tolist(), type_C.astype(np.int64), path)


def _counts_of(cells: ad.AnnData, path: str) -> tuple[sparse.csr_matrix, list[str]]:
    """Return the first of layer "counts", X and raw that holds counts, with its gene names.

    Raises:
        ValueError: none of them holds counts.
    """
    places = [(cells.layers["counts"], cells.var_names)] if "counts" in cells.layers else []
    places.append((cells.X, cells.var_names))
    if cells.raw is not None:
        places.append((cells.raw.X, cells.raw.var_names))
    for values, names in places:
        matrix = sparse.csr_matrix(values, dtype=np.float32)
        data = matrix.data
        if len(data) and np.isfinite(data).all() and (data >= 0).all() and (data % 1 == 0).all():
            return matrix, names.astype(str).tolist()
    message = (
        f"{path}: neither layers['counts'] nor X nor raw holds counts (whole numbers, 0 or more). "
        "The study adds up counts before it normalises them: put counts in layers['counts']."
    )
    raise ValueError(message)


def variable_panel(reference: Reference, rows: NDArray[np.int64], num_genes: int) -> list[str]:
    """Return the `num_genes` most variable genes (seurat_v3) of these reference cells.

    All genes are returned if the reference has fewer.
    """
    wanted = min(num_genes, len(reference.genes))
    source = f"reference {reference.source}"
    columns, _ = highly_variable([reference.counts[rows]], [source], wanted)
    return [reference.genes[column] for column in columns]


def marker_panel(reference: Reference, rows: NDArray[np.int64], num_per_type: int) -> list[str]:
    """Return the genes that are highest in each type against the other types.

    Genes are ranked by Welch's t of log-normalised expression over these reference cells, as in
    scanpy's rank_genes_groups with method "t-test". A gene that ranks high in two types is listed
    once. Genes that are not higher in a type (t <= 0) are left out.
    """
    logged_CG = log_normalise(reference.counts[rows]).astype(np.float64)
    panel: dict[str, None] = {}
    for index in range(len(reference.types)):
        score_G = welch_t(logged_CG, reference.type_C[rows] == index)
        top = np.argsort(-score_G, kind="stable")[:num_per_type]
        panel.update(dict.fromkeys(reference.genes[g] for g in top if score_G[g] > 0))
    return list(panel)


def welch_t(values_CG: NDArray[np.float64], is_in_C: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return Welch's t of every column, rows of is_in_C against the rest; 0 if nothing varies."""
    inside, outside = values_CG[is_in_C], values_CG[~is_in_C]
    error_G = inside.var(axis=0, ddof=1) / len(inside) + outside.var(axis=0, ddof=1) / len(outside)
    difference_G = inside.mean(axis=0) - outside.mean(axis=0)
    zero = np.zeros_like(difference_G)
    t_G = np.divide(difference_G, np.sqrt(error_G), out=zero, where=error_G > 0)
    return np.asarray(t_G)
