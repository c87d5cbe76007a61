"""Galleries: crops of the cells that lead a ranking and of those that end it.

Shape letters: N cells, K crops.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core.schemas import STORED_CROP_PX
from scellst_ray.report.cells import SlideCells
from scellst_ray.report.pictures import photograph
from scellst_ray.report.views import Map, Row
from scellst_ray.runs.crop_files import decode_into, index_uri
from scellst_ray.runs.crop_store import CropFile, CropFiles, image_bytes, open_store
from scellst_ray.runs.reading import Run

NUM_SHOWN = 100
# Crops side by side, side of one and of the gap between two, px.
COLUMNS, SIDE_PX, GAP_PX = 20, 48, 2
# Row groups of crops that are read of a slide: its first rows are a random sample of its crops.
MAX_GROUPS = 256
# So many genes and types have galleries, lest a page grows too large.
MAX_GENES, MAX_TYPES = 12, 6


@dataclass(frozen=True)
class Ranking:
    """Cells in an order.

    Attributes:
        name: What ranks them: a gene or a type.
        titles: Titles of the first and of the last cells.
        values_N: Value of each cell of the slide; cells of NaN have no place.
    """

    name: str
    titles: tuple[str, str]
    values_N: NDArray[np.floating]


def rank_genes(cells: SlideCells, genes: list[str]) -> list[Ranking]:
    """Return the ranking of cells by each of the first genes."""
    return [
        Ranking(gene, (f"highest {gene}", f"lowest {gene}"), cells.values_NG[:, number])
        for number, gene in enumerate(genes[:MAX_GENES])
    ]


def rank_types(cells: SlideCells, probability_N: NDArray[np.floating]) -> list[Ranking]:
    """Return the ranking of the cells of each nucleus type by the probability of the type.

    Without probabilities the order is that of the crops, which is random.
    """
    rankings = []
    for code, name in enumerate(cells.types[:MAX_TYPES]):
        of_type_N = cells.codes_N == code
        is_known = bool(np.isfinite(probability_N[of_type_N]).any())
        titles = (f"surest {name}", f"least sure {name}") if is_known else (name, "")
        values_N = probability_N if is_known else np.zeros(len(of_type_N))
        rankings.append(Ranking(name, titles, np.where(of_type_N, values_N, np.nan)))
    return rankings


def galleries_of(
    run: Run, slide_id: str, cells: SlideCells, rankings: list[Ranking], notes: list[str]
) -> list[Row]:
    """Return crops of the first and the last cells of each ranking, among cells that have crops.

    Args:
        run: The run.
        slide_id: The slide.
        cells: Its cells.
        rankings: The rankings.
        notes: A line is added if there are no crops.

    Raises:
        ValueError: the crops cannot be read.
    """
    if not storage.exists(index_uri(run.uri)):
        notes.append(_how_to_keep_crops(run))
        return []
    files = {file.slide_id: file for file in open_store([run.uri]).files}
    file = files.get(slide_id)
    if file is None or not file.num_crops:
        notes.append("The run has no crops of this slide.")
        return []
    groups = range(min(MAX_GROUPS, -(-file.num_crops // file.row_group)))
    reader = CropFiles()
    ids = reader.read(file, list(groups), ["cell_id"])["cell_id"].to_numpy()
    cell_K = np.searchsorted(cells.cell_id_N, ids).clip(max=len(cells.cell_id_N) - 1)
    # Where a crop is of no cell, its value is none.
    is_known_K = cells.cell_id_N[cell_K] == ids
    chosen = []
    for ranking in rankings:
        values_K = np.where(is_known_K, ranking.values_N[cell_K], np.nan)
        places = np.flatnonzero(np.isfinite(values_K))
        chosen.append((len(places), places[np.argsort(-values_K[places], kind="stable")]))
    ends = [np.concatenate([order[:NUM_SHOWN], order[-NUM_SHOWN:]]) for _, order in chosen]
    images = _read_images(reader, file, np.unique(np.concatenate([np.zeros(0, np.int64), *ends])))
    rows = []
    for ranking, (count, order) in zip(rankings, chosen, strict=True):
        parts = zip(ranking.titles, (order[:NUM_SHOWN], order[::-1][:NUM_SHOWN]), strict=True)
        about = f"of {count:,} cells with crops"
        if len(ids) < file.num_crops:
            about += f", drawn from {file.num_crops:,}"
        maps = [
            _sheet([images[crop] for crop in part.tolist()], f"{len(part)} {title}, {about}")
            for title, part in parts
            if title and len(part)
        ]
        rows += [Row(ranking.name, maps)] if maps else []
    return rows


def probabilities_of(run: Run, slide_id: str) -> NDArray[np.float64]:
    """Return the probability of each cell's nucleus type, float64 [N]; NaN where unknown."""
    column = run.cells(slide_id, ["type_prob"])["type_prob"]
    return np.asarray(column.to_numpy(), np.float64)


def _how_to_keep_crops(run: Run) -> str:
    job = "predict" if run.has_expression else "extract"
    return (
        "The run keeps no crops of cells, so there are no galleries. To keep them, run the same "
        f"`scellst-ray {job}` command again with --crops 1000000."
    )


def _read_images(
    reader: CropFiles, file: CropFile, crops: NDArray[np.int64]
) -> dict[int, NDArray[np.uint8]]:
    """Return the coded images of some crops, by number; one row group is in memory at a time."""
    images = {}
    for group in np.unique(crops // file.row_group).tolist():
        start = group * file.row_group
        here = crops[(crops >= start) & (crops < start + file.row_group)].tolist()
        coded = image_bytes(reader.read(file, [group], ["image"])["image"])
        images.update({crop: coded[crop - start].copy() for crop in here})
    return images


def _sheet(images: list[NDArray[np.uint8]], what: str) -> Map:
    """Return crops in rows, from left to right."""
    across, step = min(COLUMNS, len(images)), SIDE_PX + GAP_PX
    down = -(-len(images) // COLUMNS)
    sheet = np.full((down * step - GAP_PX, across * step - GAP_PX, 3), 255, np.uint8)
    crops = np.empty((len(images), STORED_CROP_PX, STORED_CROP_PX, 3), np.uint8)
    decode_into(images, crops)
    for number, crop in enumerate(crops):
        top, left = step * (number // COLUMNS), step * (number % COLUMNS)
        shown = cv2.resize(crop, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
        sheet[top : top + SIDE_PX, left : left + SIDE_PX] = shown
    return Map(photograph(sheet, f"crops of cells: {what}"), what)
