"""Choose variable genes by variance of log counts, or as scanpy's `seurat_v3` with batches.

A batch is a slide. Shape letters: S spots of a slide, G genes, V genes that vary, B slides.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from skmisc.loess import loess  # type: ignore[import-untyped]

SPAN = 0.3


def normalised_variance(
    counts_SG: sparse.csr_matrix, source: str, span: float = SPAN
) -> NDArray[np.float64]:
    """Return each gene's variance without its dependence on the mean.

    The method is that of Seurat v3 (Stuart et al., Cell 2019) and of scanpy's
    highly_variable_genes(flavor="seurat_v3"). A local quadratic fit of log10 variance on log10 mean
    gives the expected standard deviation. Counts are standardised by it and clipped at sqrt(S);
    their variance is the result. The fit is scanpy's too: Cleveland and Grosse's loess in
    scikit-misc.

    Args:
        counts_SG: Raw counts [S, G].
        source: Name of the slide in errors.
        span: Share of the genes in each local fit.

    Returns:
        float64 [G]; 0 for a gene with the same count in all spots.

    Raises:
        ValueError: There are fewer than two spots, or the fit fails. It fails with few genes, or
            with many genes of the same few counts.
    """
    num_spots = counts_SG.shape[0]
    if num_spots < 2:
        message = f"{source}: {num_spots} spots have no variance. Leave the slide out of training."
        raise ValueError(message)
    counts = sparse.csc_matrix(counts_SG, dtype=np.float64)
    mean_G = np.asarray(counts.sum(axis=0)).ravel() / num_spots
    squares_G = np.asarray(counts.multiply(counts).sum(axis=0)).ravel()
    # Scanpy's order of operations gives the same ties, to the last bit.
    variance_G = (squares_G / num_spots - mean_G**2) * (num_spots / (num_spots - 1))
    varies = variance_G > 0
    log_variance_G = np.zeros(len(mean_G))
    log_variance_G[varies] = _smooth(mean_G[varies], variance_G[varies], source, span)
    deviation_G = np.sqrt(10**log_variance_G)
    limit_G = deviation_G * np.sqrt(num_spots) + mean_G
    num_stored_G = np.diff(counts.indptr)
    clipped = counts.copy()
    clipped.data = np.minimum(counts.data, np.repeat(limit_G, num_stored_G))
    sums_G = np.asarray(clipped.sum(axis=0)).ravel()
    clipped.data **= 2
    squares_G = np.asarray(clipped.sum(axis=0)).ravel()
    spread_G = num_spots * mean_G**2 + squares_G - 2 * sums_G * mean_G
    return np.asarray(1 / ((num_spots - 1) * deviation_G**2) * spread_G)


def _smooth(
    mean_V: NDArray[np.float64], variance_V: NDArray[np.float64], source: str, span: float
) -> NDArray[np.float64]:
    """Return the expected log10 variance of V genes that vary, float64 [V]."""
    try:
        model = loess(np.log10(mean_V), np.log10(variance_V), span=span, degree=2)
        model.fit()
    except ValueError as error:
        message = (
            f"{source}: the trend of variance over mean of its {len(mean_V)} genes cannot be "
            f"fitted ({str(error).strip()}). seurat_v3 needs at least about 100 genes of different "
            "depth: raise min_gene_counts, use genes `variable:N`, or leave the slide out."
        )
        raise ValueError(message) from error
    return np.asarray(model.outputs.fitted_values, np.float64)


def rank_over_slides(
    score_BG: NDArray[np.floating], num_genes: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Rank genes over slides as scanpy's `seurat_v3` does with a batch key.

    On each slide the num_genes best genes get ranks from 0. A gene's rank is the median over the
    slides that rank it. Genes are ordered by this rank, then by the number of slides that rank them
    (more first), then by column. Equal scores on a slide are ranked by column; scanpy's sort leaves
    their order open.

    Args:
        score_BG: Score of every gene on every slide [B, G]; higher is more variable.
        num_genes: Number of genes that a slide ranks.

    Returns:
        (columns from best to worst, int64 [G]; median rank, float64 [G], NaN if no slide ranks the
        gene; number of slides that rank the gene, int64 [G]).
    """
    order_BG = np.argsort(-np.asarray(score_BG), axis=1, kind="stable")
    rank_BG = np.argsort(order_BG, axis=1, kind="stable").astype(np.float64)
    ranked_BG = rank_BG < num_genes
    num_slides_G = ranked_BG.sum(axis=0)
    median_G = np.full(score_BG.shape[1], np.nan)
    chosen = num_slides_G > 0
    median_G[chosen] = np.nanmedian(np.where(ranked_BG, rank_BG, np.nan)[:, chosen], axis=0)
    last_G = np.where(chosen, median_G, np.inf)
    order = np.lexsort((np.arange(len(last_G)), -num_slides_G, last_G))
    return order.astype(np.int64), median_G, num_slides_G.astype(np.int64)


def highly_variable(
    counts: Sequence[sparse.csr_matrix], sources: Sequence[str], num_genes: int
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Choose the highly variable genes of all slides together.

    The result equals scanpy.pp.highly_variable_genes(flavor="seurat_v3", batch_key=...) on the
    concatenated slides, except for ties (see rank_over_slides).

    Args:
        counts: Raw counts [S, G] of the same G genes, per slide.
        sources: Names of the slides in errors.
        num_genes: Number of genes to choose.

    Returns:
        (columns of the chosen genes, best first, int64; scores `rank`, `normalised_variance` (mean
        over slides) and `num_slides` of every gene [G]).
    """
    score_BG = np.stack(
        [normalised_variance(c, name) for c, name in zip(counts, sources, strict=True)]
    )
    order, rank_G, num_slides_G = rank_over_slides(score_BG, num_genes)
    scores = {
        "rank": rank_G,
        "normalised_variance": score_BG.mean(axis=0),
        "num_slides": num_slides_G.astype(np.float64),
    }
    return order[:num_genes], scores


def most_variable(
    log_counts: Sequence[NDArray[np.floating]], num_genes: int
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Choose the genes whose log-normalised expression varies most.

    A gene's score is its variance over the spots of a slide, averaged over slides. Strongly
    expressed genes dominate it; `highly_variable` removes this dependence on the mean.

    Args:
        log_counts: Log-normalised expression [S, G] of the same G genes, per slide.
        num_genes: Number of genes to choose.

    Returns:
        (columns of the chosen genes, best first, ties by column, int64; score `variance` of every
        gene [G]).
    """
    scores = [np.var(values_SG, axis=0, dtype=np.float64) for values_SG in log_counts]
    # Sorting makes the mean, to the last bit, independent of the order of the slides.
    score_G = np.sort(np.stack(scores), axis=0).mean(axis=0)
    order = np.lexsort((np.arange(len(score_G)), -score_G))
    return order[:num_genes].astype(np.int64), {"variance": score_G}
