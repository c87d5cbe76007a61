"""Read the spots that a row of the manifest names."""

import math
from collections.abc import Mapping

import fsspec

from scellst_ray.core.resolution import CONFIRMED
from scellst_ray.spots.h5ad import read_h5ad
from scellst_ray.spots.near_paths import TABLES_OF_10X, check_outs_path
from scellst_ray.spots.resolution import check_stated_mpp
from scellst_ray.spots.space_ranger import read_space_ranger
from scellst_ray.spots.st_array import read_st_array
from scellst_ray.spots.table import Spots

YES = ("yes", "y", "true", "t", "1", "1.0")
COUNTS_TABLE_ENDINGS = (".tsv", ".tsv.gz", ".txt", ".txt.gz")


def read_spots(row: Mapping[str, object], mpp: float | None = None) -> Spots:
    """Read the spots of one slide, and compare its resolution with what they say about it.

    The column `spots` is a Space Ranger `outs` folder, an .h5ad file with obsm['spatial'] (such as
    HEST's), or the counts TSV of an ST array. An ST array needs its positions TSV in
    `spot_positions`. The default of `spot_diameter_um` is 55 um for Space Ranger, the file's value
    for .h5ad, and 100 um for ST arrays.

    Args:
        row: Row of a manifest.
        mpp: Resolution of the opened slide, um per level-0 px; None takes the row's `mpp`.

    Raises:
        ValueError: A required column is absent or empty, a file is damaged, or the resolution
            contradicts the spots by more than 10 % and the row's `mpp_confirmed` is not yes.
        OSError: A file cannot be reached.
    """
    slide_id = row.get("slide_id", "?")
    spots_uri = _text(row, "spots")
    if spots_uri is None:
        message = (
            f"slide {slide_id}: the manifest's `spots` is empty. Give a Space Ranger `outs` "
            "folder, an .h5ad file or the counts TSV of an ST array, or leave the slide out of "
            "training."
        )
        raise ValueError(message)
    mpp = _number(row, "mpp") if mpp is None else mpp
    if mpp is None:
        message = (
            f"slide {slide_id}: reading spots needs um per level-0 px, and neither the slide nor "
            "the manifest's `mpp` gives it. Add `mpp` to the manifest."
        )
        raise ValueError(message)
    spots = _read(row, spots_uri, mpp)
    is_confirmed = str(row.get(CONFIRMED) or "").strip().lower() in YES
    source = f"slide {slide_id}: {spots_uri}"
    check_stated_mpp(spots.stated_mpp, mpp, source, is_confirmed=is_confirmed)
    return spots


def _read(row: Mapping[str, object], spots_uri: str, mpp: float) -> Spots:
    """Read the spots with the reader of their format."""
    diameter_um = _number(row, "spot_diameter_um")
    if spots_uri.endswith(".h5ad"):
        _refuse_folder(spots_uri)
        return read_h5ad(spots_uri, mpp, diameter_um, _text(row, "st_technology"))
    name = spots_uri.rsplit("/", 1)[-1].removesuffix(".gz")
    if not spots_uri.endswith(COUNTS_TABLE_ENDINGS) or name in TABLES_OF_10X:
        return read_space_ranger(spots_uri, mpp, 55.0 if diameter_um is None else diameter_um)
    positions_uri = _text(row, "spot_positions")
    if positions_uri is None:
        message = (
            f"slide {row.get('slide_id', '?')}: `spots` is a counts table ({spots_uri}), which "
            "holds no positions. Name the TSV with x, y, pixel_x, pixel_y in the manifest's "
            "`spot_positions`."
        )
        raise ValueError(message)
    return read_st_array(
        spots_uri, positions_uri, mpp, 100.0 if diameter_um is None else diameter_um
    )


def _refuse_folder(uri: str) -> None:
    """Refuse a folder whose name ends in .h5ad; name what in it may be meant.

    Raises:
        ValueError: The path is a folder.
    """
    fs, path = fsspec.core.url_to_fs(uri)
    if fs.isdir(path):
        check_outs_path(fs, path)
        message = f"{uri}: is a folder, expected an .h5ad file. Give the file."
        raise ValueError(message)


def _text(row: Mapping[str, object], name: str) -> str | None:
    """Return the text of a cell; None for an empty cell (None, "" or pandas' NaN)."""
    value = row.get(name)
    return value if isinstance(value, str) and value.strip() else None


def _number(row: Mapping[str, object], name: str) -> float | None:
    """Return the number in a cell; None for an empty cell."""
    value = row.get(name)
    if value is None or value == "" or value != value:  # noqa: PLR0124 -- NaN is not itself
        return None
    try:
        number = float(str(value))
    except ValueError as error:
        message = f"slide {row.get('slide_id', '?')}: `{name}` is {value!r}, expected a number."
        raise ValueError(message) from error
    if not (math.isfinite(number) and number > 0):
        message = (
            f"slide {row.get('slide_id', '?')}: `{name}` is {value!r}, expected a positive number."
        )
        raise ValueError(message)
    return number
