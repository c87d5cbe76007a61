"""One condition of the simulation study: build spots, fit a head, score it on test cells.

Shape letters: N image cells, S spots, K cells of a spot, P genes of the panel, D embedding.
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scellst_ray.evaluation.expression.metrics import pearson_by_column
from scellst_ray.evaluation.simulation.cells import (
    CellCounts,
    Parts,
    bootstrap_mean,
    draw_spots,
    expressed_counts,
)
from scellst_ray.evaluation.simulation.fit import Search, fit_rows, predict_rows, row_bags
from scellst_ray.evaluation.simulation.reference import Reference
from scellst_ray.models.mil.bags import BagSet
from scellst_ray.spots.panel import gene_columns

Inputs = Literal["ssl", "one-hot"]
Supervision = Literal["mil", "supervised"]
INPUTS: tuple[Inputs, ...] = ("ssl", "one-hot")
SUPERVISIONS: tuple[Supervision, ...] = ("mil", "supervised")


@dataclass(frozen=True)
class Image:
    """The image cells of the study.

    Attributes:
        embeddings_ND: float32 [N, D], embeddings.
        cluster_N: int64 [N], cluster of each cell.
        info: Source, sizes and, if known, the nucleus types of each cluster.
    """

    embeddings_ND: NDArray[np.float32]
    cluster_N: NDArray[np.int64]
    info: dict[str, Any]


@dataclass(frozen=True)
class SpotPlan:
    """Numbers of spots: num_spots to train (of which val_share validate), and num_spots to test.

    Attributes:
        num_spots: S.
        cells_per_spot: K, drawn with replacement.
        val_share: Share of the training spots that validate.
        seed: Seed of the draw of cells.
    """

    num_spots: int
    cells_per_spot: int
    val_share: float
    seed: int

    def draw(self, parts: Parts) -> dict[str, NDArray[np.int64]]:
        """Return the cells of each spot [S, K], by part: "fit", "val", "test"."""
        num_val = max(1, round(self.val_share * self.num_spots))
        numbers = {"fit": self.num_spots - num_val, "val": num_val, "test": self.num_spots}
        return {
            name: draw_spots(getattr(parts, name), number, self.cells_per_spot, self.seed + turn)
            for turn, (name, number) in enumerate(numbers.items())
        }


@dataclass(frozen=True)
class Case:
    """One scenario with one panel: expression of cells, and the cells of spots.

    Attributes:
        cells: Counts of all image cells.
        parts: Parts of the image cells.
        spots: Cells of each spot [S, K], by part.
    """

    cells: CellCounts
    parts: Parts
    spots: dict[str, NDArray[np.int64]]


def make_case(
    image: Image,
    reference: Reference,
    parts: tuple[Parts, Parts],
    what: tuple[str, list[str]],
    plan: SpotPlan,
) -> Case:
    """Assign expression to the image cells, and build spots.

    Args:
        image: The image cells.
        reference: The reference cells. Type k is matched with cluster k.
        parts: (parts of the image cells, parts of the reference cells).
        what: (scenario, gene panel).
        plan: Numbers of spots.
    """
    scenario, panel = what
    columns = gene_columns(reference.genes, panel, f"reference {reference.source}")
    counts = CellCounts(reference.counts[:, columns].toarray(), reference.library_C)
    cells = expressed_counts(scenario, counts, reference.type_C, image.cluster_N, parts, plan.seed)
    return Case(cells, parts[0], plan.draw(parts[0]))


def run_condition(
    image: Image,
    case: Case,
    inputs: Inputs,
    supervision: Supervision,
    search: Search,
) -> dict[str, Any]:
    """Fit a head and score it on the test cells and spots.

    Args:
        image: The image cells.
        case: Their expression and spots.
        inputs: "ssl" (embeddings) or "one-hot" (clusters, the inputs of a perfect encoder).
        supervision: "mil" (targets are spots) or "supervised" (targets are single training cells).
        search: Settings of the fit and of the search for a learning rate.

    Returns:
        Values for JSON:

        - `pearson_by_gene`: Pearson's r over test cells. None if the gene is constant over the test
          cells; 0 if only the prediction is constant.
        - `pearson`, `pearson_low`, `pearson_high`: mean over genes and its bootstrap interval.
        - `spot_pearson`: mean over genes of Pearson's r over test spots.
        - Learning rate, losses, epochs and seconds of the fit.
    """
    started, started_cpu = time.monotonic(), time.process_time()
    one_hot = inputs == "one-hot"
    matrix, place_N = image.embeddings_ND, np.arange(len(image.cluster_N))
    if one_hot:
        matrix, place_N = np.eye(int(image.cluster_N.max()) + 1, dtype=np.float32), image.cluster_N
    bags = _training_bags(case, supervision, place_N)
    fitted = fit_rows(matrix, place_N[case.parts.fit], bags["fit"], bags["val"], search)
    test = case.parts.test
    predicted_NP = np.zeros_like(case.cells.counts_NP)
    predicted_NP[test] = predict_rows(fitted.head, place_N[test])
    by_gene = score_genes(predicted_NP[test], case.cells.normalise_cells(test))
    cells_SK = case.spots["test"]
    spots_SP = np.stack([predicted_NP[cells].mean(axis=0) for cells in cells_SK])
    by_gene_of_spots = score_genes(spots_SP, case.cells.normalise_spots(cells_SK))
    mean, low, high = bootstrap_mean(by_gene, search.config.seed)
    return {
        "pearson": mean,
        "pearson_low": low,
        "pearson_high": high,
        "spot_pearson": bootstrap_mean(by_gene_of_spots, search.config.seed)[0],
        "num_genes": int(np.isfinite(by_gene).sum()),
        "num_constant_genes": int((~np.isfinite(by_gene)).sum()),
        "pearson_by_gene": [float(r) if np.isfinite(r) else None for r in by_gene],
        "learning_rate": fitted.learning_rate,
        "search_losses": {f"{rate:g}": loss for rate, loss in fitted.search.items()},
        "num_epochs": fitted.num_epochs,
        "validation_loss": fitted.validation_loss,
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - started_cpu,
    }


def _training_bags(
    case: Case, supervision: Supervision, place_N: NDArray[np.int64]
) -> dict[str, BagSet]:
    """Return the bags of parts "fit" and "val"; instances are rows `place_N` of the inputs."""
    bags = {}
    for name in ("fit", "val"):
        if supervision == "mil":
            cells_SK = case.spots[name]
            bags[name] = row_bags(place_N[cells_SK], case.cells.normalise_spots(cells_SK))
        else:
            cells_S = getattr(case.parts, name)
            bags[name] = row_bags(place_N[cells_S, None], case.cells.normalise_cells(cells_S))
    return bags


def score_genes(
    predicted_NP: NDArray[np.float32], true_NP: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return Pearson's r by gene.

    It is NaN where the truth is constant, and 0 where only the prediction is constant.
    """
    by_gene = pearson_by_column(predicted_NP, true_NP)
    varies = true_NP.min(axis=0) < true_NP.max(axis=0)
    by_gene[~np.isfinite(by_gene) & varies] = 0.0
    return by_gene
