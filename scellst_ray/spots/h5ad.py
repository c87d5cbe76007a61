"""Read the spots of one section from an AnnData file (.h5ad)."""

import logging

import h5py
import numpy as np
from numpy.typing import NDArray

from scellst_ray.spots.anndata_file import read_column, read_index, read_pairs
from scellst_ray.spots.h5ad_counts import raw_counts
from scellst_ray.spots.h5ad_section import Library, check_one_section, find_library, stated_mpp
from scellst_ray.spots.hdf5 import find_part, names_in, open_hdf5
from scellst_ray.spots.lattice import find_lattice
from scellst_ray.spots.positions import EMPTY, YES
from scellst_ray.spots.resolution import diameter_of_squares, has_pooled_counts
from scellst_ray.spots.table import Spots, check_spots, radius_px, unique_gene_names
from scellst_ray.storage.node_cache import hold

logger = logging.getLogger(__name__)

# Space Ranger's `spot_diameter_fullres` is the diameter of a 65 um disc; Visium's spots have 55 um.
SPACE_RANGER_UM, VISIUM_UM = 65.0, 55.0


def read_h5ad(
    uri: str, mpp: float, spot_diameter_um: float | None = None, technology: str | None = None
) -> Spots:
    """Read the spots of one section from an AnnData file.

    The parts are read from HDF5 one by one and checked in full, and nothing is unpickled:

    - obsm['spatial'] holds spot centres (x, y) in level-0 px.
    - Raw counts lie in layers['counts'], X or raw: the first that holds whole numbers.
    - Spots whose obs['in_tissue'] is not 1 are left out, if obs has that column.
    - Genes are named by the index of var, or by a column of symbols if the index holds Ensembl ids.
    - Features that are no genes by var['feature_types'] or by name are left out.

    Args:
        uri: Path or any fsspec address of the file.
        mpp: Resolution in um per level-0 px.
        spot_diameter_um: Spot diameter. None takes `spot_diameter_fullres` (level-0 px) of
            uns['spatial'][...]['scalefactors']; 65 um, Space Ranger's convention, becomes 55 um.
            Squares over which counts were pooled become discs of the same area.
        technology: Name of the instrument, such as "Xenium"; None if unknown.

    Returns:
        Spots of the section. `stated_mpp` holds the resolutions that follow from the lattice and
        from the scale factors.

    Raises:
        ValueError: A part is missing or damaged, or the file holds several sections; the message
            names it.
    """
    try:
        held = hold(uri)
    except FileNotFoundError as error:
        message = f"{uri}: no such file. Check the manifest's `spots`."
        raise ValueError(message) from error
    with held, open_hdf5(str(held.path), uri) as file:
        return _read_spots(file, uri, mpp, spot_diameter_um, technology)


def _read_spots(
    file: h5py.File, uri: str, mpp: float, spot_diameter_um: float | None, technology: str | None
) -> Spots:
    """Read the spots of an open file as `read_h5ad` describes."""
    obsm = find_part(file, "obsm", uri)
    if "spatial" not in names_in(obsm, uri):
        message = (
            f"{uri}: obsm holds {names_in(obsm, uri)}, not 'spatial'. Expected an AnnData "
            "file with spot centres (x, y) in level-0 px in obsm['spatial']."
        )
        raise ValueError(message)
    obs = find_part(file, "obs", uri)
    spot_id = np.array(read_index(obs, f"{uri}: obs"), np.str_)
    xy0 = read_pairs(find_part(file, "obsm/spatial", uri), f"{uri}: obsm['spatial']")
    if xy0.shape != (len(spot_id), 2):
        message = (
            f"{uri}: obsm['spatial'] has shape {xy0.shape}, expected ({len(spot_id)}, 2): (x, y) "
            "of every spot."
        )
        raise ValueError(message)
    library = find_library(file, uri)
    check_one_section(obs, spot_id.tolist(), uri)
    diameter_um = _diameter_um(library, xy0, mpp, uri, spot_diameter_um, technology)
    counts, genes = raw_counts(file, len(spot_id), uri)
    spots = Spots(
        spot_id=spot_id,
        xy0=xy0,
        radius0=radius_px(diameter_um, mpp, uri),
        counts=counts,
        genes=unique_gene_names(genes),
        stated_mpp=tuple(stated_mpp(obs, library, xy0, mpp, uri)),
    )
    _compare_pixel_columns(obs, xy0, uri)
    spots = spots.select(_under_tissue(obs, len(spots), uri))
    check_spots(spots, uri)
    return spots


