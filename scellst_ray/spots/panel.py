"""Training targets of a given gene panel: filters, log-normalisation, scaling, size factors.

Thresholds and their order are those of sCellST (Chadoutaud et al. 2026): genes by counts, genes by
spots, spots by counts, mitochondrial genes out, then library-size normalisation over the genes
that survive.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import fsspec
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scellst_ray.spots.table import Spots
from scellst_ray.spots.variable import most_variable


@dataclass(frozen=True)
class CountFilter:
    """Which genes and spots of a slide are measured well enough to train on.

    Attributes:
        min_gene_counts: Counts a gene needs over the slide.
        min_spot_share: Share of the slide's spots a gene must occur in (the published code takes
            10 % of all spots, rounded down; the paper says training spots).
        min_spot_counts: Counts a spot needs over the genes that pass.
        drop_prefix: Genes whose upper-cased name starts so are dropped after the spots are
            filtered; upper-cased, so that mouse "mt-" goes too. "" drops none.
    """

    min_gene_counts: int = 200
    min_spot_share: float = 0.1
    min_spot_counts: int = 20
    drop_prefix: str = "MT-"

    def __post_init__(self) -> None:
        """Refuse thresholds that cannot be.

        Raises:
            ValueError: Naming the field, its value and what is allowed.
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
    """Return the spots and genes that pass, in their order.

    Raises:
        ValueError: Where no gene or no spot passes, naming `source` and the thresholds.
    """
    counts = spots.counts
    min_spots = int(limits.min_spot_share * len(spots) + 1e-9)
    gene_totals = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
    passes = gene_totals >= limits.min_gene_counts
    passes &= np.bincount(counts.nonzero()[1], minlength=counts.shape[1]) >= min_spots
    spot_totals = np.asarray(counts[:, passes].sum(axis=1, dtype=np.float64)).ravel()
    kept_spots = spot_totals >= limits.min_spot_counts
    if limits.drop_prefix:
        prefix = limits.drop_prefix.upper()
        passes &= np.array([not gene.upper().startswith(prefix) for gene in spots.genes])
    if not (passes.any() and kept_spots.any()):
        message = (
            f"{source}: {passes.sum()} of {len(spots.genes)} genes and {kept_spots.sum()} of "
            f"{len(spots)} spots pass {limits}. The section is too shallow for these thresholds: "
            "lower them or leave the slide out."
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
        library_S: Counts per spot to divide by; by default the sums of the rows. Given when
            `counts` holds only some of the genes.
        target: Library size after scaling.

    Returns:
        float32 [S, G]. A spot without counts stays zero. Equals scanpy's
        normalize_total(target_sum=target) followed by log1p.
    """
    given_SG = counts if isinstance(counts, np.ndarray) else counts.toarray()
    dense_SG = np.asarray(given_SG, np.float32)
    if library_S is None:
        library_S = dense_SG.sum(axis=1, dtype=np.float64)
    factor_S = np.divide(target, library_S, out=np.zeros(len(dense_SG)), where=library_S > 0)
    return np.asarray(np.log1p(dense_SG * factor_S[:, None].astype(np.float32)))


def variable_genes(
    log_counts: Sequence[NDArray[np.floating]], genes: Sequence[Sequence[str]], num_genes: int
) -> list[str]:
    """Choose the genes whose log-normalised expression varies most (see most_variable).

    Args:
        log_counts: Per slide, log-normalised expression [S, G_slide].
        genes: Per slide, its G_slide gene names.
        num_genes: How many to choose of those that every slide has.

    Returns:
        Names, highest score first, ties by name: the same for any order of slides or genes.

    Raises:
        ValueError: Where fewer than num_genes are present on every slide.
    """
    common = sorted(set(genes[0]).intersection(*genes[1:])) if genes else []
    if not 0 < num_genes <= len(common):
        message = (
            f"{num_genes} variable genes asked for, but {len(common)} genes pass the filters on "
            f"every one of {len(genes)} training slides. Ask for 1 to {len(common)}, lower the "
            "thresholds, or leave out the shallowest slide."
        )
        raise ValueError(message)
    aligned = [
        values_SG[:, gene_columns(names, common, "training slide")]
        for values_SG, names in zip(log_counts, genes, strict=True)
    ]
    return [common[column] for column in most_variable(aligned, num_genes)[0]]


def read_panel(panel: str | Sequence[str]) -> list[str]:
    """Return an explicit panel, in its order.

    Args:
        panel: Gene names, or the address of a text file with one a line (blank lines and lines
            that start with # are passed over).

    Raises:
        ValueError: Where it is missing, empty or names a gene twice.
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
        message = f"{source}: no gene named. Give at least one gene."
        raise ValueError(message)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        message = f"{source}: {repeated[:5]} occur more than once. Name each gene once."
        raise ValueError(message)
    return names


def gene_columns(genes: Sequence[str], panel: Sequence[str], source: str) -> NDArray[np.int64]:
    """Return the column of every panel gene.

    Raises:
        ValueError: Naming up to five genes that `genes` lacks, with close matches.
    """
    column_of = {name: column for column, name in enumerate(genes)}
    absent = [name for name in panel if name not in column_of]
    if absent:
        upper = {name.upper(): name for name in genes}
        hints = []
        for name in absent[:5]:
            close = difflib.get_close_matches(name.upper(), list(upper), n=2, cutoff=0.75)
            hints.append(f"{name} (close: {', '.join(upper[match] for match in close) or 'none'})")
        message = (
            f"{source}: {len(absent)} of {len(panel)} panel genes are not among its "
            f"{len(genes)} genes: {'; '.join(hints)}. Remove them from the panel or give counts "
            "that hold them (gene symbols, same species)."
        )
        raise ValueError(message)
    return np.array([column_of[name] for name in panel], np.int64)


@dataclass(frozen=True)
class Targets:
    """What K spots of a slide should teach about a panel of P genes.

    Attributes:
        kept: int64 [K], the spots that pass the filters, ascending.
        values_KP: float32 [K, P], log-normalised expression, not scaled (see robust_scale).
        counts_KP: float32 [K, P], raw counts.
        library_K: float64 [K], counts over the genes that pass the filters.
        num_genes: How many these are.
    """

    kept: NDArray[np.int64]
    values_KP: NDArray[np.float32]
    counts_KP: NDArray[np.float32]
    library_K: NDArray[np.float64]
    num_genes: int


def make_targets(
    spots: Spots, panel: Sequence[str], source: str, limits: CountFilter = DEFAULT_FILTER
) -> Targets:
    """Return what a slide's spots should teach: expression and counts of the panel.

    The library size counts the genes that pass the filters, so it does not depend on the panel. A
    panel gene that is too rare to pass on this slide is still read from its counts.

    Args:
        spots: All spots and genes of the slide.
        panel: P gene names.
        source: The slide, named in errors.
        limits: Filters (see filter_counts).

    Raises:
        ValueError: Where nothing passes, or the slide has no counts for a panel gene.
    """
    columns = gene_columns(spots.genes, panel, source)
    passing = filter_counts(spots, source, limits)
    library_K = np.asarray(passing.counts.sum(axis=1, dtype=np.float64)).ravel()
    kept = np.flatnonzero(np.isin(spots.spot_id, passing.spot_id))
    counts_KP = spots.counts[kept][:, columns].toarray()
    values_KP = log_normalise(counts_KP, library_K)
    return Targets(kept, values_KP, counts_KP, library_K, len(passing.genes))


def panel_targets(
    spots: Spots, panel: Sequence[str], source: str, limits: CountFilter = DEFAULT_FILTER
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the spots kept and their log-normalised expression (see make_targets)."""
    targets = make_targets(spots, panel, source, limits)
    return targets.kept, targets.values_KP


def size_factors(library_S: NDArray[np.floating], source: str) -> NDArray[np.float64]:
    """Return each spot's library size over the median of the slide, for negative-binomial losses.

    Args:
        library_S: Counts per spot over the genes that pass the filters [S].
        source: The slide, named in errors.

    Returns:
        float64 [S], positive, with median 1.

    Raises:
        ValueError: Where a spot has no counts: filters with min_spot_counts 0 let it pass.
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

    Equals scikit-learn's RobustScaler(with_centering=False, quantile_range=(0, 95)). The paper
    says "to [0, 1]"; values above the 95 % quantile exceed 1. Fitted per slide, so it takes the
    slide's own sensitivity out of the targets.

    Args:
        values_SG: Log-normalised expression [S, G].

    Returns:
        (scaled float32 [S, G], scale float64 [G]). A gene without range has scale 1.
    """
    low_G, high_G = np.percentile(np.asarray(values_SG, np.float64), (0, 95), axis=0)
    scale_G = high_G - low_G
    scale_G[scale_G < 10 * np.finfo(np.float64).eps] = 1.0
    return (values_SG / scale_G).astype(np.float32), scale_G
