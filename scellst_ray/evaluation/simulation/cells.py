"""The simulation study's data: image cells that are given expression, and spots built from them.

After sCellST (Chadoutaud et al., Nature Communications 2026): cells of an image are clustered by
their embedding (PCA to 50, k-means), each cluster is matched with a cell type of a single-cell
reference, and three scenarios say how much of a cell's expression its image tells: nothing
(random), all (centroid), its type (cell). Spots add up the counts of 20 cells drawn with
replacement. Counts are added before they are normalised, as a spot does it; the published code
adds log-normalised values, and normalises those again.

Shape letters: N image cells, C reference cells, T types, S spots, K cells of a spot, P genes of
the panel, G genes of the reference, D embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from scellst_ray.spots.panel import log_normalise

SCENARIOS = ("random", "centroid", "cell")
NUM_COMPONENTS = 50
# Dimensions in which synthetic embeddings really vary.
LATENT_DIM = 30


def synthetic_embeddings(
    num_cells: int, embedding_dim: int, num_clusters: int, spread: float, seed: int
) -> NDArray[np.float32]:
    """Draw embeddings in clusters, as an encoder that sees cell types would give them.

    Centres and cells vary in 30 latent dimensions (fewer if embedding_dim is less), which a random
    linear map spreads over all D, plus noise of 0.1 in each.

    Args:
        num_cells: N, shared out evenly.
        embedding_dim: D.
        num_clusters: Gaussian clusters.
        spread: Standard deviation of cells around their centre, where that of the centres is 1, in
            each latent dimension. At 1 clusters overlap little, since the dimensions add up.
        seed: Fixes the draw.

    Returns:
        float32 [N, D], the clusters in random order.
    """
    rng = np.random.default_rng([seed, 1])
    latent_dim = min(LATENT_DIM, embedding_dim)
    centres = rng.standard_normal((num_clusters, latent_dim))
    cluster_N = rng.permutation(np.arange(num_cells) % num_clusters)
    latent = centres[cluster_N] + spread * rng.standard_normal((num_cells, latent_dim))
    mixing = rng.standard_normal((latent_dim, embedding_dim)) / np.sqrt(latent_dim)
    noise = rng.standard_normal((num_cells, embedding_dim), dtype=np.float32)
    return np.asarray(latent @ mixing, np.float32) + 0.1 * noise


def choose_image_cells(
    embeddings_ND: NDArray[np.floating], num_clusters: int, cells_per_cluster: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cluster cells by embedding and keep, of each cluster, those nearest to its centroid.

    PCA to 50 components, then k-means, as published. Every cluster keeps as many: fewer than asked
    for if the smallest cluster has fewer.

    Returns:
        (rows, clusters): int64 [N'] rows of embeddings_ND and their cluster, cluster by cluster.

    Raises:
        ValueError: Embeddings are not finite, or a cluster has too few cells to train and test on.
    """
    embeddings = np.asarray(embeddings_ND, np.float32)
    if embeddings.ndim != 2 or len(embeddings) < 20 * num_clusters:
        message = (
            f"embeddings of shape {embeddings.shape}: expected [cells, features] with at least "
            f"{20 * num_clusters} cells for {num_clusters} clusters."
        )
        raise ValueError(message)
    if not np.isfinite(embeddings).all():
        bad = int((~np.isfinite(embeddings).all(axis=1)).sum())
        message = f"{bad} of {len(embeddings)} embeddings hold NaN or infinity: extract them again."
        raise ValueError(message)
    components = min(NUM_COMPONENTS, *embeddings.shape)
    scores = PCA(components, svd_solver="randomized", random_state=seed).fit_transform(embeddings)
    kmeans = KMeans(num_clusters, n_init=10, random_state=seed).fit(scores)
    distance_N = kmeans.transform(scores).min(axis=1)
    members = [np.flatnonzero(kmeans.labels_ == k) for k in range(num_clusters)]
    keep = min(cells_per_cluster, *map(len, members))
    if keep < 20:
        message = (
            f"the smallest of {num_clusters} clusters has {keep} cells, expected at least 20. Give "
            "more cells or fewer clusters."
        )
        raise ValueError(message)
    chosen = [rows[np.argsort(distance_N[rows], kind="stable")[:keep]] for rows in members]
    return np.concatenate(chosen), np.repeat(np.arange(num_clusters), keep)


@dataclass(frozen=True)
class Parts:
    """Which image cells (or reference cells) serve what: indices, ascending, nothing in two.

    Attributes:
        fit: Cells whose spots train.
        val: Cells whose spots choose the learning rate and stop training.
        test: Cells nothing is chosen by.
    """

    fit: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]

    @property
    def train(self) -> NDArray[np.int64]:
        """Cells that are not for testing."""
        return np.union1d(self.fit, self.val)


