"""Read a Space Ranger output folder (10x Visium), local or at any fsspec address."""

import logging
from typing import Any

import fsspec
import numpy as np
import polars as pl

from scellst_ray.spots.files import positive_number, read_bytes, read_json_object, shown
from scellst_ray.spots.lattice import pitch_of_squares, pitch_of_visium
from scellst_ray.spots.near_paths import check_outs_path
from scellst_ray.spots.positions import (
    marks_of,
    numbers_of,
    read_position_parquet,
    read_position_text,
)
from scellst_ray.spots.resolution import (
    DISC_OF_SQUARE,
    StatedMpp,
    diameter_statements,
    visium_statement,
)
from scellst_ray.spots.sections import check_one_section
from scellst_ray.spots.table import Spots, join_spots, radius_px
from scellst_ray.spots.tenx import find_file, read_matrix

logger = logging.getLogger(__name__)

# In order of preference: filtered (spots under tissue) before raw, HDF5 before the slower MEX.
MATRICES = (
    "filtered_feature_bc_matrix.h5",
    "filtered_feature_bc_matrix",
    "raw_feature_bc_matrix.h5",
    "raw_feature_bc_matrix",
)
# Names in Space Ranger 2 and later (FFPE, CytAssist), in Space Ranger 1, and in Visium HD.
POSITIONS = (
    "spatial/tissue_positions.csv",
    "spatial/tissue_positions_list.csv",
    "spatial/tissue_positions.parquet",
)
# Columns of the file without header. Row is y and column is x, although some tools swap these
# labels; no other place repeats this order.
POSITION_COLUMNS = (
    "barcode",
    "in_tissue",
    "array_row",
    "array_col",
    "pxl_row_in_fullres",
    "pxl_col_in_fullres",
)


def read_space_ranger(outs: str, mpp: float, spot_diameter_um: float = 55.0) -> Spots:
    """Read the spots under tissue from a Space Ranger folder.

    The folder holds a count matrix (see MATRICES) and a position file (see POSITIONS). A MEX folder
    may be plain or gzipped, with features.tsv or the older genes.tsv. A name before "_" is allowed,
    as in 10x's downloads.

    Args:
        outs: Path or any fsspec address of the `outs` folder, or of one `binned_outputs/square_*`
            of Visium HD.
        mpp: Resolution of the full-resolution image of the positions, um per level-0 px.
        spot_diameter_um: Spot diameter, 55 um for Visium. `spot_diameter_fullres` in
            scalefactors_json.json is not used, since it is about 65 um by 10x's convention. For
            Visium HD give the side of the bin, or the diameter of the disc with its area: bins are
            treated as discs of this diameter.

    Returns:
        Spots with in_tissue equal to 1 that occur in the matrix, features of type
        "Gene Expression" only, named by gene symbol. `stated_mpp` holds the resolutions that follow
        from the lattice and from scalefactors_json.json.

    Raises:
        ValueError: Files are missing or do not fit together, or the matrix holds several sections;
            the message names them.
    """
    radius0 = radius_px(spot_diameter_um, mpp, outs)
    fs, root = fsspec.core.url_to_fs(outs)
    try:
        matrix, positions_path = (find_file(fs, root, names) for names in (MATRICES, POSITIONS))
    except ValueError:
        check_outs_path(fs, root)
        raise
    factors = _scale_factors(fs, root)
    _check_bin(factors, root, spot_diameter_um)
    counts, barcodes, genes = read_matrix(fs, matrix)
    table = _position_table(fs, positions_path)
    check_one_section(barcodes, table["barcode"].to_list(), outs)
    return join_spots(
        counts,
        barcodes,
        genes,
        _spots_under_tissue(table, positions_path),
        radius0,
        outs,
        stated_mpp=tuple(_stated_mpp(table, factors, mpp, outs, spot_diameter_um)),
    )


def _scale_factors(fs: fsspec.AbstractFileSystem, root: str) -> dict[str, Any]:
    """Return the content of scalefactors_json.json; nothing if it is absent."""
    path = f"{root.rstrip('/')}/spatial/scalefactors_json.json"
    return read_json_object(fs, path) if fs.exists(path) else {}


