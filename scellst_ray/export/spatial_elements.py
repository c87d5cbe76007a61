"""Elements of SpatialData made of a slide: its picture, the outlines of its cells, and a table.

Outlines have level-0 px as their own coordinates. Every element lies in the coordinate systems
`global` (level-0 px) and `um`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import shapely

from scellst_ray.export.anndata import (
    Chosen,
    notes_of,
    obs_columns,
    obs_names,
    positions_of,
    var_frame,
)
from scellst_ray.export.slide_picture import Level
from scellst_ray.runs.reading import Run

if TYPE_CHECKING:
    import geopandas as gpd
    import xarray as xr

# Side of a chunk of a picture, px.
CHUNK_PX = 1024
REGION, INSTANCE = "region", "cell_id"
# Letters, digits and _ - . may name an element.
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]")


def element_names(slide_ids: Sequence[str]) -> dict[str, str]:
    """Return the part of each slide in the names of its elements; '' for a single slide.

    Names of elements may hold letters, digits and '_-.', and must differ in more than case. Other
    characters become '_', with a number behind where two slides would have one name.
    """
    if len(slide_ids) == 1:
        return {slide_ids[0]: ""}
    # Ids that can stay as they are keep their names.
    order = sorted(slide_ids, key=lambda slide_id: bool(NOT_IN_NAMES.search(slide_id)))
    names: dict[str, str] = {}
    taken: set[str] = set()
    for slide_id in order:
        plain = NOT_IN_NAMES.sub("_", slide_id)
        name, number = plain, 1
        while name.lower() in taken:
            number += 1
            name = f"{plain}_{number}"
        taken.add(name.lower())
        names[slide_id] = f"{name}_"
    return {slide_id: names[slide_id] for slide_id in slide_ids}


def transformations(mpp: float, prefix: str, ratio: float = 1) -> dict[str, Any]:
    """Return an element's transformations by coordinate system.

    Args:
        mpp: um per level-0 px.
        prefix: The slide's part in names. With several slides, `<slide>_px` and `<slide>_um` hold
            the elements of this slide alone.
        ratio: Level-0 px per unit of the element.
    """
    from spatialdata.transformations import Identity, Scale  # noqa: PLC0415 - an extra

    def scale(factor: float) -> Any:  # noqa: ANN401 - of an extra
        return Identity() if factor == 1 else Scale([factor, factor], axes=("x", "y"))

    systems = {"global": scale(ratio), "um": scale(ratio * mpp)}
    own = {f"{prefix}px": systems["global"], f"{prefix}um": systems["um"]} if prefix else {}
    return systems | own


def picture_element(levels: Sequence[Level], transforms: Mapping[str, Any]) -> "xr.DataTree":
    """Return a picture that is read when it is written, uint8 [c, y, x] at each scale.

    Args:
        levels: The levels, the finest first; their slide stays open as long as this is used.
        transforms: Transformations of the finest level.
    """
    import dask.array as da  # noqa: PLC0415 - of an extra
    import xarray as xr  # noqa: PLC0415 - of an extra
    from spatialdata.transformations import set_transformation  # noqa: PLC0415 - an extra

    scales = {}
    for number, level in enumerate(levels):
        chunks = (3, CHUNK_PX, CHUNK_PX)
        pixels = da.from_array(level, chunks, name=False, meta=np.zeros((0, 0, 0), np.uint8))
        step = level.ratio / levels[0].ratio
        # Centres of px, in px of the finest level.
        coords = {
            "c": ["r", "g", "b"],
            "y": (np.arange(level.shape[1]) + 0.5) * step,
            "x": (np.arange(level.shape[2]) + 0.5) * step,
        }
        image = xr.DataArray(pixels, coords, ("c", "y", "x"), name="image")
        scales[f"scale{number}"] = xr.Dataset({"image": image})
    tree = xr.DataTree.from_dict(scales)
    set_transformation(tree, dict(transforms), set_all=True)
    return tree


def outline_element(run: Run, slide_id: str, transforms: Mapping[str, Any]) -> "gpd.GeoDataFrame":
    """Return the outlines of a slide's cells, one polygon per cell_id, in level-0 px."""
    import geopandas as gpd  # noqa: PLC0415 - of an extra
    from spatialdata.models import ShapesModel  # noqa: PLC0415 - an extra

    cells = run.cells(slide_id, ["cell_id", "polygon"])
    index = pd.Index(cells["cell_id"].to_numpy(), name=INSTANCE)
    outlines = shapely.from_wkb(cells["polygon"].to_numpy())
    frame = gpd.GeoDataFrame({"geometry": outlines}, index=index)
    return ShapesModel.parse(frame, transformations=dict(transforms))


def table_element(chosen: Chosen, shapes: Mapping[str, str]) -> ad.AnnData:
    """Return the cells as a table that annotates the outlines, without X and embeddings.

    Columns are those of export.anndata; `region` names the outlines of a cell's slide.

    Args:
        chosen: What to export.
        shapes: Name of the outlines, by slide_id.
    """
    from spatialdata.models import TableModel  # noqa: PLC0415 - an extra

    obs = pd.DataFrame(obs_columns(chosen), index=pd.Index(obs_names(chosen), dtype=object))
    obs[REGION] = obs["slide_id"].cat.rename_categories(dict(shapes))
    table = ad.AnnData(obs=obs, var=var_frame(chosen))
    table.obsm["spatial"] = positions_of(chosen)
    # Pictures are elements of their own.
    table.uns.update(notes_of(chosen))
    regions = list(obs[REGION].cat.categories)
    region = regions[0] if len(regions) == 1 else regions
    return TableModel.parse(table, region=region, region_key=REGION, instance_key=INSTANCE)
