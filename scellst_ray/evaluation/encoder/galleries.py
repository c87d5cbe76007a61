"""Galleries: pictures of cells and of the cells of other slides with the most similar embeddings.

Shape letters: N cells, D embedding, Q queries, K neighbours, H W C crop.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from scellst_ray.evaluation.encoder.neighbours import Floats, Names, neighbours, unit
from scellst_ray.evaluation.maps import new_figure, save_figure

GAP_PX = 16
RIM_PX = 3
# Blue and orange of Okabe and Ito: colour-blind people can distinguish them, too.
SAME, OTHER, QUERY = (0, 114, 178), (230, 159, 0), (0, 0, 0)
PAPER = 255
SCALE = 2


def choose_queries(types_N: Names, per_type: int, seed: int = 0) -> NDArray[np.intp]:
    """Return up to `per_type` cells of each type, drawn with the seed, sorted by type."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(types_N == name) for name in np.unique(types_N)]
    return np.concatenate([np.sort(rng.permutation(cells)[:per_type]) for cells in members])


def retrieve(
    embeddings_ND: Floats, groups_N: Names, queries_Q: NDArray[np.intp], k: int
) -> NDArray[np.intp]:
    """Return the cells [Q, K] of OTHER slides most similar to each query, the most similar first.

    Similarity is the cosine of embeddings standardised over all cells. K is less than k if fewer
    cells lie on other slides.
    """
    x_ND = unit(StandardScaler().fit_transform(np.asarray(embeddings_ND, np.float32)))
    return neighbours(x_ND[queries_Q], x_ND, k, apart=(groups_N[queries_Q], groups_N))


def mosaic(
    crops_NHWC: NDArray[np.uint8],
    types_N: Names,
    queries_Q: NDArray[np.intp],
    near_QK: NDArray[np.intp],
) -> NDArray[np.uint8]:
    """Return one image with a row per query: the query first, then its neighbours.

    The rim of a query is black. The rim of a neighbour is blue if it has the query's type, else
    orange.

    Returns:
        RGB uint8. Crop (row, column) begins at ((row, column) * (side + GAP_PX) + GAP_PX), where
        side is the side of a crop enlarged SCALE times.
    """
    cells_QM = np.concatenate([queries_Q[:, None], near_QK], axis=1)
    side = crops_NHWC.shape[1] * SCALE
    step = side + GAP_PX
    height, width = (count * step + GAP_PX for count in cells_QM.shape)
    image = np.full((height, width, 3), PAPER, np.uint8)
    for (row, column), cell in np.ndenumerate(cells_QM):
        top, left = row * step + GAP_PX, column * step + GAP_PX
        rim = SAME if types_N[cell] == types_N[cells_QM[row, 0]] else OTHER
        rim = rim if column else QUERY
        image[top - RIM_PX : top + side + RIM_PX, left - RIM_PX : left + side + RIM_PX] = rim
        crop = crops_NHWC[cell].repeat(SCALE, axis=0).repeat(SCALE, axis=1)
        image[top : top + side, left : left + side] = crop
    return image


def gallery(
    path: Path,
    crops_NHWC: NDArray[np.uint8],
    types_N: Names,
    groups_N: Names,
    retrieved: tuple[NDArray[np.intp], NDArray[np.intp]],
    title: str = "",
) -> None:
    """Write a picture of queries and their neighbours, each with its type and slide.

    Args:
        path: PNG to write.
        crops_NHWC: Crops of all cells, uint8.
        types_N: Type name of each cell.
        groups_N: Slide name of each cell.
        retrieved: Queries [Q], and the neighbours of each [Q, K] from `retrieve`.
        title: Title above the picture.
    """
    queries_Q, near_QK = retrieved
    image = mosaic(crops_NHWC, types_N, queries_Q, near_QK)
    height, width = image.shape[:2]
    step = crops_NHWC.shape[1] * SCALE + GAP_PX
    margin = 1.3 * step
    figure = new_figure((width + margin) / 150, (height + 0.6 * step) / 150)
    left, bottom = margin / (width + margin), 0.01
    axis = figure.add_axes((left, bottom, 1 - left, height / (height + 0.6 * step)))
    axis.imshow(image, interpolation="nearest")
    axis.set_axis_off()
    figure.suptitle(title, fontsize=8)
    for row, (query, near_K) in enumerate(zip(queries_Q, near_QK, strict=True)):
        place = (-0.05 * step, (row + 0.5) * step)
        axis.text(*place, f"{types_N[query]}\n{groups_N[query]}", ha="right", va="center", size=6)
        for column, cell in enumerate(near_K, start=1):
            place = (column * step + GAP_PX, row * step + GAP_PX - RIM_PX - 1)
            axis.text(*place, f"{types_N[cell]}, {groups_N[cell]}", va="bottom", size=3.5)
    save_figure(figure, path)
