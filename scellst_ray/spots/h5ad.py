"""Read the spots of one section from an AnnData file (.h5ad)."""

import logging
from collections.abc import Iterator

import h5py  # type: ignore[import-untyped]
import numpy as np
from anndata.io import read_elem
from numpy.typing import NDArray
from scipy import sparse

from scellst_ray.spots.table import Spots, check_spots, radius_px, unique_gene_names
from scellst_ray.storage.node_cache import hold

logger = logging.getLogger(__name__)

# Space Ranger's `spot_diameter_fullres` is the diameter of a 65 um disc; Visium's spots have 55 um.
SPACE_RANGER_UM, VISIUM_UM = 65.0, 55.0


def read_h5ad(uri: str, mpp: float, spot_diameter_um: float | None = None) -> Spots:
    """Read the spots of one section from an AnnData file.

    The parts are read from HDF5 one by one, and nothing is unpickled:

    - obsm['spatial'] holds spot centres (x, y) in level-0 px.
    - Raw counts lie in layers['counts'], X or raw: the first that holds whole numbers.
    - Spots whose obs['in_tissue'] is not 1 are left out, if obs has that column.
    - Genes are named by the index of var.

    Args:
        uri: Path or any fsspec address of the file.
        mpp: Resolution in um per level-0 px.
        spot_diameter_um: Spot diameter. None takes `spot_diameter_fullres` (level-0 px) of
            uns['spatial'][...]['scalefactors']; 65 um, Space Ranger's convention, becomes 55 um.

    Raises:
        ValueError: A part is missing or damaged; the message names it.
    """
    try:
        held = hold(uri)
    except FileNotFoundError as error:
        message = f"{uri}: no such file. Check the manifest's `spots`."
        raise ValueError(message) from error
    with held:
        try:
            with h5py.File(held.path, "r") as file:
                return _read_spots(file, uri, mpp, spot_diameter_um)
        except OSError as error:
            message = f"{uri}: not a readable HDF5 file ({error}). Copy it again."
            raise ValueError(message) from error


def _read_spots(file: h5py.File, uri: str, mpp: float, spot_diameter_um: float | None) -> Spots:
    """Read the spots of an open file as `read_h5ad` describes."""
    if "spatial" not in file.get("obsm", ()):
        message = (
            f"{uri}: obsm holds {sorted(file.get('obsm', ()))}, not 'spatial'. Expected an AnnData "
            "file with spot centres (x, y) in level-0 px in obsm['spatial']."
        )
        raise ValueError(message)
    spot_id = _index(file.get("obs"), f"{uri}: obs")
    xy0 = np.asarray(read_elem(file["obsm/spatial"]), np.float64)
    if xy0.shape != (len(spot_id), 2):
        message = (
            f"{uri}: obsm['spatial'] has shape {xy0.shape}, expected ({len(spot_id)}, 2): (x, y) "
            "of every spot."
        )
        raise ValueError(message)
    if spot_diameter_um is None:
        spot_diameter_um = _stored_diameter_um(file, uri, mpp)
    counts, genes = _raw_counts(file, uri)
    spots = Spots(
        spot_id=spot_id,
        xy0=xy0,
        radius0=radius_px(spot_diameter_um, mpp, uri),
        counts=counts,
        genes=unique_gene_names(genes),
    )
    _compare_pixel_columns(file["obs"], xy0, uri)
    spots = spots.select(_under_tissue(file["obs"], len(spots), uri))
    check_spots(spots, uri)
    return spots


def _index(group: h5py.Group | None, source: str) -> NDArray[np.str_]:
    """Return the index of a stored data frame; `source` names the frame in errors."""
    if isinstance(group, h5py.Group):
        key = group.attrs.get("_index")
        if isinstance(key, str) and key in group:
            return np.asarray(read_elem(group[key])).astype(np.str_)
    message = f"{source} has no index. Write the file again with anndata 0.7 or later."
    raise ValueError(message)


def _places(file: h5py.File) -> Iterator[tuple[str, str, str]]:
    """Yield the matrices that may hold counts as (name, key in the file, key of their genes)."""
    for name, key, var in (
        ("layers['counts']", "layers/counts", "var"),
        ("X", "X", "var"),
        ("raw.X", "raw/X", "raw/var"),
    ):
        if key in file and var in file:
            yield name, key, var


def _raw_counts(file: h5py.File, uri: str) -> tuple[sparse.csr_matrix, list[str]]:
    """Return the first matrix of whole numbers, float32 [S, G], and its genes."""
    reasons = []
    for name, key, var in _places(file):
        stored = read_elem(file[key])
        counts = sparse.csr_matrix(stored)
        not_counts = counts.data[~((counts.data >= 0) & (counts.data == np.rint(counts.data)))]
        if not len(not_counts):
            logger.info("%s: raw counts in %s", uri, name)
            return counts.astype(np.float32), _index(file[var], f"{uri}: {var}").tolist()
        reasons.append(f"{name} holds {not_counts[0]:g}")
    reason = "; ".join(reasons) or "the file has neither X nor layers['counts'] nor raw"
    message = (
        f"{uri}: no raw counts: {reason}. Expected whole numbers of 0 or above in "
        "layers['counts'], X or raw: save the counts before normalising."
    )
    raise ValueError(message)


def _stored_diameter_um(file: h5py.File, uri: str, mpp: float) -> float:
    """Return the spot diameter in um that the file states."""
    libraries = file.get("uns/spatial")
    names = sorted(libraries) if isinstance(libraries, h5py.Group) else []
    if len(names) > 1:
        message = (
            f"{uri}: uns['spatial'] holds {len(names)} sections, such as {names[:3]}. Expected "
            "one section per file, with positions on one image: split the file."
        )
        raise ValueError(message)
    key = f"{names[0]}/scalefactors/spot_diameter_fullres" if names else ""
    if not key or key not in libraries:
        message = (
            f"{uri}: no spot diameter: uns['spatial'] holds {names or 'nothing'} without "
            "scalefactors['spot_diameter_fullres']. Set spot_diameter_um in the manifest."
        )
        raise ValueError(message)
    diameter_um = float(read_elem(libraries[key])) * mpp
    if abs(diameter_um - SPACE_RANGER_UM) <= 0.03 * SPACE_RANGER_UM:
        text = "%s: spot_diameter_fullres is Space Ranger's %.1f um; used Visium's %.0f um"
        logger.info(text, uri, diameter_um, VISIUM_UM)
        return VISIUM_UM
    return diameter_um


def _under_tissue(obs: h5py.Group, num_spots: int, uri: str) -> NDArray[np.bool_]:
    """Return which spots obs marks as under tissue, bool [S]; all if obs has no such column."""
    if "in_tissue" not in obs:
        return np.ones(num_spots, np.bool_)
    marks = np.char.lower(np.asarray(read_elem(obs["in_tissue"])).astype(np.str_))
    inside = np.isin(marks, ("1", "1.0", "true"))
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
    if not all(name in obs for name in names):
        return
    columns = np.column_stack([np.asarray(read_elem(obs[name]), np.float64) for name in names])
    if not np.allclose(columns, xy0, rtol=0, atol=1.5):
        is_swapped = np.allclose(columns[:, ::-1], xy0, rtol=0, atol=1.5)
        relation = "is (row, column), that is (y, x), by" if is_swapped else "differs from"
        logger.warning("%s: obsm['spatial'] %s obs %s; used obsm", uri, relation, list(names))
