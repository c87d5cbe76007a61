"""Spatially variable genes: Moran's I on the graph of neighbouring spots, combined over slides.

Shape letters: S spots of a slide, G genes, B slides.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

# On a lattice the next ring lies 1.41 (squares) or 1.73 (hexagons) pitches away.
RING_REACH = 1.2
NUM_NEAREST = 6
# Genes at a time: bounds memory at S x this many float64.
BLOCK_GENES = 1024


@dataclass(frozen=True)
class SpotGraph:
    """Which spots are neighbours.

    Attributes:
        weights: CSR float64 [S, S], symmetric, 1 between neighbours, nothing on the diagonal.
        kind: 'lattice' (all within 1.2 pitches: 6 on Visium, 4 on ST arrays, less at borders) or
            'nearest' (the 6 nearest, in either direction).
        pitch0: Median distance to the second nearest spot, level-0 px: the pitch of a lattice, with
            less bias than the nearest where spots jitter.
    """

    weights: sparse.csr_matrix
    kind: str
    pitch0: float


def neighbour_graph(xy0: NDArray[np.floating], source: str) -> SpotGraph:
    """Link spots to their neighbours: the first ring of a lattice, else the nearest ones.

    Spots count as a lattice where for four in five the second nearest is within 15 % of the median
    distance. Visium and bins do; so do hand-placed ST arrays (her2st: 96 %), scattered points do
    not (25 to 35 %).

    Args:
        xy0: Spot centres [S, 2], in any unit.
        source: The slide, named in errors.

    Raises:
        ValueError: Where there are too few spots to have neighbours, or they lie on each other.
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
        message = f"{source}: most of its spots lie on other spots. Check the spot positions."
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

    I = S / sum(w) * sum_ij w_ij z_i z_j / sum_i z_i^2 with z centred on the mean. As
    squidpy.gr.spatial_autocorr(mode="moran") on the same graph; its `transformation` is
    `row_normalise`.

    Args:
        weights: Graph [S, S].
        values_SG: Expression [S, G].
        row_normalise: Let the neighbours of each spot weigh 1 together.

    Returns:
        float64 [G]; NaN for a gene that is the same in every spot (and for all without a link).
    """
    graph = sparse.csr_matrix(weights, dtype=np.float64)
    if row_normalise:
        sums = np.asarray(graph.sum(axis=1)).ravel()
        inverse = np.divide(1.0, sums, out=np.zeros_like(sums), where=sums != 0)
        graph = sparse.csr_matrix(sparse.diags_array(inverse) @ graph)
    total = graph.sum()
    num_spots, num_genes = values_SG.shape
    found = np.full(num_genes, np.nan)
    for start in range(0, num_genes, BLOCK_GENES):
        block = np.asarray(values_SG[:, start : start + BLOCK_GENES], np.float64)
        z = block - block.mean(axis=0)
        squares = (z * z).sum(axis=0)
        # A constant's deviations are rounding, not variation.
        varies = (np.ptp(block, axis=0) > 0) & (squares > 0) & (total > 0)
        products = (z * (graph @ z)).sum(axis=0)
        ratio = np.divide(products, squares, out=np.full(len(squares), np.nan), where=varies)
        found[start : start + BLOCK_GENES] = ratio * num_spots / (total if total > 0 else 1.0)
    return found


def spatially_variable(
    score_BG: NDArray[np.floating], num_genes: int
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Choose genes by the geometric mean over slides of their Moran's I, as the paper says.

    A geometric mean has no place for negative scores: one below 0, or none (NaN), counts as 0, so
    a gene that is not spatial on one slide comes after every gene that is on all. Among such genes,
    and where means tie, the arithmetic mean decides, then the column.

    Args:
        score_BG: Moran's I per slide and gene [B, G].
        num_genes: How many to choose.

    Returns:
        (columns of the chosen, best first; per gene [G] what was found: `geometric_mean`,
        `mean_morans_i`).
    """
    known_BG = np.nan_to_num(np.asarray(score_BG, np.float64), nan=0.0)
    # Sorted first, so that the last bit does not depend on the order of the slides.
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
