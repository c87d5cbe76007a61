"""Make the training targets of a gene panel: filters, log-normalisation, scaling, size factors.

A panel is an ordered list of genes. Thresholds and their order are those of sCellST (Chadoutaud et
al. 2026). Genes are filtered by counts and by spots, then spots by counts. Mitochondrial genes are
dropped. Counts are normalised by the library size over the remaining genes.
S: spots; G: genes; K: kept spots; P: panel genes.
"""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import fsspec
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scellst_ray.spots.gene_names import bare_name, prefix_problem, starts_with
from scellst_ray.spots.table import Spots

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CountFilter:
    """Thresholds for the genes and spots of a slide that are used in training.

    Attributes:
        min_gene_counts: Minimum counts of a gene over the slide.
        min_spot_share: Minimum share of the slide's spots in which a gene occurs. The published
            code uses 10 % of all spots, rounded down; the paper says training spots.
        min_spot_counts: Minimum counts of a spot over the genes that pass.
        drop_prefix: Prefix of genes that are dropped after the spots are filtered; "" drops none.
            Names are compared in upper case and without the prefix of a genome, so mt-Co1 and
            GRCh38_MT-CO1 are dropped too. "MT-" also drops the mitochondrial genes of human and
            mouse by their Ensembl ids.
    """

    min_gene_counts: int = 200
    min_spot_share: float = 0.1
    min_spot_counts: int = 20
    drop_prefix: str = "MT-"

    def __post_init__(self) -> None:
        """Check the thresholds.

        Raises:
            ValueError: A threshold is out of range; the message names it and its range.
        """
        allowed = {
            "min_gene_counts": (self.min_gene_counts >= 0, "0 or more"),
            "min_spot_share": (0 <= self.min_spot_share <= 1, "0 to 1"),
            "min_spot_counts": (self.min_spot_counts >= 0, "0 or more"),
        }
        for name, (is_allowed, expected) in allowed.items():
            if not is_allowed:
                message = f"{name} is {getattr(self, name)}, expected {expected}."
                raise ValueError(message)


DEFAULT_FILTER = CountFilter()


def filter_counts(spots: Spots, source: str, limits: CountFilter = DEFAULT_FILTER) -> Spots:
    """Return the spots and genes that pass the thresholds, in their order.

    Args:
        spots: All spots and genes of a slide.
        source: Name of the slide in errors.
        limits: Thresholds.

    Raises:
        ValueError: No gene or no spot passes; the message names the slide and the thresholds.
    """
    counts = spots.counts
    min_spots = int(limits.min_spot_share * len(spots) + 1e-9)
    gene_totals = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
    passes = gene_totals >= limits.min_gene_counts
    passes &= np.bincount(counts.nonzero()[1], minlength=counts.shape[1]) >= min_spots
    spot_totals = np.asarray(counts[:, passes].sum(axis=1, dtype=np.float64)).ravel()
    kept_spots = spot_totals >= limits.min_spot_counts
    if limits.drop_prefix:
        problem = prefix_problem(spots.genes, limits.drop_prefix)
        if problem:
            logger.warning("%s: %s: such genes may stay among the others", source, problem)
        passes &= np.array([not starts_with(gene, limits.drop_prefix) for gene in spots.genes])
    if not (passes.any() and kept_spots.any()):
        message = (
            f"{source}: {passes.sum()} of {len(spots.genes)} genes and {kept_spots.sum()} of "
            f"{len(spots)} spots pass {limits}. The section has too few counts for these "
            "thresholds: lower them or leave the slide out."
        )
        raise ValueError(message)
    columns = np.flatnonzero(passes)
    kept = spots.select(kept_spots)
    return replace(kept, counts=kept.counts[:, columns], genes=[spots.genes[i] for i in columns])


def log_normalise(
    counts: sparse.csr_matrix | NDArray[np.number],
    library_S: NDArray[np.floating] | None = None,
    target: float = 1e4,
) -> NDArray[np.float32]:
    """Scale every spot to `target` counts and take log(1 + x).

    Args:
        counts: Raw counts [S, G].
        library_S: Library size of each spot [S]; None takes the sums of the rows. Needed if
            `counts` holds only some of the genes.
        target: Library size after scaling.

    Returns:
        float32 [S, G], equal to scanpy's normalize_total(target_sum=target) and log1p. A spot
        without counts stays zero.
    """
    given_SG = counts if isinstance(counts, np.ndarray) else counts.toarray()
    dense_SG = np.asarray(given_SG, np.float32)
    if library_S is None:
        library_S = dense_SG.sum(axis=1, dtype=np.float64)
    factor_S = np.divide(target, library_S, out=np.zeros(len(dense_SG)), where=library_S > 0)
    return np.asarray(np.log1p(dense_SG * factor_S[:, None].astype(np.float32)))


