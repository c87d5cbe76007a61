"""Find the library of an AnnData file, check that it is one section, and measure its lattice."""

from dataclasses import dataclass

import h5py
import numpy as np
from numpy.typing import NDArray

from scellst_ray.spots.anndata_file import read_column
from scellst_ray.spots.files import shown
from scellst_ray.spots.hdf5 import find_part, names_in, read_array
from scellst_ray.spots.lattice import find_lattice, pitch_of_squares, pitch_of_visium
from scellst_ray.spots.resolution import (
    VISIUM_DIAMETERS,
    StatedMpp,
    diameter_statements,
    visium_statement,
)
from scellst_ray.spots.sections import describe_marks, repeated_spots

PARTS_OF_LIBRARY = {"scalefactors", "images", "metadata"}


@dataclass(frozen=True)
class Library:
    """What uns['spatial'] says about a section.

    Attributes:
        names: Names of the libraries: none or one.
        diameter0: `spot_diameter_fullres`, level-0 px; None if it is absent or no positive number.
        mpp: `microns_per_pixel`, likewise.
        bin_um: `bin_size_um` of Visium HD, likewise.
        fiducial0: `fiducial_diameter_fullres`, likewise.
    """

    names: list[str]
    diameter0: float | None
    mpp: float | None
    bin_um: float | None
    fiducial0: float | None


def find_library(file: h5py.File, uri: str) -> Library:
    """Return what uns['spatial'] says.

    Entries that are no library, such as CELLxGENE's flag `is_single`, are passed over.

    Raises:
        ValueError: The file holds several libraries, or says that it is not a single section.
    """
    spatial = find_part(file, "uns/spatial", uri)
    members = names_in(spatial, uri)
    groups = [name for name in members if isinstance(find_part(spatial, name, uri), h5py.Group)]
    if "scalefactors" in groups:  # one library, without a name
        return _library([""], spatial, uri)
    whole = [
        name
        for name in groups
        if PARTS_OF_LIBRARY & set(names_in(find_part(spatial, name, uri), uri))
    ]
    names = whole or groups
    if len(names) > 1:
        message = (
            f"{uri}: uns['spatial'] holds {len(names)} sections, such as {shown(names[:3])}. "
            "Expected "
            "one section per file, with positions on one image: split the file."
        )
        raise ValueError(message)
    if "is_single" in members and _is_false(find_part(spatial, "is_single", uri), uri):
        message = (
            f"{uri}: uns['spatial']['is_single'] is False: the file holds several sections. "
            "Expected one section per file, with positions on one image: split the file."
        )
        raise ValueError(message)
    return _library(names, find_part(spatial, names[0], uri) if names else None, uri)


def _library(names: list[str], group: h5py.Group | None, uri: str) -> Library:
    factors = find_part(group, "scalefactors", uri) if isinstance(group, h5py.Group) else None
    numbers = [
        _positive(factors, name, uri)
        for name in (
            *("spot_diameter_fullres", "microns_per_pixel"),
            *("bin_size_um", "fiducial_diameter_fullres"),
        )
    ]
    return Library(names, *numbers)


def _positive(factors: h5py.Group | h5py.Dataset | None, name: str, uri: str) -> float | None:
    """Return a scale factor; None if it is absent or no positive number."""
    if not isinstance(factors, h5py.Group):
        return None
    part = find_part(factors, name, uri)
    if not isinstance(part, h5py.Dataset):
        return None
    values = read_array(part, f"{uri}: scalefactors[{name!r}]").ravel()
    if len(values) != 1 or values.dtype.kind not in "iuf":
        return None
    number = float(values[0])
    return number if 0 < number < np.inf else None


def _is_false(part: h5py.Group | h5py.Dataset | None, uri: str) -> bool:
    """Return whether a stored flag is false."""
    if not isinstance(part, h5py.Dataset):
        return False
    values = read_array(part, f"{uri}: uns['spatial']['is_single']").ravel()
    return len(values) == 1 and str(values[0]).lower() in ("false", "0", "0.0")


def check_one_section(obs: h5py.Group, spot_ids: list[str], uri: str) -> None:
    """Check that the spots are those of one section.

    Raises:
        ValueError: obs['library_id'] has several values, or a place of the array or a barcode
            occurs twice, as it does where sections were joined.
    """
    remedy = "Expected one section per file, with positions on one image: split the file."
    part = find_part(obs, "library_id", uri)
    if part is not None:
        values = sorted({str(v) for v in read_column(part, f"{uri}: obs['library_id']")} - {"nan"})
        if len(values) > 1:
            message = (
                f"{uri}: obs['library_id'] names {len(values)} sections, such as "
                f"{shown(values[:3])}. "
                f"{remedy}"
            )
            raise ValueError(message)
    marks = repeated_spots(spot_ids)
    if marks:
        message = (
            f"{uri}: the same barcodes occur in {len(marks)} sections ({describe_marks(marks)}). "
            f"{remedy}"
        )
        raise ValueError(message)
    places = _array_places(obs, len(spot_ids), uri)
    if places is None:
        return
    num_different = len(np.unique(places, axis=0))
    # Places that are all alike say nothing.
    if 1 < num_different < 0.9 * len(places):
        message = (
            f"{uri}: {len(places)} spots have only {num_different} different places in the array "
            f"(obs['array_row'], obs['array_col']), as in a file of several sections. {remedy}"
        )
        raise ValueError(message)


def _array_places(obs: h5py.Group, num_spots: int, uri: str) -> NDArray[np.float64] | None:
    """Return rows and columns of the array [S, 2]; None if obs lacks them."""
    columns = []
    for name in ("array_row", "array_col"):
        part = find_part(obs, name, uri)
        if part is None:
            return None
        values = read_column(part, f"{uri}: obs[{name!r}]")
        if values.dtype.kind not in "iuf" or len(values) != num_spots:
            return None
        columns.append(values.astype(np.float64))
    places = np.column_stack(columns)
    return places if np.isfinite(places).all() else None


def stated_mpp(
    obs: h5py.Group, library: Library, xy0: NDArray[np.float64], mpp: float, uri: str
) -> list[StatedMpp]:
    """Return the resolutions that follow from the scale factors and the lattice.

    Args:
        obs: The data frame of the spots.
        library: What uns['spatial'] says.
        xy0: Spot centres [S, 2], level-0 px.
        mpp: Resolution in use, um per level-0 px.
        uri: Name of the file in messages.
    """
    if library.mpp is not None:
        return [StatedMpp(library.mpp, "microns_per_pixel of the scale factors")]
    places = _array_places(obs, len(xy0), uri)
    if library.bin_um is not None:
        pitch0 = None if places is None else pitch_of_squares(places[:, 0], places[:, 1], xy0)
        text = f"the pitch of the bins ({pitch0 or 0:.2f} px are {library.bin_um:g} um)"
        return [StatedMpp(library.bin_um / pitch0, text)] if pitch0 else []
    lattice = find_lattice(xy0)
    if lattice is None or lattice.kind != "hexagons":
        return diameter_statements(library.diameter0, library.fiducial0)
    by_place = None if places is None else pitch_of_visium(places[:, 0], places[:, 1], xy0)
    low, high = VISIUM_DIAMETERS
    by_size = library.diameter0 is not None and low <= library.diameter0 / lattice.pitch0 <= high
    if by_place is None and not by_size:
        return []
    return visium_statement(by_place or lattice.pitch0, library.diameter0, mpp, uri)
