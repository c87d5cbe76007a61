"""Folders for Xenium Explorer, written by sopa: a slide's picture, outlines, types and genes.

Xenium Explorer counts transcripts, so expression is multiplied and rounded to whole numbers. It
numbers cells from 0; `cell_ids.csv` says which cell of the run each one is.
"""

import csv
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scellst_ray.core.logs import log_fields
from scellst_ray.export.anndata import Chosen, choose, expression_of
from scellst_ray.export.local_store import EXPLORER, check_store, publish_store
from scellst_ray.export.pictures import blank_picture
from scellst_ray.export.slide_picture import PICTURE_MPP, PictureError, open_picture
from scellst_ray.export.spatial_elements import (
    INSTANCE,
    REGION,
    outline_element,
    picture_element,
    transformations,
)
from scellst_ray.runs.reading import Run
from scellst_ray.runs.records import known_mpp, known_size0

logger = logging.getLogger(__name__)
# Whole numbers that stand for an expression of 1.
PER_UNIT = 100
# Levels of a picture that Xenium Explorer wants.
NUM_LEVELS = 6
# A picture above this is read box by box, and three times: once per channel.
MOST_IN_MEMORY_GB = 1
CELL_IDS = "cell_ids.csv"


def write_explorer(
    run: Run,
    out: str,
    slide_id: str,
    genes: Sequence[str] | None = None,
    *,
    picture_mpp: float | None = None,
) -> int:
    """Write a slide as a folder that Xenium Explorer opens; an existing one is replaced.

    Memory holds the outlines, and 8 bytes for each value of expression of at least 0.005.

    Args:
        run: The run.
        out: Local path that ends in `.explorer`.
        slide_id: The slide.
        genes: The genes; the whole panel if None.
        picture_mpp: um per px of the picture, rounded to a whole number of level-0 px; PICTURE_MPP
            if None; 0 for a white one: Xenium Explorer opens nothing without a picture.

    Returns:
        Number of cells.

    Raises:
        ImportError: sopa is not installed.
        ValueError: `out` is remote or something else, or the slide or genes cannot be exported
            (see export.anndata.choose). What was there stays.
    """
    check_store(out, EXPLORER)
    try:
        import spatialdata  # noqa: F401, PLC0415 - an extra
        from sopa.io import explorer  # noqa: PLC0415 - an extra
    except ImportError as error:
        message = f"{out}: Xenium Explorer needs sopa: pip install 'scellst-ray[explorer]'"
        raise ImportError(message) from error
    chosen = choose(run, [slide_id], genes)
    mpp = PICTURE_MPP if picture_mpp is None else picture_mpp

    def write(path: Path) -> None:
        with quiet_sopa():
            _write(path, chosen, mpp, explorer)

    publish_store(out, EXPLORER, write)
    return len(chosen.cells)


def _write(path: Path, chosen: Chosen, picture_mpp: float, explorer: Any) -> None:  # noqa: ANN401
    (slide_id,) = chosen.slide_ids
    ids = [explorer.str_cell_id(number) for number in range(len(chosen.cells))]
    table = _table(chosen, ids)
    outlines = outline_element(
        chosen.run, slide_id, transformations(known_mpp(chosen.run.records[slide_id]), "")
    )
    outlines.index = pd.Index(ids, name=INSTANCE)

    def write(picture: Any, um_per_px: float) -> None:  # noqa: ANN401 - of an extra
        import spatialdata  # noqa: PLC0415 - an extra

        elements = {"he": picture, "cells": outlines, "table": table}
        explorer.write(
            str(path),
            spatialdata.SpatialData.init_from_elements(elements),
            image_key="he",
            shapes_key="cells",
            pixel_size=um_per_px,
            layer="per_unit",
            ram_threshold_gb=MOST_IN_MEMORY_GB,
            mode="-m",
        )
        # sopa 2.2.11 itself would write 0.2125 um per px here, whatever the picture has.
        explorer.write_metadata(
            str(path),
            run_name=slide_id,
            region_name="cells",
            n_obs=len(table),
            pixel_size=um_per_px,
        )

    if picture_mpp:
        try:
            with (
                open_picture(chosen.run, slide_id, picture_mpp, NUM_LEVELS) as levels,
                _one_thread(),
            ):
                ratio, mpp = levels[0].ratio, levels[0].slide.mpp
                write(picture_element(levels, transformations(mpp, "", ratio)), ratio * mpp)
        except PictureError as error:
            text = "slide %s is exported with a blank picture: %s"
            logger.warning(text, slide_id, error, extra=log_fields(slide_id))
            picture_mpp = 0
    if not picture_mpp:
        write(*_blank(chosen.run, slide_id))
    with (path / CELL_IDS).open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["explorer_id", "cell_id"])
        rows.writerows(zip(ids, chosen.cells["cell_id"].to_list(), strict=True))


def _table(chosen: Chosen, ids: Sequence[str]) -> ad.AnnData:
    """Return types and expression, multiplied and rounded, under the ids of Xenium Explorer."""
    from spatialdata.models import TableModel  # noqa: PLC0415 - an extra

    types = pd.Categorical(chosen.cells["nucleus_type"].to_list())
    # The other columns are the same for all cells or no categories, which Xenium Explorer colours.
    obs = pd.DataFrame({"cell_type": types, INSTANCE: list(ids)}, index=list(ids))
    obs[REGION] = pd.Categorical(["cells"] * len(obs))
    table = ad.AnnData(obs=obs, var=pd.DataFrame(index=pd.Index(chosen.genes, dtype=object)))
    blocks = [
        sp.csr_matrix(np.rint(block * PER_UNIT).astype(np.uint32))
        for block in expression_of(chosen)
    ]
    table.layers["per_unit"] = sp.vstack(blocks, format="csr")
    return TableModel.parse(table, region="cells", region_key=REGION, instance_key=INSTANCE)


def _blank(run: Run, slide_id: str) -> tuple[Any, float]:
    """Return a white picture of a slide, and its um per px."""
    from spatialdata.models import Image2DModel  # noqa: PLC0415 - an extra

    record = run.records[slide_id]
    blank = blank_picture(*known_size0(record))
    mpp = known_mpp(record)
    # Halved five times, it still has a px.
    image = np.pad(blank.image, ((0, 32), (0, 32), (0, 0)), constant_values=255)
    picture = Image2DModel.parse(
        image.transpose(2, 0, 1),
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        transformations=transformations(mpp, "", blank.ratio),
    )
    return picture, blank.ratio * mpp


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let dask compute in this thread: each thread would hold the pixels of its box."""
    import dask  # noqa: PLC0415 - of an extra

    with dask.config.set(scheduler="synchronous"):
        yield


@contextmanager
def quiet_sopa() -> Iterator[None]:
    """Keep what sopa says of a healthy export from the terminal."""
    loggers = [logging.getLogger(name) for name in ("sopa", "spatialdata")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
