"""SpatialData stores: picture, outlines and table of slides, in their coordinate systems.

spatialdata itself writes them, element by element, so that memory holds the outlines of one slide
and a few boxes of its picture. X is filled in afterwards, in blocks.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from scellst_ray.core.logs import log_fields
from scellst_ray.export.anndata import Chosen, choose, embeddings_of, expression_of
from scellst_ray.export.cell_blocks import in_rows
from scellst_ray.export.local_store import ZARR, check_store, publish_store
from scellst_ray.export.slide_picture import PICTURE_MPP, PictureError, open_picture
from scellst_ray.export.spatial_elements import (
    element_names,
    outline_element,
    picture_element,
    table_element,
    transformations,
)
from scellst_ray.runs.reading import Run
from scellst_ray.runs.records import known_mpp

logger = logging.getLogger(__name__)
# So many slides have pictures by default.
MOST_PICTURES = 20
# Values of a chunk of X, and its most columns.
CHUNK_VALUES, CHUNK_COLUMNS = 2**19, 32


def write_spatialdata(
    run: Run,
    out: str,
    slide_ids: Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
    *,
    picture_mpp: float | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> int:
    """Write slides as a SpatialData store; an existing store is replaced.

    Args:
        run: The run.
        out: Local path that ends in `.sdata.zarr`.
        slide_ids: The slides; all that did not fail if None. Those without cells are left out.
        genes: The genes; the whole panel if None.
        picture_mpp: um per px of the pictures, rounded to a whole number of level-0 px; 0 for no
            pictures; None: PICTURE_MPP for up to MOST_PICTURES slides, else none.
        evaluation: Content of the file of `evaluate expression`, for `var`; None: without it.

    Returns:
        Number of cells.

    Raises:
        ImportError: spatialdata is not installed.
        ValueError: `out` is remote or no store, or slides or genes cannot be exported (see
            export.anndata.choose). What was there stays.
    """
    check_store(out, ZARR)
    try:
        import spatialdata  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        message = f"{out}: SpatialData needs spatialdata: pip install 'scellst-ray[spatialdata]'"
        raise ImportError(message) from error
    chosen = choose(run, slide_ids, genes, evaluation)
    if picture_mpp is None:
        picture_mpp = PICTURE_MPP if len(chosen.slide_ids) <= MOST_PICTURES else 0
    publish_store(out, ZARR, lambda path: _write(path, chosen, picture_mpp))
    return len(chosen.cells)


def _write(path: Path, chosen: Chosen, picture_mpp: float) -> None:
    import spatialdata  # noqa: PLC0415 - an extra

    with_cells = chosen.cells["slide_id"].unique(maintain_order=True).to_list()
    names = element_names(with_cells)
    _tell_names(names)
    without = [slide_id for slide_id in chosen.slide_ids if slide_id not in names]
    if without:
        text = "%d slide(s) without cells are left out: %s"
        logger.warning(text, len(without), ", ".join(without[:5]))
    with quiet_spatialdata():
        store = spatialdata.SpatialData()
        store.write(path, consolidate_metadata=False)
        for slide_id, prefix in names.items():
            mpp = known_mpp(chosen.run.records[slide_id])
            outlines = outline_element(chosen.run, slide_id, transformations(mpp, prefix))
            _write_element(store, f"{prefix}cells", outlines)
            if picture_mpp:
                _write_picture(store, chosen.run, slide_id, prefix, picture_mpp)
        shapes = {slide_id: f"{prefix}cells" for slide_id, prefix in names.items()}
        _write_element(store, "table", table_element(chosen, shapes))
        _fill_matrices(path / "tables" / "table", chosen)
        store.write_consolidated_metadata()


def _tell_names(names: Mapping[str, str]) -> None:
    for slide_id, prefix in names.items():
        if prefix not in {"", f"{slide_id}_"}:
            text = "slide %s: its elements are named %scells and so on, as SpatialData wants it"
            logger.warning(text, slide_id, prefix, extra=log_fields(slide_id))


def _write_element(store: Any, name: str, element: Any) -> None:  # noqa: ANN401 - of an extra
    """Write an element and forget it."""
    store[name] = element
    try:
        store.write_element(name)
    finally:
        del store[name]


def _write_picture(
    store: Any,  # noqa: ANN401 - of an extra
    run: Run,
    slide_id: str,
    prefix: str,
    picture_mpp: float,
) -> None:
    """Write a slide's picture; without one, say why and leave nothing behind."""
    import dask  # noqa: PLC0415 - of an extra

    name = f"{prefix}he"
    try:
        # One thread: each would hold the pixels of its box.
        with (
            open_picture(run, slide_id, picture_mpp) as levels,
            dask.config.set(scheduler="synchronous"),
        ):
            mpp = levels[0].slide.mpp
            systems = transformations(mpp, prefix, levels[0].ratio)
            _write_element(store, name, picture_element(levels, systems))
    except PictureError as error:
        shutil.rmtree(store.path / "images" / name, ignore_errors=True)
        text = "slide %s is exported without a picture: %s"
        logger.warning(text, slide_id, error, extra=log_fields(slide_id))


def _fill_matrices(table: Path, chosen: Chosen) -> None:
    """Write X of a table, and embeddings of a run without expression, by whole chunks."""
    root = zarr.open_group(table, mode="r+", use_consolidated=False)
    if "X" in root:
        del root["X"]
    _fill(root, "X", (len(chosen.cells), len(chosen.genes)), expression_of(chosen))
    if chosen.with_embeddings and chosen.run.embedding_dim is not None:
        shape = (len(chosen.cells), chosen.run.embedding_dim)
        _fill(root["obsm"], "X_embedding", shape, embeddings_of(chosen))


def _fill(
    group: Any,  # noqa: ANN401 - of zarr
    name: str,
    shape: tuple[int, int],
    blocks: Iterator[NDArray[np.float32]],
) -> None:
    columns = max(1, min(shape[1], CHUNK_COLUMNS))
    rows = max(1, min(shape[0], CHUNK_VALUES // columns))
    matrix = group.create_array(name, shape=shape, dtype="f4", chunks=(rows, columns))
    matrix.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    start = 0
    for block in in_rows(blocks, rows) if shape[1] else ():
        matrix[start : start + len(block)] = block
        start += len(block)


@contextmanager
def quiet_spatialdata() -> Iterator[None]:
    """Keep what spatialdata and its libraries say of healthy stores from the terminal."""
    log = logging.getLogger("spatialdata")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            # anndata tells of a default to come.
            warnings.filterwarnings("ignore", "zarr v3 autosharding", UserWarning)
            yield
    finally:
        log.setLevel(level)
