"""Distributions of a gene, drawn for each type from the gene's lowest to its highest value.

Within a bin of a histogram, 3 % of its value wide, cells count as evenly spread.

Shape letters: B bins.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from scellst_ray.report.distributions import Distributions
from scellst_ray.report.views import Ridge, Ridges
from scellst_ray.report.words import as_text
from scellst_ray.runs.profiles import bin_edges

# Width and height of a drawing, px, and steps from the lowest to the highest value.
WIDTH, HEIGHT, STEPS = 240, 22, 60


def draw_ridges(found: Distributions | None, colours: Mapping[str, str]) -> list[Ridges]:
    """Return for each gene the outlines of its distributions, one for each type.

    Args:
        found: The distributions; None: no cell has any.
        colours: A colour of each type, '#rrggbb'.
    """
    drawn: list[Ridges] = []
    if found is None:
        return drawn
    whole = {name: counts.whole() for name, counts in found.by_type.items()}
    for number, gene in enumerate(found.genes):
        low, high = float(found.low_G[number]), float(found.high_G[number])
        ridges = []
        for name, counts in found.by_type.items():
            shares, median = shares_of(whole[name][number], low, high)
            middle = as_text(low + median * (high - low))
            about = f"{gene} in {counts.num_cells:,} cells of {name}: median {middle}"
            points, mark = _outline(shares), round(median * WIDTH, 1)
            ridges.append(Ridge(name, colours[name], points, mark, middle, about))
        drawn.append(Ridges(gene, as_text(low), as_text(high), ridges))
    return drawn


def shares_of(
    counts_B: NDArray[np.int64], low: float, high: float
) -> tuple[NDArray[np.float64], float]:
    """Return the share of cells in each step from low to high, and the median, 0 to 1.

    Args:
        counts_B: Histogram with the bins of PROFILES.
        low: Lowest value of all types.
        high: Highest value of all types.
    """
    if high <= low:
        shares = np.zeros(STEPS)
        shares[0] = 1.0
        return shares, 0.0
    scaled = ((bin_edges() - low) / (high - low)).clip(0.0, 1.0)
    reached = np.concatenate([[0.0], np.cumsum(counts_B)]) / max(1, counts_B.sum())
    # Bins beyond the lowest and the highest value hold no cells, or all lie at the end.
    inside = (scaled > 0) & (scaled < 1)
    places, shares = (
        np.concatenate([[0.0], values[inside], [1.0]]) for values in (scaled, reached)
    )
    below = np.interp(np.linspace(0, 1, STEPS + 1), places, shares)
    median = float(np.interp(0.5, reached, scaled))
    return np.diff(below), median


def _outline(shares: NDArray[np.float64]) -> str:
    """Return a smooth outline above the lower side of the drawing, as points of a polygon."""
    kernel = np.array([1.0, 2.0, 3.0, 2.0, 1.0]) / 9
    smooth = np.convolve(shares, kernel, mode="same")
    top = smooth.max()
    height = smooth / top * (HEIGHT - 2) if top > 0 else smooth
    x = (np.arange(STEPS) + 0.5) / STEPS * WIDTH
    points = [(0.0, 0.0), *zip(x.tolist(), height.tolist(), strict=True), (float(WIDTH), 0.0)]
    return " ".join(f"{px:.0f},{HEIGHT - py:.1f}" for px, py in points)
