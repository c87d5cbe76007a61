"""Spots measured beside cells predicted, gene by gene.

Shape letters: N cells, S spots, G genes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scellst_ray.report.cells import SlideCells
from scellst_ray.report.maps import Squares, limits_of, mean_map, spot_map
from scellst_ray.report.views import Map, Row
from scellst_ray.report.words import as_text, scale_of
from scellst_ray.spots.links import link_cells
from scellst_ray.spots.panel import log_normalise
from scellst_ray.spots.read import read_spots
from scellst_ray.spots.table import Spots

MEASURED = "log(1 + counts per 10,000)"


def spot_rows(
    cells: SlideCells, squares: Squares, genes: list[str], row: dict[str, Any], unit: str
) -> list[Row]:
    """Return, for each gene that was measured, its spots measured and predicted, and its cells.

    Args:
        cells: The cells, with the expression of the genes.
        squares: Squares over the slide.
        genes: The genes.
        row: The slide's row of the manifest, as `read_spots` takes it.
        unit: Unit of the predictions.

    Raises:
        ValueError: the spots cannot be used, or none of the genes was measured.
        OSError: they cannot be read.
    """
    spots = read_spots(row, cells.mpp)
    place = {gene: i for i, gene in enumerate(spots.genes)}
    shown = [gene for gene in genes if gene in place]
    if not shown:
        message = f"none of {', '.join(genes)} was measured; give measured genes by --genes"
        raise ValueError(message)
    predicted_SG = predict_spots(cells, spots)
    measured_SG = np.asarray(log_normalise(spots.counts)[:, [place[gene] for gene in shown]])
    with_cells_S = np.isfinite(predicted_SG[:, 0])
    rows = []
    for number, gene in enumerate(shown):
        index = genes.index(gene)
        predicted_S, measured_S = predicted_SG[:, index], measured_SG[:, number]
        where = (spots.xy0, spots.radius0)
        what = f"{gene} in {len(spots)} spots"
        left, left_limits = spot_map(*where, measured_S, cells.size0, f"measured {what}")
        middle, middle_limits = spot_map(*where, predicted_S, cells.size0, f"predicted {what}")
        means_RC = squares.means(cells.values_NG[:, index])
        limits = limits_of(means_RC)
        right = mean_map(squares, means_RC, limits, f"predicted {gene} in cells")
        maps = [
            Map(left, "spots, measured", scale_of(left_limits, MEASURED)),
            Map(middle, "spots, mean of their predicted cells", scale_of(middle_limits, unit)),
            Map(right, "cells, predicted", scale_of(limits, unit)),
        ]
        score = _pearson(measured_S[with_cells_S], predicted_S[with_cells_S])
        about = f"Pearson r over {int(with_cells_S.sum()):,} spots with cells: {as_text(score)}"
        rows.append(Row(gene, maps, about))
    return rows


def predict_spots(cells: SlideCells, spots: Spots) -> NDArray[np.float64]:
    """Return the mean prediction of each spot's cells, float64 [S, G]; NaN without cells."""
    links = link_cells(cells.xy0_N2, spots)
    spot_L = np.repeat(np.arange(len(spots)), links.num_cells)
    sums_SG = np.zeros((len(spots), cells.values_NG.shape[1]))
    np.add.at(sums_SG, spot_L, cells.values_NG[links.cell_index])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums_SG / links.num_cells[:, None])


def _pearson(a_S: NDArray[np.floating], b_S: NDArray[np.floating]) -> float:
    """Return Pearson's r; NaN where one of both does not vary."""
    if len(a_S) < 3 or np.ptp(a_S) == 0 or np.ptp(b_S) == 0:
        return float("nan")
    return float(np.corrcoef(a_S, b_S)[0, 1])
