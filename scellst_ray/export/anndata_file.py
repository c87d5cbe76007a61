"""AnnData files, written in blocks: the expression of a cohort is never in memory as a whole.

The layout is anndata's published one, which anndata from 0.10 on reads. Names of cells have a fixed
length in .h5ad, so that they can be compressed.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import zarr
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.export.anndata import (
    Chosen,
    choose,
    embeddings_of,
    expression_of,
    libraries_of,
    notes_of,
    obs_columns,
    obs_names,
    outline_ids,
    positions_of,
    var_frame,
)
from scellst_ray.export.cell_blocks import in_rows
from scellst_ray.export.hdf5_output import new_hdf5
from scellst_ray.export.local_store import ZARR, publish_store
from scellst_ray.export.pictures import Pictures
from scellst_ray.runs.reading import Run

# Rows and columns of a chunk of X: a gene of a million cells is read without all other genes.
CHUNK = (16_384, 32)
# So many values wait at most until a row of chunks is whole: fewer rows where there are more genes.
MOST_WAITING = 2**24
# So many slides have pictures by default.
MOST_PICTURES = 20
COMPRESSION = {"compression": "gzip", "compression_opts": 4, "shuffle": True}


def write_anndata(
    run: Run,
    out: str,
    slide_ids: Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
    *,
    picture_px: int | None = None,
    outlines: bool = False,
    evaluation: Mapping[str, Any] | None = None,
) -> int:
    """Write cells and expression as AnnData; an existing file or store is replaced.

    Memory holds some 300 bytes a cell for any number of genes or embedding dimensions.

    Args:
        run: The run.
        out: Local path or fsspec URI ending in `.h5ad` or `.zarr`.
        slide_ids: The slides; all that did not fail if None.
        genes: The genes; the whole panel if None.
        picture_px: Longer side of each slide's picture, px; 0 for blank pictures; None:
            1,000 for up to MOST_PICTURES slides, else blank ones. A slide is read only
            where the run keeps no thumbnail of so many px.
        outlines: Whether to add a picture of the outlines, as large as that of the slide, and the
            column `outline_id`. By default pictures then have 1 um per px, and at most 8,000 px.
        evaluation: Content of the file of `evaluate expression`, for `var`; None: without it.

    Returns:
        Number of cells.

    Raises:
        ValueError: `out` has another suffix or is a folder that is no Zarr store, or slides or
            genes cannot be exported (see export.anndata.choose). What was there stays.
    """
    suffix = Path(out.rstrip("/")).suffix
    if suffix not in {".h5ad", ".zarr"}:
        message = f"{out}: unknown suffix {suffix!r}; end the name in .h5ad or .zarr"
        raise ValueError(message)
    chosen = choose(run, slide_ids, genes, evaluation)
    if picture_px is None and len(chosen.slide_ids) > MOST_PICTURES and not outlines:
        picture_px = 0
    pictures = Pictures(run, picture_px, outlines=outlines)
    if suffix == ".h5ad":
        storage.publish(out, lambda path: _write_h5ad(path, chosen, pictures))
    else:
        _publish_zarr(out.rstrip("/"), lambda path: _write_zarr(path, chosen, pictures))
    return len(chosen.cells)


def _write_h5ad(path: Path, chosen: Chosen, pictures: Pictures) -> None:
    with new_hdf5(path) as (file, target):

        def write_names(group: Any, names: list[str]) -> None:  # noqa: ANN401 - of either library
            encoded = [name.encode() for name in names]
            kind = h5py.string_dtype("utf-8", max(map(len, encoded)))
            made = group.create_dataset("_index", data=np.array(encoded, kind), **COMPRESSION)
            _sign(made.attrs, "string-array", "0.2.0")

        def make_matrix(group: Any, name: str, num_columns: int) -> Any:  # noqa: ANN401
            shape = (len(chosen.cells), num_columns)
            how = {"chunks": _chunk(shape), **COMPRESSION} if num_columns else {}
            return group.create_dataset(name, shape, np.float32, **how)

        _write(file, chosen, pictures, write_names, dict(COMPRESSION))
        _fill_all(file, chosen, make_matrix, target.check)


def _write_zarr(path: Path, chosen: Chosen, pictures: Pictures) -> None:
    # Every reader knows Zarr format 2. anndata warns that its default will change.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Writing zarr v2", UserWarning)
        warnings.filterwarnings("ignore", "Consolidated metadata", UserWarning)
        root = zarr.open_group(path, mode="w", zarr_format=2)

        def write_names(group: Any, names: list[str]) -> None:  # noqa: ANN401 - of either library
            ad.io.write_elem(group, "_index", np.array(names, object))

        def make_matrix(group: Any, name: str, num_columns: int) -> Any:  # noqa: ANN401
            shape = (len(chosen.cells), num_columns)
            return group.create_array(name, shape=shape, dtype="f4", chunks=_chunk(shape))

        _write(root, chosen, pictures, write_names, {})
        _fill_all(root, chosen, make_matrix, lambda: None)
        zarr.consolidate_metadata(path, zarr_format=2)


def _write(
    root: Any,  # noqa: ANN401 - a group of h5py or zarr
    chosen: Chosen,
    pictures: Pictures,
    write_names: Callable[[Any, list[str]], None],
    compression: dict[str, Any],
) -> None:
    """Write all but X."""
    _sign(root.attrs, "anndata", "0.1.0")
    obs = root.create_group("obs")
    columns = obs_columns(chosen)
    if pictures.outlines:
        columns["outline_id"] = outline_ids(chosen)
    _sign(obs.attrs, "dataframe", "0.2.0")
    obs.attrs["_index"] = "_index"
    obs.attrs["column-order"] = list(columns)
    for name, values in columns.items():
        ad.io.write_elem(obs, name, values, dataset_kwargs=compression)
    write_names(obs, obs_names(chosen))
    ad.io.write_elem(root, "var", var_frame(chosen))
    ad.io.write_elem(root, "obsm", {"spatial": positions_of(chosen)}, dataset_kwargs=compression)
    # anndata takes the other settings for single values, too, which have none.
    pictured = {key: compression[key] for key in ("compression",) if key in compression}
    ad.io.write_elem(root, "uns", notes_of(chosen) | {"spatial": {}})
    # Slide by slide, since pictures may be large.
    for slide_id, library in libraries_of(chosen, pictures.of):
        ad.io.write_elem(root["uns"]["spatial"], slide_id, library, dataset_kwargs=pictured)
    for name in ("layers", "obsp", "varm", "varp"):
        ad.io.write_elem(root, name, {})


def _sign(attributes: Any, kind: str, version: str) -> None:  # noqa: ANN401 - of either library
    attributes["encoding-type"] = kind
    attributes["encoding-version"] = version


def _chunk(shape: tuple[int, int]) -> tuple[int, int]:
    rows = max(1, min(CHUNK[0], MOST_WAITING // max(1, shape[1])))
    # With fewer rows it has more columns, so that a store does not become a heap of small files.
    columns = CHUNK[0] * CHUNK[1] // rows
    return max(1, min(shape[0], rows)), max(1, min(shape[1], columns))


def _fill_all(
    root: Any,  # noqa: ANN401 - a group of h5py or zarr
    chosen: Chosen,
    make_matrix: Callable[[Any, str, int], Any],
    check: Callable[[], None],
) -> None:
    """Write X, and embeddings of a run without expression, in blocks; `check` may stop it."""
    _fill(make_matrix(root, "X", len(chosen.genes)), expression_of(chosen), check)
    if chosen.with_embeddings and chosen.run.embedding_dim is not None:
        matrix = make_matrix(root["obsm"], "X_embedding", chosen.run.embedding_dim)
        _fill(matrix, embeddings_of(chosen), check)


def _fill(
    matrix: Any,  # noqa: ANN401 - of h5py or zarr
    blocks: Iterator[NDArray[np.float32]],
    check: Callable[[], None],
) -> None:
    """Fill X by whole chunks: a part of a chunk would be compressed again with the next part."""
    _sign(matrix.attrs, "array", "0.2.0")
    if not matrix.shape[1]:
        return
    start = 0
    for block in in_rows(blocks, matrix.chunks[0]):
        check()
        matrix[start : start + len(block)] = block
        start += len(block)


def _publish_zarr(out: str, write: Callable[[Path], None]) -> None:
    """Write a Zarr store under a temporary name, then move it to `out`.

    On object storage a folder cannot be renamed. There the root's metadata is uploaded last, so
    that an incomplete store does not open.
    """
    if storage.is_local(out):
        publish_store(out, ZARR, write)
        return
    if storage.exists(out) and not any(storage.exists(storage.join(out, m)) for m in ZARR.marks):
        message = f"{out}: exists and is no Zarr store; give another name"
        raise ValueError(message)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "new"
        write(store)
        _upload(store, out)


def _upload(store: Path, out: str) -> None:
    """Replace the folder `out` on object storage by a local Zarr store; root metadata last."""
    fs, path = storage.resolve(out)
    storage.remove_tree(out)
    files = [file for file in store.rglob("*") if file.is_file()]
    below, root = [f for f in files if f.parent != store], [f for f in files if f.parent == store]
    for part in (below, root):
        targets = [storage.join(path, file.relative_to(store).as_posix()) for file in part]
        fs.put([str(file) for file in part], targets)