def split_cells(groups_N: Sequence[int] | NDArray[np.int64], val_share: float, seed: int) -> Parts:
    """Split cells within every group: half test; of the others, val_share validate.

    Cells are split, not spots: spots that share cells would not notice cells learnt by heart.
    """
    groups = np.asarray(groups_N)
    rng = np.random.default_rng([seed, 2])
    part_N = np.empty(len(groups), np.int64)
    for group in np.unique(groups):
        rows = rng.permutation(np.flatnonzero(groups == group))
        num_train = len(rows) - len(rows) // 2
        num_val = max(1, round(val_share * num_train))
        part_N[rows] = 2
        part_N[rows[:num_train]] = 0
        part_N[rows[:num_val]] = 1
    return Parts(*(np.flatnonzero(part_N == part) for part in range(3)))


@dataclass(frozen=True)
class CellCounts:
    """What cells express.

    Attributes:
        counts_NP: float32 [N, P], counts of the panel.
        library_N: float64 [N], counts over all genes of the reference.
    """

    counts_NP: NDArray[np.float32]
    library_N: NDArray[np.float64]

    def logged(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return log-normalised expression of these cells [len(rows), P]."""
        return log_normalise(self.counts_NP[rows], self.library_N[rows])

    def spots(self, cells_SK: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return log-normalised expression [S, P] of spots: counts are added, then normalised."""
        num_spots, num_cells = cells_SK.shape
        offsets = np.arange(num_spots + 1) * num_cells
        ones = np.ones(cells_SK.size, np.float32)
        shape = (num_spots, len(self.counts_NP))
        member = sparse.csr_matrix((ones, cells_SK.ravel(), offsets), shape=shape)
        return log_normalise(member @ self.counts_NP, self.library_N[cells_SK].sum(axis=1))


def assign_expression(
    scenario: str, cluster_N: NDArray[np.int64], type_C: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """Draw the reference cell that each image cell expresses; cluster k is matched with type k.

    Args:
        scenario: "random" (a cell of any type: the image tells nothing) or "cell" (a cell of the
            matched type). In "centroid" there is nothing to draw: see expressed_counts.
        cluster_N: Cluster of each image cell.
        type_C: Type of each reference cell.
        seed: Fixes the draw, with replacement.

    Returns:
        int64 [N], rows of the reference.

    Raises:
        ValueError: Unknown scenario, or a cluster whose type has no reference cell.
    """
    if scenario not in ("random", "cell"):
        message = f"scenario is {scenario!r}, expected 'random' or 'cell'."
        raise ValueError(message)
    rng = np.random.default_rng([seed, 3])
    if scenario == "random":
        return rng.integers(0, len(type_C), len(cluster_N))
    drawn_N = np.empty(len(cluster_N), np.int64)
    for cluster in np.unique(cluster_N):
        of_type = np.flatnonzero(type_C == cluster)
        if not len(of_type):
            message = f"cluster {cluster} is matched with a type without reference cells."
            raise ValueError(message)
        mine = cluster_N == cluster
        drawn_N[mine] = rng.choice(of_type, int(mine.sum()))
    return drawn_N


def expressed_counts(
    scenario: str,
    reference: CellCounts,
    type_C: NDArray[np.int64],
    cluster_N: NDArray[np.int64],
    parts: tuple[Parts, Parts],
    seed: int,
) -> CellCounts:
    """Give every image cell its counts.

    Image cells for training draw from reference cells for training, those for testing from those
    for testing: no measured cell is on both sides. A type's centroid, the mean of its counts over
    training cells, is the same for all.

    Args:
        scenario: One of SCENARIOS.
        reference: Counts of the reference cells.
        type_C: Their types.
        cluster_N: Clusters of the image cells.
        parts: (of image cells, of reference cells).
        seed: Fixes the draw.
    """
    image, known = parts
    if scenario == "centroid":
        of_type = [known.train[type_C[known.train] == t] for t in range(int(cluster_N.max()) + 1)]
        means_TP = np.stack([reference.counts_NP[rows].mean(axis=0) for rows in of_type])
        library_T = np.array([reference.library_N[rows].mean() for rows in of_type])
        return CellCounts(means_TP[cluster_N], library_T[cluster_N])
    drawn_N = np.empty(len(cluster_N), np.int64)
    for part, (mine, theirs) in enumerate(((image.train, known.train), (image.test, known.test))):
        index = assign_expression(scenario, cluster_N[mine], type_C[theirs], seed + 1000 * part)
        drawn_N[mine] = theirs[index]
    return CellCounts(reference.counts_NP[drawn_N], reference.library_N[drawn_N])


def draw_spots(
    cells: NDArray[np.int64], num_spots: int, cells_per_spot: int, seed: int
) -> NDArray[np.int64]:
    """Return the cells of each spot, int64 [S, K], drawn from `cells` with replacement."""
    rng = np.random.default_rng([seed, 4])
    return rng.choice(cells, (num_spots, cells_per_spot))


def bootstrap_mean(
    values: NDArray[np.floating], seed: int, num_samples: int = 1000
) -> tuple[float, float, float]:
    """Return mean and 95 % bootstrap interval (percentiles) of values, NaN left out.

    Genes are drawn, as in the bars of the paper: it tells how much the mean depends on the panel.
    """
    known = np.asarray(values, np.float64)[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng([seed, 5])
    means = known[rng.integers(0, len(known), (num_samples, len(known)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(known.mean()), float(low), float(high)