def _diameter_um(
    library: Library,
    xy0: NDArray[np.float64],
    mpp: float,
    uri: str,
    given_um: float | None,
    technology: str | None,
) -> float:
    """Return the diameter of the disc that stands for a spot, um."""
    return diameter_of_squares(
        _stored_diameter_um(library, mpp, uri) if given_um is None else given_um,
        find_lattice(xy0),
        mpp,
        uri,
        is_pooled=has_pooled_counts(technology) or library.bin_um is not None,
        is_given=given_um is not None,
    )


def _stored_diameter_um(library: Library, mpp: float, uri: str) -> float:
    """Return the spot diameter in um that the file states."""
    if library.diameter0 is None:
        message = (
            f"{uri}: no spot diameter: uns['spatial'] holds {library.names or 'nothing'} without "
            "a positive number in scalefactors['spot_diameter_fullres']. Set spot_diameter_um in "
            "the manifest."
        )
        raise ValueError(message)
    diameter_um = library.diameter0 * mpp
    if abs(diameter_um - SPACE_RANGER_UM) <= 0.03 * SPACE_RANGER_UM:
        text = "%s: spot_diameter_fullres is Space Ranger's %.1f um; used Visium's %.0f um"
        logger.info(text, uri, diameter_um, VISIUM_UM)
        return VISIUM_UM
    return diameter_um


def _under_tissue(obs: h5py.Group, num_spots: int, uri: str) -> NDArray[np.bool_]:
    """Return which spots obs marks as under tissue, bool [S]; all if obs has no such column."""
    part = find_part(obs, "in_tissue", uri)
    if part is None:
        return np.ones(num_spots, np.bool_)
    marks = [str(mark).lower() for mark in read_column(part, f"{uri}: obs['in_tissue']")]
    if len(marks) != num_spots:
        message = f"{uri}: obs['in_tissue'] has {len(marks)} entries for {num_spots} spots."
        raise ValueError(message)
    known = {"1", "1.0", *YES, "0", "0.0", "false", "f", "no", *EMPTY}
    unknown = next((mark for mark in marks if mark not in known), None)
    if unknown is not None:
        text = "%s: obs['in_tissue'] holds %r, which is neither 1 nor 0; left such spots out"
        logger.warning(text, uri, unknown)
    inside = np.isin(marks, ("1", "1.0", *YES))
    if not inside.any():
        message = (
            f"{uri}: none of {num_spots} spots has obs['in_tissue'] equal to 1, so no spot can be "
            "used. Mark the spots under tissue, or remove the column."
        )
        raise ValueError(message)
    return inside


def _compare_pixel_columns(obs: h5py.Group, xy0: NDArray[np.float64], uri: str) -> None:
    """Log a warning if the pixel columns of obs, which some tools swap, contradict obsm."""
    names = ("pxl_col_in_fullres", "pxl_row_in_fullres")
    parts = [find_part(obs, name, uri) for name in names]
    found = [read_column(part, f"{uri}: obs") for part in parts if part is not None]
    if len(found) < 2 or any(
        column.dtype.kind not in "iuf" or len(column) != len(xy0) for column in found
    ):
        return
    columns = np.column_stack(found).astype(np.float64)
    if not np.allclose(columns, xy0, rtol=0, atol=1.5):
        is_swapped = np.allclose(columns[:, ::-1], xy0, rtol=0, atol=1.5)
        relation = "is (row, column), that is (y, x), by" if is_swapped else "differs from"
        logger.warning("%s: obsm['spatial'] %s obs %s; used obsm", uri, relation, list(names))
