"""Single-cell references for the simulation study: counts, types, gene panels.

Three sources: any h5ad with counts, the 700 blood cells that come with scanpy, and a synthetic
one. All hold counts, since the study adds counts up before it normalises.

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

# As published for the ovary reference.
MIN_GENES_OF_CELL, MIN_COUNTS_OF_GENE = 200, 10
# Each half of a type needs some cells to draw from.
MIN_CELLS_OF_TYPE = 20
PBMC_FILE = "datasets/10x_pbmc68k_reduced.h5ad"


@dataclass(frozen=True)
class Reference:
    """Single cells with counts and types.

    Attributes:
        counts: CSR float32 [C, G], whole numbers.
        genes: G names.
        types: Names of the T types, sorted.
        type_C: int64 [C], index into types.
        source: Where they come from, for reports.
    """

    counts: sparse.csr_matrix
    genes: list[str]
    types: list[str]
    type_C: NDArray[np.int64]
    source: str

    @property
    def library_C(self) -> NDArray[np.float64]:
        """Counts of each cell over all genes."""
        return np.asarray(self.counts.sum(axis=1, dtype=np.float64)).ravel()

    def info(self) -> dict[str, Any]:
        """Return what a report tells."""
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
        type_column: Column of obs with the types, for an h5ad.
        num_types: Types wanted. Of more, the medoids of their mean expression are kept, so that
            all kinds are there (as published); types of under 20 cells are left out first.
        seed: Of a synthetic reference.

    Raises:
        ValueError: No counts, no such column, or too few types.
        FileNotFoundError: No such file.
    """
    if address == "synthetic":
        return synthetic_reference(num_types, seed)
    found = pbmc_reference() if address == "pbmc" else _read_h5ad(address, type_column)
    sizes = np.bincount(found.type_C, minlength=len(found.types))
    large = np.flatnonzero(sizes >= MIN_CELLS_OF_TYPE)
    if len(large) < num_types:
        message = (
            f"{found.source}: {len(large)} types have {MIN_CELLS_OF_TYPE} cells or more, expected "
            f"at least {num_types}. Give fewer num_types or another column of types."
        )
        raise ValueError(message)
    means = np.stack([found.counts[found.type_C == t].mean(axis=0).A1 for t in large])
    return _keep_types(found, large[medoids(log_normalise(means), num_types)])


def _keep_types(reference: Reference, kept: NDArray[np.int64]) -> Reference:
    """Return the cells of these types only."""
    order = sorted(kept.tolist())
    new_index = np.full(len(reference.types), -1)
    new_index[order] = np.arange(len(order))
    rows = np.flatnonzero(new_index[reference.type_C] >= 0)
    names = [reference.types[t] for t in order]
    type_C = new_index[reference.type_C[rows]]
    return Reference(reference.counts[rows], reference.genes, names, type_C, reference.source)


def medoids(points: NDArray[np.floating], num: int) -> NDArray[np.int64]:
    """Return the rows that best stand for all rows: k-medoids by exchange, Euclidean.

    Starts from the row nearest to all and adds the row that helps most; then, while any exchange
    of a medoid for another row lowers the sum of distances, the best exchange is made.
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

    Rates of genes are log-normal over two decades. Half of the genes do not depend on the type;
    of the others, each is raised by about e in one type on average (sd 0.5), and varies a little
    (sd 0.3) between all. Dispersion 2; libraries of about 3,000 counts with a log sd of 0.3.
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

    The file holds log(1 + 10,000 x / n_counts), rounded to three decimals, in `raw`, and not the
    counts. They are whole numbers, so that rounding brings them back; it is checked that what is
    rounded off is small. Counts of genes that are not in the file are not known: a library here
    is that of the 765.

    Raises:
        ValueError: scanpy is not installed, or its file has changed.
    """
    spec = importlib.util.find_spec("scanpy")
    if spec is None or spec.origin is None:
        message = "reference 'pbmc' comes with scanpy: pip install scanpy, or give an h5ad file."
        raise ValueError(message)
    with warnings.catch_warnings():
        # An old file of scanpy's own: what anndata says about that is of no use to anyone here.
        warnings.simplefilter("ignore")
        cells = ad.read_h5ad(Path(spec.origin).parent / PBMC_FILE)
    logged = cells.raw.X.toarray().astype(np.float64)
    exact = np.expm1(logged) * cells.obs["n_counts"].to_numpy()[:, None] / 1e4
    counts = np.rint(exact)
    # A value known to half of 0.001 in its logarithm is known to 0.05 %, and n_counts to less.
    if (np.abs(exact - counts) > 0.05 + 2e-3 * counts).any():
        message = "the blood cells in this scanpy are not counts scaled to 10,000: give an h5ad."
        raise ValueError(message)
    types, type_C = np.unique(cells.obs["bulk_labels"].astype(str), return_inverse=True)
    matrix = sparse.csr_matrix(counts.astype(np.float32))
    genes = cells.raw.var_names.astype(str).tolist()
    return Reference(matrix, genes, types.tolist(), type_C.astype(np.int64), "pbmc (in scanpy)")


