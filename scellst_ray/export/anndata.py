"""Cells of a run as AnnData, laid out so that scanpy and squidpy plot them without further work.

The table has one row per cell.

- `obs`: cell_id, region, cell_type, area (um2), slide_id, x_um and y_um; type_prob, distance,
  best_type and scores where the run has them.
- `obsm["spatial"]`: (x, y) in level-0 px.
- `uns["spatial"]`: one library per slide, named after it.
- `X`: expression of the chosen genes. A run of `extract` has no genes; its embeddings are in
  `obsm["X_embedding"]`.

export/anndata_file.py writes the same to a file, in blocks.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import polars as pl
from numpy.typing import NDArray

from scellst_ray.core.halves import to_float32
from scellst_ray.core.logs import log_fields
from scellst_ray.core.version import __version__
from scellst_ray.export.accuracy import accuracy_of
from scellst_ray.export.cell_blocks import cell_blocks
from scellst_ray.export.colours import colours_of
from scellst_ray.export.pictures import SlideImages, images_of
from scellst_ray.export.scored import BEST_TYPE, CellScores
from scellst_ray.models.mil.stored_head import vector_matrix
from scellst_ray.runs.reading import Run
from scellst_ray.runs.records import known_mpp
from scellst_ray.runs.thumbnails import Thumbnail

logger = logging.getLogger(__name__)
COLUMNS = ("slide_id", "cell_id", "x0", "y0", "area_um2", "nucleus_type", "type_prob")
EMBEDDINGS_AT_ONCE = 4_096
# What X holds, by the head's loss (FORMAT.md).
UNITS = {
    "mse": "log1p(counts per 10,000), divided by the gene's scale on its training slide",
    "nb": "counts of a spot of size factor 1 in which all cells are like this one",
    "nb_total": "counts of a spot of size factor 1 in which all cells are like this one",
}


@dataclass(frozen=True)
class Chosen:
    """What an export holds.

    Attributes:
        run: The run.
        slide_ids: The slides, in order.
        genes: The genes, in order; none for a run without expression.
        cells: `COLUMNS` of all cells, slide after slide.
        with_embeddings: Whether the run has embeddings and no expression.
        accuracy: Measured scores of the genes, by name, see `accuracy_of`.
    """

    run: Run
    slide_ids: list[str]
    genes: list[str]
    cells: pl.DataFrame
    with_embeddings: bool
    accuracy: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


def choose(
    run: Run,
    slide_ids: Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> Chosen:
    """Choose slides and genes for an export, and read their cells.

    Args:
        run: The run.
        slide_ids: The slides, in this order; all that did not fail if None.
        genes: The genes, in this order; the whole panel if None.
        evaluation: Content of the file of `evaluate expression`; None: without accuracy.

    Raises:
        ValueError: a slide or gene is unknown, a slide failed, genes are named but the run has no
            expression, there are no cells, or the evaluation is of other genes.
    """
    chosen = run.choose(slide_ids)
    cells = run.cells_frame(chosen, COLUMNS)
    if cells.is_empty():
        message = f"{run.uri}: slides {chosen[:5]} have no cells; choose slides with cells"
        raise ValueError(message)
    for slide_id in chosen:
        if run.records[slide_id]["status"] == "partial":
            text = "slide %s is partial: the export has no cells of its failed tiles"
            logger.warning(text, slide_id, extra=log_fields(slide_id))
    wants_genes = genes is not None or run.has_expression
    names = run.choose_genes(genes) if wants_genes else []
    with_embeddings = not wants_genes and run.embedding_dim is not None
    accuracy = {} if evaluation is None else accuracy_of(evaluation, names)
    return Chosen(run, chosen, names, cells, with_embeddings, accuracy)


def to_anndata(
    run: Run,
    slide_ids: Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
    *,
    thumbnails: Mapping[str, Thumbnail] | None = None,
) -> ad.AnnData:
    """Return cells and expression as AnnData, in memory: 4 bytes per cell and gene.

    Args:
        run: The run.
        slide_ids: The slides, in this order; all that did not fail if None.
        genes: The genes, in this order; the whole panel if None.
        thumbnails: Pictures by slide_id (see export.pictures). Slides without one get a white one.

    Raises:
        ValueError: see `choose`.
    """
    chosen = choose(run, slide_ids, genes)
    adata = ad.AnnData(
        X=np.concatenate(list(expression_of(chosen))),
        obs=pd.DataFrame(obs_columns(chosen), index=pd.Index(obs_names(chosen), dtype=object)),
        var=var_frame(chosen),
    )
    adata.obsm["spatial"] = positions_of(chosen)
    if chosen.with_embeddings:
        adata.obsm["X_embedding"] = np.concatenate(list(embeddings_of(chosen)))
    given = thumbnails or {}
    libraries = dict(libraries_of(chosen, lambda s: images_of(run.records[s], given.get(s))))
    adata.uns.update({"spatial": libraries} | notes_of(chosen))
    return adata


def obs_names(chosen: Chosen) -> list[str]:
    """Return the name of each cell, unique in the export: slide_id, '_' and cell_id."""
    names = chosen.cells.select(pl.format("{}_{}", "slide_id", "cell_id"))
    return names.to_series().to_list()


def obs_columns(chosen: Chosen) -> dict[str, NDArray[Any] | pd.Categorical]:
    """Return the columns of `obs`, under the names that scanpy and squidpy use."""
    cells = chosen.cells
    # Categories are in the order of the slides, not of the alphabet.
    slides = _categorical(cells["slide_id"], cells["slide_id"].unique(maintain_order=True))
    types = cells["nucleus_type"].unique().sort()
    columns: dict[str, NDArray[Any] | pd.Categorical] = {
        "cell_id": cells["cell_id"].to_numpy(),
        # Name of the library in uns["spatial"], for squidpy's library_key.
        "region": slides,
        "cell_type": _categorical(cells["nucleus_type"], types),
        "area": cells["area_um2"].to_numpy(),
        "slide_id": slides,
    }
    mpp = {slide_id: known_mpp(chosen.run.records[slide_id]) for slide_id in slides.categories}
    mpp_N = np.asarray([mpp[name] for name in slides.categories])[slides.codes]
    for name, column in (("x_um", "x0"), ("y_um", "y0")):
        columns[name] = (cells[column].to_numpy() * mpp_N).astype(np.float32)
    if cells["type_prob"].null_count() < len(cells):
        columns["type_prob"] = cells["type_prob"].fill_null(np.nan).to_numpy()
    distance = _distance(chosen) if chosen.genes else None
    if distance is not None:
        columns["distance"] = distance
    return columns | _score_columns(chosen)


def _score_columns(chosen: Chosen) -> dict[str, NDArray[Any] | pd.Categorical]:
    """Return the best type and the scores of all cells; none if no slide has them."""
    scores = CellScores(chosen.run)
    parts: list[pl.DataFrame] = []
    has_any = False
    for (slide_id,), part in chosen.cells.group_by("slide_id", maintain_order=True):
        table = scores.of(str(slide_id)) if scores.columns else None
        has_any |= table is not None
        if table is None:
            columns = {BEST_TYPE: pl.String} | dict.fromkeys(scores.columns, pl.Float32)
            table = pl.DataFrame(schema=columns).clear(len(part)).to_arrow()
        parts.append(pl.DataFrame(table))
    if not has_any:
        return {}
    every = pl.concat(parts)
    best = every[BEST_TYPE]
    columns = {BEST_TYPE: _categorical(best, best.drop_nulls().unique().sort())}
    return columns | {name: every[name].fill_null(np.nan).to_numpy() for name in scores.columns}


def _categorical(values: pl.Series, categories: pl.Series) -> pd.Categorical:
    codes = values.cast(pl.Enum(categories)).to_physical().cast(pl.Int32).fill_null(-1).to_numpy()
    return pd.Categorical.from_codes(codes, categories.to_list())


def _distance(chosen: Chosen) -> NDArray[np.float32] | None:
    """Return `distance` of all cells; None if a table of an earlier release has none."""
    parts = []
    for slide_id in chosen.slide_ids:
        with chosen.run.open_table(slide_id, "EXPRESSION") as file:
            if file is not None and "distance" not in file.schema_arrow.names:
                return None
            if file is not None:
                parts.append(file.read(["distance"])["distance"].to_numpy())
    return np.concatenate(parts).astype(np.float32)


def var_frame(chosen: Chosen) -> pd.DataFrame:
    """Return `var`: a row for each gene, with its Ensembl id and measured accuracy if known."""
    columns: dict[str, Any] = dict(chosen.accuracy)
    stated = chosen.run.last_layer.info.get("gene_ids") if chosen.genes else None
    panel = chosen.run.last_layer.genes if stated else []
    if isinstance(stated, list) and len(stated) == len(panel) and any(stated):
        known = dict(zip(panel, stated, strict=True))
        columns = {"gene_ids": [str(known[gene] or "") for gene in chosen.genes]} | columns
    return pd.DataFrame(columns, index=pd.Index(chosen.genes, dtype=object))


def positions_of(chosen: Chosen) -> NDArray[np.float64]:
    """Return (x, y) of all cells, float64 [N, 2], level-0 px."""
    return chosen.cells.select("x0", "y0").to_numpy().astype(np.float64)


def embeddings_of(chosen: Chosen) -> Iterator[NDArray[np.float32]]:
    """Yield embeddings [N, D] of all cells in their order, block by block."""
    for slide_id in chosen.slide_ids:
        for block in cell_blocks(chosen.run, slide_id, ["cell_id", "embedding"]):
            vectors = vector_matrix(block.cells["embedding"])
            for start in range(0, len(vectors), EMBEDDINGS_AT_ONCE):
                yield to_float32(vectors[start : start + EMBEDDINGS_AT_ONCE])


def expression_of(chosen: Chosen) -> Iterator[NDArray[np.float32]]:
    """Yield expression [N, G] of all cells in their order, block by block; [N, 0] without genes.

    Raises:
        ValueError: CELLS and EXPRESSION of a slide have different cells.
    """
    start, ids_N = 0, chosen.cells["cell_id"].to_numpy()
    for slide_id in chosen.slide_ids:
        for block in cell_blocks(chosen.run, slide_id, ["cell_id"], chosen.genes):
            end = start + len(block.cells)
            if not np.array_equal(block.cells["cell_id"].to_numpy(), ids_N[start:end]):
                message = f"{chosen.run.uri}: CELLS of slide {slide_id!r} changed while it was read"
                raise ValueError(message)
            yield block.values_NG
            start = end


def outline_ids(chosen: Chosen) -> NDArray[np.int32]:
    """Return the number of each cell in the image of outlines of its slide, from 1."""
    numbers = pl.int_range(1, pl.len() + 1, dtype=pl.Int32).over("slide_id")
    return chosen.cells.select(numbers).to_series().to_numpy()


def libraries_of(
    chosen: Chosen, images_of_slide: Callable[[str], SlideImages]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the slide_id and the entry in `uns["spatial"]` of each slide with cells."""
    for (slide_id,), part in chosen.cells.group_by("slide_id", maintain_order=True):
        name = str(slide_id)
        yield name, _library(chosen.run, name, part, images_of_slide(name))


