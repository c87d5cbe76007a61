"""Galleries: crops of cells, from those that the run has."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scellst_ray import storage
from scellst_ray.report.cells import SlideCells
from scellst_ray.report.pictures import photograph
from scellst_ray.report.views import Map, Row
from scellst_ray.runs.crop_files import index_uri
from scellst_ray.runs.crop_store import CropFiles, image_bytes, open_store
from scellst_ray.runs.reading import Run

# Row groups read of a slide: its first rows are a random sample of its crops.
NUM_GROUPS = 8
NUM_SHOWN = 12
NO_CROPS = (
    "The run has no crops, so there are no galleries: run `scellst-ray extract` with --crops on it."
)


def galleries_of(
    run: Run, slide_id: str, cells: SlideCells, genes: list[str], notes: list[str]
) -> list[Row]:
    """Return crops of the cells with most and least of each gene; without genes, of each type.

    Args:
        run: The run.
        slide_id: The slide.
        cells: Its cells, with the expression of the genes.
        genes: The genes.
        notes: A line is added if there are no crops.

    Raises:
        ValueError: the crops cannot be read.
    """
    if not storage.exists(index_uri(run.uri)):
        notes.append(NO_CROPS)
        return []
    files = {file.slide_id: file for file in open_store([run.uri]).files}
    file = files.get(slide_id)
    if file is None or not file.num_crops:
        notes.append("The run has no crops of this slide.")
        return []
    groups = list(range(min(NUM_GROUPS, -(-file.num_crops // file.row_group))))
    table = CropFiles().read(file, groups, ["cell_id", "image"])
    ids = table["cell_id"].to_numpy()
    rows_N = np.searchsorted(cells.cell_id_N, ids).clip(max=len(cells.cell_id_N) - 1)
    known = np.flatnonzero(cells.cell_id_N[rows_N] == ids)
    images, rows_N = image_bytes(table["image"]), rows_N[known]
    about = f"of {len(known):,} cells with crops"
    found = []
    for number, gene in enumerate(genes):
        values = cells.values_NG[rows_N, number]
        order = np.argsort(-values, kind="stable")
        parts = {f"highest {gene}": order[:NUM_SHOWN], f"lowest {gene}": order[::-1][:NUM_SHOWN]}
        maps = [_sheet(images, known[part], f"{what}, {about}") for what, part in parts.items()]
        found.append(Row(gene, maps))
    for code, name in enumerate(() if genes else cells.types):
        part = np.flatnonzero(cells.codes_N[rows_N] == code)[:NUM_SHOWN]
        if len(part):
            found.append(Row(name, [_sheet(images, known[part], f"{name}, {about}")]))
    return found


def _sheet(images: list[NDArray[np.uint8]], chosen: NDArray[np.int64], what: str) -> Map:
    """Return crops side by side."""
    crops = [np.asarray(Image.open(io.BytesIO(images[row].tobytes()))) for row in chosen]
    return Map(photograph(np.concatenate(crops, axis=1), f"crops of cells: {what}"), what)
