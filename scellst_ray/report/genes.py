"""The genes that a report shows if none are asked for: those that vary most over all cells."""

import numpy as np
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.runs.reading import Run

NUM_GENES = 6
# Slides that are looked at, evenly spread over the cohort; and fewer of them cell by cell.
NUM_SLIDES, NUM_READ = 50, 3


def choose_shown_genes(run: Run, genes: list[str] | None) -> tuple[list[str], str]:
    """Return the genes to show, and how they were chosen, in words.

    Args:
        run: The run.
        genes: The genes that are asked for; None: the most variable.

    Raises:
        ValueError: a gene is not in the panel, or genes are asked of a run without expression.
    """
    if genes is not None:
        return run.choose_genes(genes), "chosen by --genes"
    if not run.has_expression:
        return [], "the run has no expression"
    totals, source = _from_profiles(run), "PROFILES"
    if totals is None:
        totals, source = _from_cells(run), "cells"
    if totals is None:
        return run.genes[:NUM_GENES], "the first of the panel"
    mean_G, var_G, num_slides = totals
    # Counts vary more where they are high; so a gene's variance is taken by its mean.
    spread_G = var_G / np.maximum(mean_G, 1e-6)
    order = np.argsort(-spread_G, kind="stable")[:NUM_GENES]
    about = f"those whose variance by mean is highest, from the {source} of {num_slides:,} slide(s)"
    return [run.genes[i] for i in order], about


Totals = tuple[NDArray[np.float64], NDArray[np.float64], int]


def _spread(names: list[str], at_most: int) -> list[str]:
    """Return some names, evenly spread."""
    if len(names) <= at_most:
        return names
    places = np.linspace(0, len(names) - 1, at_most).round().astype(int)
    return [names[place] for place in places]


def _pooled(parts: list[tuple[int, NDArray[np.float64], NDArray[np.float64]]]) -> Totals | None:
    """Return mean and variance over the cells of several slides, from n, mean and sd of each."""
    if not parts:
        return None
    n_P = np.array([n for n, _, _ in parts], float)[:, None]
    mean_PG, sd_PG = (np.stack([part[i] for part in parts]) for i in (1, 2))
    mean_G = (n_P * mean_PG).sum(axis=0) / n_P.sum()
    var_G = (n_P * (sd_PG**2 + (mean_PG - mean_G) ** 2)).sum(axis=0) / n_P.sum()
    return mean_G, var_G, len(parts)


def _from_profiles(run: Run) -> Totals | None:
    names = [s for s, r in sorted(run.records.items()) if "PROFILES" in r.get("files", {})]
    place = {gene: i for i, gene in enumerate(run.genes)}
    parts = []
    for slide_id in _spread(names, NUM_SLIDES):
        try:
            frame = run.profiles([slide_id])
        except (storage.DamagedFileError, FileNotFoundError):
            continue  # the slide's own page says so
        whole = frame.filter(frame["nucleus_type"].is_null())
        order = np.array([place[gene] for gene in whole["gene"]], np.int64)
        if len(order) == len(place):
            mean_G, sd_G = np.zeros(len(place)), np.zeros(len(place))
            mean_G[order], sd_G[order] = whole["mean"].to_numpy(), whole["sd"].to_numpy()
            parts.append((int(whole["n"][0]), mean_G, sd_G))
    return _pooled(parts)


def _from_cells(run: Run) -> Totals | None:
    """Return the totals of the first block of cells of a few slides."""
    names = [s for s, r in sorted(run.records.items()) if "EXPRESSION" in r.get("tables", [])]
    parts = []
    for slide_id in _spread(names, NUM_READ):
        try:
            _, values_NG = next(run.iter_expression(None, slide_id))
        except (storage.DamagedFileError, FileNotFoundError, StopIteration):
            continue  # the slide's own page says so
        moments = values_NG.mean(axis=0, dtype=float), values_NG.std(axis=0, dtype=float)
        parts.append((len(values_NG), *moments))
    return _pooled(parts)
