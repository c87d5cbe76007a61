"""Nearest cells by embedding, and how much slides and types decide which cells these are.

Shape letters: N cells, D embedding, K neighbours.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

NEIGHBOURS = 20
# Similarities are computed for this many cells at a time, to limit memory.
BLOCK = 1024

Floats = NDArray[np.floating]
Names = NDArray[np.str_]


def purity(
    embeddings_ND: Floats, types_N: Names, groups_N: Names, k: int = NEIGHBOURS
) -> dict[str, float]:
    """Return how much slides, and how much types, decide which cells are neighbours.

    The neighbours of a cell are the k cells with the largest cosine of standardised embeddings.
    All types have the same weight.

    Returns:
        Shares, by name:

        - `same_slide`: share of the neighbours that come from the cell's own slide.
        - `same_slide_chance`: this share if neighbours were drawn at random.
        - `same_slide_chance_of_type`: this share if neighbours were drawn from cells of the same
          type, as with an encoder that sees types and no stain. Slides differ in their types.
        - `same_type`: share of the neighbours among cells of OTHER slides that have the cell's
          type.
        - `same_type_chance`: this share if they were drawn at random from other slides.

    Raises:
        ValueError: as `linear_probe`.
    """
    x_ND = unit(StandardScaler().fit_transform(checked(embeddings_ND, types_N, groups_N)))
    cell_N = np.arange(len(x_ND))
    near_NK = neighbours(x_ND, x_ND, k, apart=(cell_N, cell_N))
    far_NK = neighbours(x_ND, x_ND, k, apart=(groups_N, groups_N))
    of_slide_N, of_type_N = (_share_of_own(names_N) for names_N in (groups_N, types_N))
    both_N = _share_of_own(np.char.add(np.char.add(groups_N, "\0"), types_N))
    num = len(x_ND)
    elsewhere_N = num - of_slide_N * num
    per_cell = {
        "same_slide": (groups_N[near_NK] == groups_N[:, None]).mean(axis=1),
        "same_slide_chance": (of_slide_N * num - 1) / (num - 1),
        "same_slide_chance_of_type": (both_N * num - 1) / np.maximum(of_type_N * num - 1, 1),
        "same_type": (types_N[far_NK] == types_N[:, None]).mean(axis=1),
        "same_type_chance": (of_type_N - both_N) * num / elsewhere_N,
    }
    names = np.unique(types_N)
    return {
        key: float(np.mean([value_N[types_N == name].mean() for name in names]))
        for key, value_N in per_cell.items()
    }


def neighbours(
    queries_ND: Floats,
    keys_ND: Floats,
    k: int,
    apart: tuple[NDArray[Any], NDArray[Any]] | None = None,
) -> NDArray[np.intp]:
    """Return the k keys most similar to each query, the most similar first.

    Args:
        queries_ND: Unit vectors.
        keys_ND: Unit vectors.
        k: Number of neighbours. It is lowered to the number that every query has.
        apart: A label per query and a label per key; keys with the query's label are left out.

    Returns:
        Row numbers of keys [N, K].
    """
    k = min(k, len(keys_ND))
    if apart is not None:
        names, counts = np.unique(apart[1], return_counts=True)
        k = min(k, len(keys_ND) - int(counts[np.isin(names, apart[0])].max(initial=0)))
    near_NK = np.empty((len(queries_ND), k), np.intp)
    for start in range(0, len(queries_ND), BLOCK):
        block = slice(start, start + BLOCK)
        similar = queries_ND[block] @ keys_ND.T
        if apart is not None:
            similar[apart[0][block, None] == apart[1]] = -np.inf
        near = np.argpartition(-similar, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(similar, near, axis=1), axis=1, kind="stable")
        near_NK[block] = np.take_along_axis(near, order, axis=1)
    return near_NK


def unit(x_ND: Floats) -> Floats:
    """Return rows scaled to length 1; rows of zeros stay zero."""
    length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return np.asarray(x_ND / np.where(length_N1 > 0, length_N1, 1))


def checked(embeddings_ND: Floats, types_N: Names, groups_N: Names) -> NDArray[np.float32]:
    """Return embeddings as float32, after checking them.

    Raises:
        ValueError: there are fewer than two slides or types, or embeddings are not finite.
    """
    x_ND = np.asarray(embeddings_ND, np.float32)
    message = ""
    if x_ND.ndim != 2 or not len(x_ND) == len(types_N) == len(groups_N):
        message = (
            f"embeddings of shape {x_ND.shape}, {len(types_N)} types and {len(groups_N)} slides; "
            "expected one row, one type and one slide per cell"
        )
    elif len(np.unique(types_N)) < 2 or len(np.unique(groups_N)) < 2:
        message = (
            f"types {sorted(set(types_N.tolist()))} on slides {sorted(set(groups_N.tolist()))}; a "
            "score needs two types, and two slides: one to train on and one to score"
        )
    elif not np.isfinite(x_ND).all():
        message = "embeddings hold NaN or infinity; compute the embeddings again"
    if message:
        raise ValueError(message)
    return x_ND


def _share_of_own(names_N: Names) -> NDArray[np.float64]:
    """Return, for each cell, the share of all cells that have its name."""
    _, number_N, counts = np.unique(names_N, return_inverse=True, return_counts=True)
    return np.asarray(counts[number_N] / len(names_N))
