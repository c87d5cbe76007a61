"""Export to AnnData, laid out so that scanpy and squidpy plot it without further work.

The table has one row per cell.

- `obs`: cell_id, region, cell_type, area (um2), slide_id.
- `obsm["spatial"]`: (x, y) in level-0 px.
- `uns["spatial"]`: one library per slide, named after it.
- `X`: expression of the chosen genes. A run of `extract` has no genes; its embeddings are in
  `obsm["X_embedding"]`.
"""

import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import polars as pl
import zarr
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core.logs import log_fields
from scellst_ray.core.version import __version__
from scellst_ray.runs.reading import Run
from scellst_ray.runs.records import known_mpp, known_size0
from scellst_ray.slides.source import ChangedFileError, open_slide

logger = logging.getLogger(__name__)
THUMBNAIL_PX = 2000
BLANK_PX = 500
COLUMNS = ("slide_id", "cell_id", "x0", "y0", "area_um2", "nucleus_type")
# Colours of PanNuke's classes in the figures of its paper. Other types take the next spare colour.
COLORS = {
    "neoplastic": "#ff0000",
    "inflammatory": "#22dd4d",
    "connective": "#235cec",
    "dead": "#feff00",
    "epithelial": "#ff9f44",
}
SPARE_COLORS = ("#1f77b4", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f")


class Thumbnail(NamedTuple):
    """A picture of a whole slide.

    Attributes:
        image: RGB uint8 [H, W, 3].
        ratio: Level-0 px per px of the image.
    """

    image: NDArray[np.uint8]
    ratio: float


def read_thumbnail(run: Run, slide_id: str, longest_px: int = THUMBNAIL_PX) -> Thumbnail | None:
    """Read a slide's picture; return None and log a warning if the slide's file is gone.

    The same if the file is another one than that in which the run found the cells.

    Args:
        run: The run, which knows the slide's URI and resolution.
        slide_id: The slide.
        longest_px: Length of the picture's longer side, px.
    """
    record, uri = run.records[slide_id], run.sources[slide_id]["uri"]
    try:
        opened = open_slide(uri, record["mpp"], recorded=record.get("source"))
    except (FileNotFoundError, ChangedFileError) as error:
        what = "is another file now" if isinstance(error, ChangedFileError) else "is gone"
        text = "slide %s: %s %s; it is exported with a blank picture"
        logger.warning(text, slide_id, uri, what, extra=log_fields(slide_id))
        return None
    with opened:
        slide = opened.slide
        longest0 = max(slide.width0, slide.height0)
        image, _ = slide.overview(slide.mpp * max(1.0, longest0 / longest_px))
    return Thumbnail(image, longest0 / max(image.shape[:2]))


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
        thumbnails: Pictures by slide_id (see read_thumbnail). Slides without one get a white one.

    Raises:
        ValueError: a slide or gene is unknown, a slide failed, genes are named but the run has no
            expression, or there are no cells.
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
    adata = ad.AnnData(
        X=_expression(run, chosen, names, cells),
        obs=_obs(cells),
        var=pd.DataFrame(index=pd.Index(names, dtype=object)),
    )
    adata.obsm["spatial"] = cells.select("x0", "y0").to_numpy().astype(np.float64)
    if not wants_genes and run.embedding_dim is not None:
        parts = [run.embeddings(slide_id).astype(np.float32) for slide_id in chosen]
        adata.obsm["X_embedding"] = np.concatenate(parts)
    adata.uns |= _uns(run, cells, thumbnails or {})
    adata.uns["cell_type_colors"] = _colors(list(adata.obs["cell_type"].cat.categories))
    return adata


def write_anndata(
    run: Run,
    out: str,
    slide_ids: Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
    *,
    thumbnail_px: int | None = THUMBNAIL_PX,
) -> ad.AnnData:
    """Write cells and expression as AnnData; an existing file or store is replaced.

    Args:
        run: The run.
        out: Local path or fsspec URI ending in `.h5ad` or `.zarr`.
        slide_ids: The slides; all that did not fail if None.
        genes: The genes; the whole panel if None.
        thumbnail_px: Longer side of each slide's picture, px; None for blank pictures. A slide on
            object storage is downloaded to make its picture.

    Returns:
        The table that was written.

    Raises:
        ValueError: `out` has another suffix or is a folder that is no Zarr store, or to_anndata
            refuses slides or genes.
    """
    suffix = Path(out.rstrip("/")).suffix
    if suffix not in {".h5ad", ".zarr"}:
        message = f"{out}: unknown suffix {suffix!r}; end the name in .h5ad or .zarr"
        raise ValueError(message)
    chosen = run.choose(slide_ids)
    pictures: dict[str, Thumbnail] = {}
    for slide_id in chosen if thumbnail_px is not None else ():
        if run.records[slide_id].get("num_cells"):
            picture = read_thumbnail(run, slide_id, thumbnail_px or THUMBNAIL_PX)
            pictures |= {} if picture is None else {slide_id: picture}
    adata = to_anndata(run, chosen, genes, thumbnails=pictures)
    if suffix == ".h5ad":
        storage.publish(out, adata.write_h5ad)
    else:
        _publish_zarr(out.rstrip("/"), adata)
    return adata


def _expression(
    run: Run, slide_ids: Sequence[str], genes: list[str], cells: pl.DataFrame
) -> NDArray[np.float32]:
    """Return expression [N, G] of all cells, filled block by block; [N, 0] without genes."""
    values_NG = np.zeros((len(cells), len(genes)), np.float32)
    if not genes:
        return values_NG
    ids_N = cells["cell_id"].to_numpy()
    start = 0
    for slide_id in slide_ids:
        for ids, block in run.iter_expression(genes, slide_id):
            rows = slice(start, start + len(block))
            if not np.array_equal(ids["cell_id"].to_numpy(), ids_N[rows]):
                message = (
                    f"{run.uri}: CELLS and EXPRESSION of slide {slide_id!r} have different cells. "
                    "The slide is being written, or files were exchanged: export when the run has "
                    "ended"
                )
                raise ValueError(message)
            values_NG[rows] = block
            start += len(block)
    return values_NG


def _obs(cells: pl.DataFrame) -> pd.DataFrame:
    """Return `obs`: the columns of the cells, under the names that scanpy and squidpy use."""
    # Categories are in the order of the slides, not of the alphabet.
    names = cells["slide_id"].unique(maintain_order=True).to_list()
    slide_id = pd.Categorical(cells["slide_id"].to_list(), categories=names)
    index = cells.select(pl.format("{}_{}", "slide_id", "cell_id"))
    return pd.DataFrame(
        {
            "cell_id": cells["cell_id"].to_numpy(),
            # Name of the library in uns["spatial"], for squidpy's library_key.
            "region": slide_id,
            "cell_type": pd.Categorical(cells["nucleus_type"].to_list()),
            "area": cells["area_um2"].to_numpy(),
            "slide_id": slide_id,
        },
        index=pd.Index(index.to_series().to_list(), dtype=object),
    )


def _uns(run: Run, cells: pl.DataFrame, thumbnails: Mapping[str, Thumbnail]) -> dict[str, Any]:
    """Return `uns`: one spatial library per slide, and the release and run of the data."""
    libraries = {
        str(slide_id): _library(run, str(slide_id), part, thumbnails.get(str(slide_id)))
        for (slide_id,), part in cells.group_by("slide_id", maintain_order=True)
    }
    source = {"version": __version__, "run_digest": run.folder.digest}
    units = {"area_unit": "um2", "spatial_unit": "level-0 px"}
    return {"spatial": libraries, "scellst_ray": source | units}


def _library(
    run: Run, slide_id: str, cells: pl.DataFrame, thumbnail: Thumbnail | None
) -> dict[str, Any]:
    """Return a slide's entry in `uns["spatial"]`."""
    record = run.records[slide_id]
    picture = thumbnail or _blank(*known_size0(record))
    diameter_um = 2 * np.sqrt(cells["area_um2"].to_numpy() / np.pi)
    return {
        "images": {"hires": picture.image},
        "scalefactors": {
            "tissue_hires_scalef": 1 / picture.ratio,
            "spot_diameter_fullres": float(diameter_um.mean() / known_mpp(record)),
        },
        "metadata": {
            "source_image_path": str(run.sources[slide_id]["uri"]),
            "mpp": known_mpp(record),
            "picture": "slide" if thumbnail else "blank",
        },
    }


def _blank(width0: int, height0: int) -> Thumbnail:
    """Return a white picture of a slide. Without a picture, scanpy and squidpy do not plot."""
    ratio = max(width0, height0) / BLANK_PX
    shape = (max(1, round(height0 / ratio)), max(1, round(width0 / ratio)), 3)
    return Thumbnail(np.full(shape, 255, np.uint8), ratio)


def _colors(categories: list[str]) -> list[str]:
    """Return a colour for each cell type, in the order of the categories."""
    others = [name for name in categories if name.lower() not in COLORS]
    spare = {name: SPARE_COLORS[i % len(SPARE_COLORS)] for i, name in enumerate(others)}
    return [COLORS.get(name.lower()) or spare[name] for name in categories]


def _publish_zarr(out: str, adata: ad.AnnData) -> None:
    """Write a Zarr store under a temporary name, then move it to `out`.

    On object storage a folder cannot be renamed. There the root's metadata is uploaded last, so
    that an incomplete store does not open.
    """
    marks = ("zarr.json", ".zgroup")
    if storage.exists(out) and not any(storage.exists(storage.join(out, m)) for m in marks):
        message = f"{out}: exists and is no Zarr store; give another name"
        raise ValueError(message)
    path = Path(storage.resolve(out)[1])
    local = storage.is_local(out)
    if local:
        path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent if local else None))
    try:
        store = folder / "new"
        # Every reader knows Zarr format 2. anndata warns that its default will change.
        with ad.settings.override(zarr_write_format=2), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Writing zarr v2", UserWarning)
            adata.write_zarr(store)
        _remove_nulls(store)
        if not local:
            _upload(store, out)
            return
        if path.exists():
            path.rename(folder / "old")
        store.rename(path)
    finally:
        shutil.rmtree(folder)


def _remove_nulls(store: Path) -> None:
    """Remove elements that are absent: anndata before 0.12 cannot read their encoding "null"."""
    group = zarr.open_group(store, mode="r+", zarr_format=2)
    absent = [name for name, part in group.members() if part.attrs.get("encoding-type") == "null"]
    for name in absent:
        del group[name]
    if absent:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Consolidated metadata", UserWarning)
            zarr.consolidate_metadata(store, zarr_format=2)


def _upload(store: Path, out: str) -> None:
    """Replace the folder `out` on object storage by a local Zarr store; root metadata last."""
    fs, path = storage.resolve(out)
    storage.remove_tree(out)
    files = [file for file in store.rglob("*") if file.is_file()]
    below, root = [f for f in files if f.parent != store], [f for f in files if f.parent == store]
    for part in (below, root):
        targets = [storage.join(path, file.relative_to(store).as_posix()) for file in part]
        fs.put([str(file) for file in part], targets)