def read_panel(panel: str | Sequence[str]) -> list[str]:
    """Return the genes of an explicit panel, in its order.

    Args:
        panel: Gene names, or the address of a text file with one gene per line. Blank lines and
            lines that start with # are ignored.

    Raises:
        ValueError: The file does not exist, or the panel is empty or repeats a gene.
    """
    source = panel if isinstance(panel, str) else "gene panel"
    if isinstance(panel, str):
        try:
            with fsspec.open(panel, "rt", encoding="utf-8-sig") as file:
                lines = [line.strip() for line in file]
        except FileNotFoundError as error:
            message = f"{panel}: no such file. Give a text file with one gene name per line."
            raise ValueError(message) from error
        names = [line for line in lines if line and not line.startswith("#")]
    else:
        names = [str(name) for name in panel]
    if not names:
        message = f"{source}: the panel names no gene. Give at least one gene."
        raise ValueError(message)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        message = f"{source}: {repeated[:5]} occur more than once. Name each gene once."
        raise ValueError(message)
    return names


def gene_columns(genes: Sequence[str], panel: Sequence[str], source: str) -> NDArray[np.int64]:
    """Return the column of every panel gene, int64 [P].

    Args:
        genes: G gene names, in the order of the columns.
        panel: P gene names.
        source: Name of the slide or file in errors.

    Raises:
        ValueError: A panel gene is absent; the message names up to five, with close matches.
    """
    column_of = {name: column for column, name in enumerate(genes)}
    absent = [name for name in panel if name not in column_of]
    if absent:
        upper = {bare_name(name).upper(): name for name in genes}
        hints = []
        for name in absent[:5]:
            close = difflib.get_close_matches(name.upper(), list(upper), n=2, cutoff=0.75)
            hints.append(f"{name} (close: {', '.join(upper[match] for match in close) or 'none'})")
        message = (
            f"{source}: {len(absent)} of {len(panel)} panel genes are not among its "
            f"{len(genes)} genes: {'; '.join(hints)}. Remove them from the panel, or give counts "
            "that hold them (gene symbols, same species)."
        )
        raise ValueError(message)
    return np.array([column_of[name] for name in panel], np.int64)


@dataclass(frozen=True)
class Targets:
    """Training targets of K spots of a slide for a panel of P genes.

    Attributes:
        kept: Indices of the spots that pass the filters, ascending, int64 [K].
        values_KP: Log-normalised expression, not scaled (see robust_scale), float32 [K, P].
        counts_KP: Raw counts, float32 [K, P].
        library_K: Library size, the counts over the genes that pass the filters, float64 [K].
        num_genes: Number of genes that pass the filters.
    """

    kept: NDArray[np.int64]
    values_KP: NDArray[np.float32]
    counts_KP: NDArray[np.float32]
    library_K: NDArray[np.float64]
    num_genes: int


def make_targets(
    spots: Spots, panel: Sequence[str], source: str, limits: CountFilter = DEFAULT_FILTER
) -> Targets:
    """Return the training targets of a slide: expression and counts of the panel's genes.

    The library size counts the genes that pass the filters, so it does not depend on the panel. A
    panel gene keeps its counts even where it is too rare to pass the filters.

    Args:
        spots: All spots and genes of the slide.
        panel: P gene names.
        source: Name of the slide in errors.
        limits: Thresholds of the filters (see filter_counts).

    Raises:
        ValueError: No spot or gene passes, or the slide has no counts for a panel gene.
    """
    columns = gene_columns(spots.genes, panel, source)
    passing = filter_counts(spots, source, limits)
    library_K = np.asarray(passing.counts.sum(axis=1, dtype=np.float64)).ravel()
    kept = np.flatnonzero(np.isin(spots.spot_id, passing.spot_id))
    counts_KP = spots.counts[kept][:, columns].toarray()
    values_KP = log_normalise(counts_KP, library_K)
    return Targets(kept, values_KP, counts_KP, library_K, len(passing.genes))


def size_factors(library_S: NDArray[np.floating], source: str) -> NDArray[np.float64]:
    """Return the size factors of negative-binomial losses: library sizes over their median.

    Args:
        library_S: Counts per spot over the genes that pass the filters [S].
        source: Name of the slide in errors.

    Returns:
        float64 [S], positive, with median 1.

    Raises:
        ValueError: A spot has no counts, which only min_spot_counts 0 lets pass.
    """
    library_S = np.asarray(library_S, np.float64)
    empty = np.flatnonzero(~(library_S > 0))
    if len(empty):
        message = (
            f"{source}: {len(empty)} of {len(library_S)} spots have no counts over the genes that "
            "pass the filters, so they have no size factor. Set min_spot_counts to at least 1."
        )
        raise ValueError(message)
    return np.asarray(library_S / np.median(library_S))


def robust_scale(
    values_SG: NDArray[np.floating],
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Divide each gene by its range between quantiles 0 and 0.95, without centring.

    The result equals scikit-learn's RobustScaler(with_centering=False, quantile_range=(0, 95)). The
    paper says "to [0, 1]", but values above the 95 % quantile exceed 1. Call it per slide: it
    removes the slide's sensitivity from the targets.

    Args:
        values_SG: Log-normalised expression of one slide [S, G].

    Returns:
        (scaled float32 [S, G], scale float64 [G]). A gene without range has scale 1.
    """
    low_G, high_G = np.percentile(np.asarray(values_SG, np.float64), (0, 95), axis=0)
    scale_G = high_G - low_G
    scale_G[scale_G < 10 * np.finfo(np.float64).eps] = 1.0
    return (values_SG / scale_G).astype(np.float32), scale_G
