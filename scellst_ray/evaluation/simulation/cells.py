"""Data of the simulation study: image cells with assigned expression, and spots made of them.

The study follows sCellST (Chadoutaud et al., Nature Communications 2026):

- Cells of an image are clustered by their embedding (PCA to 50 components, k-means).
- Each cluster is matched with a cell type of a single-cell reference.
- Three scenarios decide how much of a cell's expression follows from its image: nothing (random),
  everything (centroid), or its type (cell).
- A spot adds up the counts of 20 cells drawn with replacement.

Counts are added before they are normalised, as in a real spot. The published code adds
log-normalised values and normalises the sums again.

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
# Number of independent dimensions of synthetic embeddings.
LATENT_DIM = 30


def synthetic_embeddings(
    num_cells: int, embedding_dim: int, num_clusters: int, spread: float, seed: int
) -> NDArray[np.float32]:
    """Draw embeddings in clusters, as from an encoder that separates cell types.

    Centres and cells vary in 30 latent dimensions (fewer if embedding_dim is less). A random linear
    map spreads these over all D dimensions, and noise of 0.1 is added to each.

    Args:
        num_cells: N, divided evenly over the clusters.
        embedding_dim: D.
        num_clusters: Number of Gaussian clusters.
        spread: Standard deviation of cells around their centre in each latent dimension; that of
            the centres is 1. At a spread of 1, clusters overlap little.
        seed: Seed of the draw.

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
    """Cluster cells by embedding and keep the cells nearest to the centroid of each cluster.

    As published, k-means follows a PCA to 50 components. All clusters keep the same number of
    cells: `cells_per_cluster`, or the size of the smallest cluster if that is less.

    Returns:
        (rows, clusters): int64 [N'] rows of embeddings_ND and their cluster, sorted by cluster.

    Raises:
        ValueError: embeddings are not finite, or a cluster has too few cells to train and test on.
    """
    embeddings = np.asarray(embeddings_ND, np.float32)
    if embeddings.ndim != 2 or len(embeddings) < 20 * num_clusters:
        message = (
            f"embeddings of shape {embeddings.shape}: expected [cells, features] with at least "
            f"{20 * num_clusters} cells for {num_clusters} clusters."
        )
        raise ValueError(message)
    if not np.isfinite(embeddings).all():
        num_wrong = int((~np.isfinite(embeddings).all(axis=1)).sum())
        message = (
            f"{num_wrong} of {len(embeddings)} embeddings hold NaN or infinity. Extract the slides "
            "again."
        )
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
    """Disjoint parts of the image cells (or reference cells), as ascending indices.

    Attributes:
        fit: Cells whose spots train.
        val: Cells whose spots choose the learning rate and stop training.
        test: Cells that are only scored.
    """

    fit: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]

    @property
    def train(self) -> NDArray[np.int64]:
        """Cells of fit and val."""
        return np.union1d(self.fit, self.val)


def split_cells(groups_N: Sequence[int] | NDArray[np.int64], val_share: float, seed: int) -> Parts:
    """Split the cells of every group: half test, and val_share of the remaining cells validate.

    Cells are split, not spots: if spots of two parts shared cells, memorised cells would score
    well.
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
    """Counts of cells.

    Attributes:
        counts_NP: float32 [N, P], counts of the panel's genes.
        library_N: float64 [N], total counts over all genes of the reference.
    """

    counts_NP: NDArray[np.float32]
    library_N: NDArray[np.float64]

    def normalise_cells(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return log-normalised expression of these cells [len(rows), P]."""
        return log_normalise(self.counts_NP[rows], self.library_N[rows])

    def normalise_spots(self, cells_SK: NDArray[np.int64]) -> NDArray[np.float32]:
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
    """Draw the reference cell whose counts each image cell gets, with replacement.

    Args:
        scenario: "random" (a reference cell of any type, so the image says nothing) or "cell" (a
            reference cell of the matched type). Scenario "centroid" draws nothing: see
            expressed_counts.
        cluster_N: Cluster of each image cell. Cluster k is matched with type k.
        type_C: Type of each reference cell.
        seed: Seed of the draw.

    Returns:
        int64 [N], rows of the reference.

    Raises:
        ValueError: the scenario is unknown, or the type of a cluster has no reference cell.
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
            message = (
                f"cluster {cluster} is matched with a type without reference cells. Give a "
                "reference with more cells of each type."
            )
            raise ValueError(message)
        is_in = cluster_N == cluster
        drawn_N[is_in] = rng.choice(of_type, int(is_in.sum()))
    return drawn_N


def expressed_counts(
    scenario: str,
    reference: CellCounts,
    type_C: NDArray[np.int64],
    cluster_N: NDArray[np.int64],
    parts: tuple[Parts, Parts],
    seed: int,
) -> CellCounts:
    """Return the counts of every image cell.

    Training image cells draw from training reference cells, and test image cells from test
    reference cells. So no measured cell is on both sides. In scenario "centroid", all image cells
    of a type have the mean counts of its training reference cells.

    Args:
        scenario: One of SCENARIOS.
        reference: Counts of the reference cells.
        type_C: Type of each reference cell.
        cluster_N: Cluster of each image cell.
        parts: (parts of the image cells, parts of the reference cells).
        seed: Seed of the draw.
    """
    image, known = parts
    if scenario == "centroid":
        of_type = [known.train[type_C[known.train] == t] for t in range(int(cluster_N.max()) + 1)]
        means_TP = np.stack([reference.counts_NP[rows].mean(axis=0) for rows in of_type])
        library_T = np.array([reference.library_N[rows].mean() for rows in of_type])
        return CellCounts(means_TP[cluster_N], library_T[cluster_N])
    drawn_N = np.empty(len(cluster_N), np.int64)
    pairs = ((image.train, known.train), (image.test, known.test))
    for part, (image_rows, reference_rows) in enumerate(pairs):
        index = assign_expression(
            scenario, cluster_N[image_rows], type_C[reference_rows], seed + 1000 * part
        )
        drawn_N[image_rows] = reference_rows[index]
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
    """Return (mean, low, high): mean and 95 % bootstrap interval of values, NaN left out.

    The draws are over genes, as for the error bars of the paper. So the interval shows how much the
    mean depends on the panel.
    """
    known = np.asarray(values, np.float64)[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng([seed, 5])
    means = known[rng.integers(0, len(known), (num_samples, len(known)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(known.mean()), float(low), float(high)