def _read_h5ad(path: str, type_column: str) -> Reference:
    """Return the counts and types of a file, filtered as published."""
    if not Path(path).is_file():
        message = f"{path}: no such file. Give an h5ad with counts, or synthetic or pbmc."
        raise FileNotFoundError(message)
    cells = ad.read_h5ad(path)
    if type_column not in cells.obs:
        message = (
            f"{path}: obs has no column {type_column!r}; it has {', '.join(cells.obs.columns)}. "
            "Give reference_types."
        )
        raise ValueError(message)
    counts, names = _counts_of(cells, path)
    known = ~cells.obs[type_column].isna().to_numpy()
    enough = np.asarray((counts > 0).sum(axis=1)).ravel() >= MIN_GENES_OF_CELL
    counts = counts[known & enough]
    genes = np.flatnonzero(np.asarray(counts.sum(axis=0)).ravel() >= MIN_COUNTS_OF_GENE)
    if not (counts.shape[0] and len(genes)):
        message = (
            f"{path}: no cell with a type and {MIN_GENES_OF_CELL} genes is left, or no gene with "
            f"{MIN_COUNTS_OF_GENE} counts. Give a deeper reference."
        )
        raise ValueError(message)
    labels = cells.obs[type_column][known & enough].astype(str)
    types, type_C = np.unique(labels, return_inverse=True)
    kept = [names[g] for g in genes]
    return Reference(counts[:, genes], kept, types.tolist(), type_C.astype(np.int64), path)


def _counts_of(cells: ad.AnnData, path: str) -> tuple[sparse.csr_matrix, list[str]]:
    """Return the first matrix that holds counts: layer "counts", X, raw; with its gene names."""
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
        "The study adds counts up before it normalises: put them in layers['counts']."
    )
    raise ValueError(message)


def variable_panel(reference: Reference, rows: NDArray[np.int64], num_genes: int) -> list[str]:
    """Return the highly variable genes (seurat_v3) of these reference cells; all, if fewer."""
    wanted = min(num_genes, len(reference.genes))
    source = f"reference {reference.source}"
    columns, _ = highly_variable([reference.counts[rows]], [source], wanted)
    return [reference.genes[column] for column in columns]


def marker_panel(reference: Reference, rows: NDArray[np.int64], num_per_type: int) -> list[str]:
    """Return the genes highest in each type against all others, over these reference cells.

    Ranked by Welch's t of log-normalised expression, as scanpy's rank_genes_groups does it with
    method "t-test". A gene that leads in two types is listed once; genes that are not higher in a
    type (t <= 0) are no markers.
    """
    logged_CG = log_normalise(reference.counts[rows]).astype(np.float64)
    panel: dict[str, None] = {}
    for index in range(len(reference.types)):
        score_G = welch_t(logged_CG, reference.type_C[rows] == index)
        top = np.argsort(-score_G, kind="stable")[:num_per_type]
        panel.update(dict.fromkeys(reference.genes[g] for g in top if score_G[g] > 0))
    return list(panel)


def welch_t(values_CG: NDArray[np.float64], is_in_C: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return Welch's t of every column, rows in against rows out; 0 where nothing varies."""
    inside, outside = values_CG[is_in_C], values_CG[~is_in_C]
    error_G = inside.var(axis=0, ddof=1) / len(inside) + outside.var(axis=0, ddof=1) / len(outside)
    difference_G = inside.mean(axis=0) - outside.mean(axis=0)
    zero = np.zeros_like(difference_G)
    t_G = np.divide(difference_G, np.sqrt(error_G), out=zero, where=error_G > 0)
    return np.asarray(t_G)
