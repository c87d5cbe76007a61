"""Variable genes: by variance of log counts, or as scanpy's `seurat_v3`, one batch a slide.

Shape letters: S spots of a slide, G genes, B slides.
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
    """Return each gene's variance after its dependence on the mean is taken out.

    Stuart et al., Cell 2019 (Seurat v3), as in scanpy's highly_variable_genes(flavor="seurat_v3"):
    a local quadratic fit of log10 variance on log10 mean gives the expected standard deviation;
    counts are standardised by it, clipped at sqrt(S), and their variance taken. The fit is that of
    scanpy: the loess of Cleveland and Grosse in scikit-misc.

    Args:
        counts_SG: Raw counts [S, G].
        source: The slide, named in errors.
        span: Share of the genes that each local fit sees.

    Returns:
        float64 [G]; 0 for a gene whose counts are all the same.

    Raises:
        ValueError: Where there are fewer than two spots, or the fit fails, as it does for few
            genes or many genes with the same few counts.
    """
    num_spots = counts_SG.shape[0]
    if num_spots < 2:
        message = f"{source}: {num_spots} spots have no variance. Leave the slide out of training."
        raise ValueError(message)
    counts = sparse.csc_matrix(counts_SG, dtype=np.float64)
    mean_G = np.asarray(counts.sum(axis=0)).ravel() / num_spots
    squares_G = np.asarray(counts.multiply(counts).sum(axis=0)).ravel()
    # In scanpy's order of operations, so that what ties there ties here, to the last bit.
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
    """Return the expected log10 variance of V genes that vary."""
    try:
        model = loess(np.log10(mean_V), np.log10(variance_V), span=span, degree=2)
        model.fit()
    except ValueError as error:
        message = (
            f"{source}: the trend of variance over mean of its {len(mean_V)} genes cannot be "
            f"fitted ({str(error).strip()}). seurat_v3 needs some hundred genes of different "
            "depth: raise min_gene_counts, use genes `variable:N`, or leave the slide out."
        )
        raise ValueError(message) from error
    return np.asarray(model.outputs.fitted_values, np.float64)


def rank_over_slides(
    score_BG: NDArray[np.floating], num_genes: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Rank genes over slides as scanpy's `seurat_v3` does with a batch key.

    On each slide the num_genes best genes get ranks from 0; a gene's rank is the median over the
    slides where it has one. Genes are ordered by that, then by the number of slides where they have
    one (more first), then by column. Where scores tie on a slide the earlier column comes first
    (scanpy leaves that to an unstable sort).

    Args:
        score_BG: Score of every gene on every slide [B, G], higher is more variable.
        num_genes: How many genes a slide ranks.

    Returns:
        (order, median rank [G] with NaN where no slide ranks it, slides that rank it [G]): order
        is int64 [G], columns from the best on.
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
    """Choose the highly variable genes of some slides.

    Equals scanpy.pp.highly_variable_genes(flavor="seurat_v3", batch_key=the slide) on the slides
    put together, ties apart (see rank_over_slides).

    Args:
        counts: Per slide, raw counts [S, G] of the same G genes.
        sources: Names of the slides, for errors.
        num_genes: How many to choose.

    Returns:
        (columns of the chosen, best first; per gene [G] what was found: `rank`,
        `normalised_variance` (mean over slides) and `num_slides`).
    """
    score_BG = np.stack(
        [normalised_variance(c, name) for c, name in zip(counts, sources, strict=True)]
    )
    order, rank_G, num_slides_G = rank_over_slides(score_BG, num_genes)
    found = {
        "rank": rank_G,
        "normalised_variance": score_BG.mean(axis=0),
        "num_slides": num_slides_G.astype(np.float64),
    }
    return order[:num_genes], found


def most_variable(
    log_counts: Sequence[NDArray[np.floating]], num_genes: int
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Choose the genes whose log-normalised expression varies most.

    A gene's score is its variance over the spots of a slide, averaged over slides: simple, and
    dominated by strongly expressed genes (`highly_variable` takes the dependence on the mean out).

    Args:
        log_counts: Per slide, log-normalised expression [S, G] of the same G genes.
        num_genes: How many to choose.

    Returns:
        (columns of the chosen, best first, ties by column; per gene [G] the `variance`).
    """
    scores = [np.var(values_SG, axis=0, dtype=np.float64) for values_SG in log_counts]
    # Sorted before the mean so that the last bit does not depend on the order of the slides.
    score_G = np.sort(np.stack(scores), axis=0).mean(axis=0)
    order = np.lexsort((np.arange(len(score_G)), -score_G))
    return order[:num_genes].astype(np.int64), {"variance": score_G}
