"""Choose spatially variable genes: Moran's I on the graph of neighbouring spots, over slides.

Shape letters: S spots of a slide, G genes, B slides. The pitch is the distance of neighbouring
spots of a lattice.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

# In pitches: the second ring of neighbours lies 1.41 (squares) or 1.73 (hexagons) pitches away.
RING_REACH = 1.2
NUM_NEAREST = 6
# Genes per block: bounds the memory at S x 1024 float64.
BLOCK_GENES = 1024


@dataclass(frozen=True)
class SpotGraph:
    """Graph of neighbouring spots.

    Attributes:
        weights: Symmetric matrix, 1 between neighbours and 0 elsewhere, CSR float64 [S, S].
        kind: Rule for neighbours. 'lattice': spots within 1.2 pitches, 6 on Visium and 4 on ST
            arrays inside the border. 'nearest': the 6 nearest spots, in either direction.
        pitch0: Pitch as the median distance to the second nearest spot, level-0 px. Jitter biases
            it less than the distance to the nearest spot.
    """

    weights: sparse.csr_matrix
    kind: str
    pitch0: float


def neighbour_graph(xy0: NDArray[np.floating], source: str) -> SpotGraph:
    """Link spots to their neighbours: the first ring of a lattice, else the nearest spots.

    Spots form a lattice if the distance to the second nearest is within 15 % of its median for 80 %
    of the spots. Visium and bins do, and so do ST arrays placed by hand (her2st: 96 %). Scattered
    points do not (25 to 35 %).

    Args:
        xy0: Spot centres [S, 2], in any unit.
        source: Name of the slide in errors.

    Raises:
        ValueError: There are too few spots, or most of them lie on each other.
    """
    points = np.asarray(xy0, np.float64)
    if len(points) <= NUM_NEAREST:
        message = (
            f"{source}: {len(points)} spots are too few for spatially variable genes, which need "
            f"more than {NUM_NEAREST}. Leave the slide out, or choose genes `hvg:N`."
        )
        raise ValueError(message)
    tree = cKDTree(points)
    second = tree.query(points, k=3)[0][:, 2]
    pitch0 = float(np.median(second))
    if pitch0 <= 0:
        message = f"{source}: most spots lie on other spots. Check the spot positions."
        raise ValueError(message)
    if np.mean(np.abs(second - pitch0) <= 0.15 * pitch0) >= 0.8:
        pairs = tree.query_pairs(RING_REACH * pitch0, output_type="ndarray")
        rows, columns, kind = pairs[:, 0], pairs[:, 1], "lattice"
    else:
        columns = tree.query(points, k=NUM_NEAREST + 1)[1][:, 1:].ravel()
        rows, kind = np.repeat(np.arange(len(points)), NUM_NEAREST), "nearest"
    shape = (len(points), len(points))
    half = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)
    weights = half.maximum(half.T).tocsr()
    weights.setdiag(0)
    weights.eliminate_zeros()
    return SpotGraph(weights, kind, pitch0)


def morans_i(
    weights: sparse.csr_matrix, values_SG: NDArray[np.floating], *, row_normalise: bool = True
) -> NDArray[np.float64]:
    """Return Moran's I of every gene (Moran, Biometrika 1950).

    I = S / sum(w) * sum_ij w_ij z_i z_j / sum_i z_i^2 with z centred on the mean. The result equals
    squidpy.gr.spatial_autocorr(mode="moran") on the same graph; squidpy calls `row_normalise`
    `transformation`.

    Args:
        weights: Weights of the graph, CSR [S, S].
        values_SG: Expression [S, G].
        row_normalise: Whether the weights of each spot's neighbours are scaled to the sum 1.

    Returns:
        float64 [G]; NaN for a gene with one value in all spots, and for all genes if the graph has
        no links.
    """
    graph = sparse.csr_matrix(weights, dtype=np.float64)
    if row_normalise:
        sums = np.asarray(graph.sum(axis=1)).ravel()
        inverse = np.divide(1.0, sums, out=np.zeros_like(sums), where=sums != 0)
        graph = sparse.csr_matrix(sparse.diags_array(inverse) @ graph)
    total = graph.sum()
    num_spots, num_genes = values_SG.shape
    score_G = np.full(num_genes, np.nan)
    for start in range(0, num_genes, BLOCK_GENES):
        block = np.asarray(values_SG[:, start : start + BLOCK_GENES], np.float64)
        z = block - block.mean(axis=0)
        squares = (z * z).sum(axis=0)
        # Deviations of a constant gene are rounding errors.
        varies = (np.ptp(block, axis=0) > 0) & (squares > 0) & (total > 0)
        products = (z * (graph @ z)).sum(axis=0)
        ratio = np.divide(products, squares, out=np.full(len(squares), np.nan), where=varies)
        score_G[start : start + BLOCK_GENES] = ratio * num_spots / (total if total > 0 else 1.0)
    return score_G


def spatially_variable(
    score_BG: NDArray[np.floating], num_genes: int
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Choose genes by the geometric mean over slides of their Moran's I, as the sCellST paper does.

    A geometric mean needs scores of 0 or more, so a negative score or NaN counts as 0. A gene that
    is not spatial on one slide therefore ranks below every gene that is spatial on all slides. Ties
    are ordered by the arithmetic mean, then by column.

    Args:
        score_BG: Moran's I per slide and gene [B, G].
        num_genes: Number of genes to choose.

    Returns:
        (columns of the chosen genes, best first, int64; scores `geometric_mean` and
        `mean_morans_i` of every gene [G]).
    """
    known_BG = np.nan_to_num(np.asarray(score_BG, np.float64), nan=0.0)
    # Sorting makes the sum, to the last bit, independent of the order of the slides.
    known_BG = np.sort(known_BG, axis=0)
    positive_BG = np.maximum(known_BG, 0.0)
    geometric_G = np.zeros(known_BG.shape[1])
    all_positive = (positive_BG > 0).all(axis=0)
    geometric_G[all_positive] = np.exp(np.log(positive_BG[:, all_positive]).mean(axis=0))
    mean_G = known_BG.mean(axis=0)
    order = np.lexsort((np.arange(len(mean_G)), -mean_G, -geometric_G))
    return order[:num_genes].astype(np.int64), {
        "geometric_mean": geometric_G,
        "mean_morans_i": mean_G,
    }
