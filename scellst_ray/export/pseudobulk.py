"""A run as a table of slides x genes, ready for survival and response models.

One row per slide:

- `X`: mean expression over the slide's cells; `layers["sd"]`: its standard deviation.
- `obs`: number of cells, composition (`share_<type>`), niches (`near_<a>_<b>`: how many cells of
  type b lie within the radius around a cell of type a, on average), and the manifest's columns.
  '/' becomes '_' in their names, for AnnData.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import polars as pl
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from scellst_ray import storage
from scellst_ray.core.version import __version__
from scellst_ray.export.free_names import free_names
from scellst_ray.export.hdf5_output import new_hdf5
from scellst_ray.runs.reading import Run
from scellst_ray.runs.records import known_mpp


@dataclass(frozen=True)
class SlideBulk:
    """What one slide adds.

    Attributes:
        num_cells: Number of cells.
        mean_G: Mean expression of each gene of the panel.
        sd_G: Its standard deviation over the cells.
        counts: Number of cells by nucleus type.
        near: Mean number of cells of a type around a cell of a type, by (around, of).
    """

    num_cells: int
    mean_G: NDArray[np.float32]
    sd_G: NDArray[np.float32]
    counts: dict[str, int]
    near: dict[tuple[str, str], float]


def slide_bulk(run: Run, slide_id: str, radius_um: float) -> SlideBulk:
    """Return what a slide with cells adds.

    Args:
        run: The run of `predict`.
        slide_id: The slide.
        radius_um: Radius of a cell's neighbourhood, um; the cell itself is not counted.

    Raises:
        ValueError: the slide failed, or a table is damaged.
    """
    cells = run.cells_frame([slide_id], ["x0", "y0", "nucleus_type"])
    types = cells["nucleus_type"].to_numpy()
    mpp = known_mpp(run.records[slide_id])
    xy_um = cells.select("x0", "y0").to_numpy().astype(np.float64) * mpp
    trees = {str(name): cKDTree(xy_um[types == name]) for name in np.unique(types)}
    near = {}
    for around, tree in trees.items():
        for of, other in trees.items():
            pairs = int(tree.count_neighbors(other, radius_um)) - (tree.n if of == around else 0)
            near[around, of] = pairs / tree.n
    mean_G, sd_G = _moments(run, slide_id)
    counts = {name: int(tree.n) for name, tree in trees.items()}
    return SlideBulk(len(cells), mean_G, sd_G, counts, near)


def _moments(run: Run, slide_id: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and sd of the panel; from the cells where an earlier release left no PROFILES."""
    if "PROFILES" in run.records[slide_id].get("files", {}):
        whole = run.profiles([slide_id]).filter(pl.col("nucleus_type").is_null())
        return whole["mean"].to_numpy(), whole["sd"].to_numpy()
    lazy = run.expression(None).filter(pl.col("slide_id") == slide_id)
    panel = run.genes
    means = lazy.select(pl.col(panel).cast(pl.Float64).mean()).collect().to_numpy()[0]
    sds = lazy.select(pl.col(panel).cast(pl.Float64).std(ddof=0)).collect().to_numpy()[0]
    return means.astype(np.float32), sds.astype(np.float32)


def make_pseudobulk(
    run: Run,
    bulks: Mapping[str, SlideBulk],
    columns: Mapping[str, Mapping[str, Any]],
    radius_um: float,
) -> ad.AnnData:
    """Return the table of slides.

    Args:
        run: The run.
        bulks: What each slide adds, by slide_id, in the order of the rows.
        columns: The manifest's further columns, by slide_id. Columns that the table has itself are
            refused.
        radius_um: The radius that `near_` columns are of, um.

    Raises:
        ValueError: there is no slide, or a column of the manifest has the name of one of ours.
    """
    if not bulks:
        message = f"{run.uri}: no slide has cells, so there is nothing to sum up"
        raise ValueError(message)
    obs = _obs(bulks)
    further = pd.DataFrame([dict(columns.get(s, {})) for s in bulks], index=obs.index)
    further.columns = pd.Index(_column_names(list(further)), dtype=object)
    doubled = sorted(set(further) & set(obs))
    if doubled:
        message = f"the manifest's columns {', '.join(doubled)} have names of pseudobulk's own"
        raise ValueError(message)
    for name in further:  # AnnData stores numbers, truths and texts
        if further[name].dtype == object:
            further[name] = (
                further[name].astype("string").astype(object).where(further[name].notna())
            )
    return ad.AnnData(
        X=np.stack([bulk.mean_G for bulk in bulks.values()]),
        obs=obs.join(further),
        var=pd.DataFrame(index=pd.Index(run.genes, dtype=object)),
        layers={"sd": np.stack([bulk.sd_G for bulk in bulks.values()])},
        uns={
            "scellst_ray": {
                "version": __version__,
                "run_digest": run.folder.digest,
                "radius_um": radius_um,
            }
        },
    )


def _obs(bulks: Mapping[str, SlideBulk]) -> pd.DataFrame:
    """Return our columns: a type that a slide has not counts 0 there."""
    types = sorted({name for bulk in bulks.values() for name in bulk.counts})
    pairs = [(a, b) for a in types for b in types]
    names = ["num_cells", *[f"share_{t}" for t in types], *[f"near_{a}_{b}" for a, b in pairs]]
    rows = [
        [
            bulk.num_cells,
            *[bulk.counts.get(t, 0) / bulk.num_cells for t in types],
            *[bulk.near.get(pair, 0.0) for pair in pairs],
        ]
        for bulk in bulks.values()
    ]
    index = pd.Index(list(bulks), dtype=object, name="slide_id")
    return pd.DataFrame(rows, index=index, columns=_column_names(names))


def _column_names(names: Sequence[str]) -> list[str]:
    """Return names that AnnData takes, all different: it takes '/' for a folder in the file."""
    # Names without '/' come first, so that they stay as they are.
    order = sorted(range(len(names)), key=lambda place: "/" in names[place])
    free = free_names([names[place].replace("/", "_") for place in order], is_cased=True)
    return [name for _, name in sorted(zip(order, free, strict=True))]


def write_pseudobulk(adata: ad.AnnData, out: str) -> None:
    """Write the table as `.h5ad`; an existing file is replaced."""

    def write(path: Path) -> None:
        adata.strings_to_categoricals()
        with new_hdf5(path) as (file, _):
            ad.io.write_elem(file, "/", adata)

    storage.publish(out, write)


def check_out(out: str) -> None:
    """Refuse a name that does not end in .h5ad.

    Raises:
        ValueError: it does not.
    """
    if not out.endswith(".h5ad"):
        message = f"{out}: pseudobulk writes AnnData; end the name in .h5ad"
        raise ValueError(message)


def slides_with_cells(run: Run, slide_ids: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return the chosen slides that have cells, and those that have none."""
    chosen = run.choose(slide_ids)
    empty = [slide for slide in chosen if not run.records[slide].get("num_cells")]
    return [slide for slide in chosen if slide not in set(empty)], empty