def _check_bin(factors: dict[str, Any], root: str, spot_diameter_um: float) -> None:
    """Raise ValueError if spots would be larger than the bins of Visium HD, which touch."""
    given_um = factors.get("bin_size_um")
    if given_um is None:
        return
    bin_um = positive_number(factors, "bin_size_um")
    if bin_um is None:
        message = (
            f"{root}: bin_size_um in spatial/scalefactors_json.json is {shown(given_um)}, "
            "expected a "
            "positive number. Copy the file again."
        )
        raise ValueError(message)
    whole_um = bin_um * DISC_OF_SQUARE
    if spot_diameter_um > 1.001 * whole_um:
        message = (
            f"{root}: bins of {bin_um} um (Visium HD), but spot_diameter_um is {spot_diameter_um}: "
            f"spots would overlap. Set spot_diameter_um to {bin_um} or less in the manifest."
        )
        raise ValueError(message)
    if (spot_diameter_um / whole_um) ** 2 < 0.7:
        text = (
            "%s: spot_diameter_um is %.4g, so spots cover %.0f %% of the bins of %.4g um whose "
            "molecules were counted: set it to %.4g (the side) or %.4g (the disc of the same area)"
        )
        share = 100 * (spot_diameter_um / whole_um) ** 2
        logger.warning(text, root, spot_diameter_um, share, bin_um, bin_um, whole_um)


def _position_table(fs: fsspec.AbstractFileSystem, path: str) -> pl.DataFrame:
    """Read the position file as strings, with the columns POSITION_COLUMNS."""
    read = read_position_parquet if path.endswith(".parquet") else read_position_text
    table = read(read_bytes(fs, path), POSITION_COLUMNS, path)
    missing = [name for name in POSITION_COLUMNS if name not in table.columns]
    if missing:
        found = [name for name in table.columns if name != "decimal comma"]
        message = (
            f"{path}: {len(found)} columns {shown(found[:10])}, {missing} missing. Expected "
            f"{list(POSITION_COLUMNS)}, with that header, or without header in that order."
        )
        raise ValueError(message)
    return table


def _spots_under_tissue(table: pl.DataFrame, path: str) -> pl.DataFrame:
    """Return the spots under tissue as columns spot_id, x0, y0 (level-0 px)."""
    inside = table.filter(pl.Series(marks_of(table, "in_tissue", path), dtype=pl.Boolean))
    if inside.is_empty():
        message = (
            f"{path}: none of {table.height} spots has in_tissue equal to 1, so no spot can be "
            "used. Mark the spots under tissue (Loupe Browser) or use another section."
        )
        raise ValueError(message)
    return pl.DataFrame(
        {
            "spot_id": inside["barcode"],
            "x0": numbers_of(inside, "pxl_col_in_fullres", path),
            "y0": numbers_of(inside, "pxl_row_in_fullres", path),
        }
    )


def _stated_mpp(
    table: pl.DataFrame, factors: dict[str, Any], mpp: float, source: str, spot_diameter_um: float
) -> list[StatedMpp]:
    """Return the resolutions that follow from the positions of all spots and the scale factors.

    Without hexagons, the diameters count only for spots that may be Visium's.
    """
    by_file = positive_number(factors, "microns_per_pixel")
    if by_file is not None:
        return [StatedMpp(by_file, "microns_per_pixel in scalefactors_json.json")]
    try:
        rows, columns, y0, x0 = (numbers_of(table, name, source) for name in POSITION_COLUMNS[2:])
    except ValueError as error:
        logger.info("the lattice of the spots is not compared with mpp: %s", error)
        return []
    xy0 = np.column_stack([x0, y0])
    bin_um = positive_number(factors, "bin_size_um")
    if bin_um is not None:
        pitch0 = pitch_of_squares(rows, columns, xy0)
        text = f"the pitch of the bins ({pitch0 or 0:.2f} px are {bin_um:g} um)"
        return [StatedMpp(bin_um / pitch0, text)] if pitch0 else []
    pitch0 = pitch_of_visium(rows, columns, xy0)
    diameter0 = positive_number(factors, "spot_diameter_fullres")
    if pitch0 is None:
        if abs(spot_diameter_um - 60) > 10:
            return []
        fiducial0 = positive_number(factors, "fiducial_diameter_fullres")
        return diameter_statements(diameter0, fiducial0)
    return visium_statement(pitch0, diameter0, mpp, source)
