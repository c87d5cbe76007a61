"""Measured accuracy of each gene, from the file of `evaluate expression`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

OURS = "ours"


def accuracy_of(
    evaluation: Mapping[str, Any], genes: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """Return the scores of genes, means over the slides that were evaluated.

    Args:
        evaluation: Content of the file.
        genes: The genes [G].

    Returns:
        By `<metric>_<level>`, such as `pcc_spots`: scores [G]; NaN where there is none. By
        `num_slides_<level>`: number of slides with a score of the gene [G].

    Raises:
        ValueError: it has no score of any of these genes.
    """
    place = {gene: column for column, gene in enumerate(genes)}
    found: dict[str, list[NDArray[np.float64]]] = {}
    counts: dict[str, NDArray[np.float64]] = {}
    for levels in evaluation["slides"].values():
        for level, part in levels.items():
            by_gene = part.get("by_gene", {})
            has_score_G = np.zeros(len(genes), np.bool_)
            for metric, values in by_gene.get(OURS, {}).items():
                row_G = np.full(len(genes), np.nan)
                for gene, value in zip(by_gene["gene"], values, strict=True):
                    if gene in place and value is not None:
                        row_G[place[gene]] = value
                found.setdefault(f"{metric}_{level}", []).append(row_G)
                has_score_G |= np.isfinite(row_G)
            counts[level] = counts.get(level, np.zeros(len(genes))) + has_score_G
    if not any(np.isfinite(row_G).any() for rows in found.values() for row_G in rows):
        message = (
            f"--evaluation: no score of the exported genes, such as {list(genes[:3])}; give the "
            "file of `scellst-ray evaluate expression` on a run of this head"
        )
        raise ValueError(message)
    return {
        **{name: _mean(np.stack(rows)) for name, rows in found.items()},
        **{f"num_slides_{level}": num_G for level, num_G in counts.items()},
    }


def _mean(values_SG: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over rows [G] of the values that are numbers."""
    is_number = np.isfinite(values_SG)
    counts_G = is_number.sum(axis=0)
    sums_G = np.where(is_number, values_SG, 0).sum(axis=0)
    return np.where(counts_G > 0, sums_G / np.maximum(counts_G, 1), np.nan)
