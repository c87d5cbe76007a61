"""Read a Space Ranger output folder (10x Visium), local or at any fsspec address."""

import io
import json

import fsspec
import polars as pl

from scellst_ray.spots.table import Spots, join_spots, radius_px
from scellst_ray.spots.tenx import find_file, read_bytes, read_matrix, read_strings

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
            Visium HD give the side of the bin: bins are treated as discs of this diameter.

    Returns:
        Spots with in_tissue equal to 1 that occur in the matrix, features of type
        "Gene Expression" only, named by gene symbol.

    Raises:
        ValueError: Files are missing or do not fit together; the message names them.
    """
    radius0 = radius_px(spot_diameter_um, mpp, outs)
    fs, root = fsspec.core.url_to_fs(outs)
    matrix = find_file(fs, root, MATRICES)
    positions_path = find_file(fs, root, POSITIONS)
    _check_bin(fs, root, spot_diameter_um)
    counts, barcodes, genes = read_matrix(fs, matrix)
    positions = _read_positions(fs, positions_path)
    return join_spots(counts, barcodes, genes, positions, radius0, outs)


def _check_bin(fs: fsspec.AbstractFileSystem, root: str, spot_diameter_um: float) -> None:
    """Raise ValueError if spots would be larger than the bins of Visium HD, which touch."""
    path = f"{root.rstrip('/')}/spatial/scalefactors_json.json"
    if not fs.exists(path):
        return
    try:
        bin_um = json.loads(read_bytes(fs, path)).get("bin_size_um")
    except (ValueError, AttributeError) as error:
        message = f"{path}: not a JSON object ({error}). Copy it again from Space Ranger's output."
        raise ValueError(message) from error
    if bin_um is not None and spot_diameter_um > float(bin_um):
        message = (
            f"{root}: bins of {bin_um} um (Visium HD), but spot_diameter_um is {spot_diameter_um}: "
            f"spots would overlap. Set spot_diameter_um to {bin_um} or less in the manifest."
        )
        raise ValueError(message)


def _position_table(fs: fsspec.AbstractFileSystem, path: str) -> pl.DataFrame:
    """Read the position file as strings, with the columns POSITION_COLUMNS."""
    content = read_bytes(fs, path)
    if path.endswith(".parquet"):
        try:
            table = pl.read_parquet(io.BytesIO(content)).cast(pl.String)
        except pl.exceptions.PolarsError as error:
            message = f"{path}: not a Parquet file ({error}). Copy it again."
            raise ValueError(message) from error
    else:
        has_header = b"barcode" in content.partition(b"\n")[0]
        table = read_strings(content, path, separator=",", has_header=has_header)
        if not has_header and table.width == len(POSITION_COLUMNS):
            table.columns = list(POSITION_COLUMNS)
    missing = [name for name in POSITION_COLUMNS if name not in table.columns]
    if missing:
        message = (
            f"{path}: {table.width} columns {table.columns}, {missing} missing. Expected "
            f"{list(POSITION_COLUMNS)}, with that header, or without header in that order."
        )
        raise ValueError(message)
    return table


def _read_positions(fs: fsspec.AbstractFileSystem, path: str) -> pl.DataFrame:
    """Return the spots under tissue as columns spot_id, x0, y0 (level-0 px)."""
    table = _position_table(fs, path)
    try:
        table = table.select(
            pl.col("barcode").alias("spot_id"),
            pl.col("in_tissue").str.strip_chars().cast(pl.Int64),
            pl.col("pxl_col_in_fullres").str.strip_chars().cast(pl.Float64).alias("x0"),
            pl.col("pxl_row_in_fullres").str.strip_chars().cast(pl.Float64).alias("y0"),
        )
    except pl.exceptions.InvalidOperationError as error:
        reason = str(error).splitlines()[0]
        message = f"{path}: a position is not a number ({reason}). Give level-0 px in every row."
        raise ValueError(message) from error
    inside = table.filter(pl.col("in_tissue") == 1)
    if inside.is_empty():
        message = (
            f"{path}: none of {table.height} spots has in_tissue equal to 1, so no spot can be "
            "used. Mark the spots under tissue (Loupe Browser) or use another section."
        )
        raise ValueError(message)
    return inside.drop("in_tissue")