def notes_of(chosen: Chosen) -> dict[str, Any]:
    """Return the part of `uns` that says what the numbers are of, and the colours of types."""
    run = chosen.run
    source = {"version": __version__, "run_digest": run.folder.digest}
    units = {"area_unit": "um2", "spatial_unit": "level-0 px"}
    if chosen.genes:
        units["X_unit"] = UNITS[run.last_layer.formula.loss]
    types = chosen.cells["nucleus_type"].unique().sort().to_list()
    colours = list(colours_of(types).values())
    return {"scellst_ray": source | units, "cell_type_colors": np.array(colours, object)}


def _library(run: Run, slide_id: str, cells: pl.DataFrame, images: SlideImages) -> dict[str, Any]:
    """Return a slide's entry in `uns["spatial"]`."""
    record = run.records[slide_id]
    labels = {} if images.labels is None else {"segmentation": images.labels}
    diameter_um = 2 * np.sqrt(cells["area_um2"].to_numpy() / np.pi)
    return {
        "images": {"hires": images.picture.image} | labels,
        "scalefactors": {
            "tissue_hires_scalef": 1 / images.picture.ratio,
            "spot_diameter_fullres": float(diameter_um.mean() / known_mpp(record)),
        },
        "metadata": {
            "source_image_path": str(run.sources[slide_id]["uri"]),
            "mpp": known_mpp(record),
            "picture": "blank" if images.is_blank else "slide",
        },
    }
