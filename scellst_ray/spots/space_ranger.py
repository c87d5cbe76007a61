"""Reads a Space Ranger output folder (10x Visium), local or at any fsspec address."""

import io
from collections.abc import Iterable

import fsspec
import h5py  # type: ignore[import-untyped]
import numpy as np
import polars as pl
from scipy import io as scipy_io
from scipy import sparse

from scellst_ray.spots.table import Spots, join_spots, radius_px

# Filtered (spots under tissue) before raw; HDF5 before MEX, which takes longer to parse.
MATRICES = (
    "filtered_feature_bc_matrix.h5",
    "filtered_feature_bc_matrix",
    "raw_feature_bc_matrix.h5",
    "raw_feature_bc_matrix",
)
POSITIONS = ("spatial/tissue_positions.csv", "spatial/tissue_positions_list.csv")
# Order of the header-less file. Row is y and column is x: tools that label them the other way
# round exist, so this is the one place where the order is written down.
POSITION_COLUMNS = (
    "barcode",
    "in_tissue",
    "array_row",
    "array_col",
    "pxl_row_in_fullres",
    "pxl_col_in_fullres",
)
GENE_EXPRESSION = "Gene Expression"


def read_space_ranger(outs: str, mpp: float, spot_diameter_um: float = 55.0) -> Spots:
    """Read the spots under tissue from a Space Ranger folder.

    Args:
        outs: The `outs` folder, a path or any fsspec address. It holds a count matrix (see
            MATRICES; MEX folders plain or gzipped, with features.tsv or the older genes.tsv) and
            one of the two position files (see POSITIONS).
        mpp: um per level-0 px of the full-resolution image the positions refer to.
        spot_diameter_um: 55 um for Visium. (`spot_diameter_fullres` in scalefactors_json.json is
            about 65 um by 10x's convention and is not used.)

    Returns:
        Spots with in_tissue equal to 1 that occur in the matrix, features of type
        "Gene Expression" only, named by gene symbol.

    Raises:
        ValueError: Where files are missing or do not fit together, naming what was looked for.
    """
    radius0 = radius_px(spot_diameter_um, mpp, outs)
    fs, root = fsspec.core.url_to_fs(outs)
    matrix = _find(fs, root, MATRICES)
    positions_path = _find(fs, root, POSITIONS)
    counts, barcodes, genes = (
        _read_h5(fs, matrix) if matrix.endswith(".h5") else _read_mex(fs, matrix)
    )
    positions = _read_positions(fs, positions_path)
    return join_spots(counts, barcodes, genes, positions, radius0, outs)


def _find(fs: fsspec.AbstractFileSystem, root: str, names: Iterable[str]) -> str:
    """Return the first of the names that exists in the folder."""
    root = root.rstrip("/")
    for name in names:
        if fs.exists(f"{root}/{name}"):
            return f"{root}/{name}"
    found = "no such folder exists"
    if fs.exists(root):
        found = f"it holds {sorted(path.rsplit('/', 1)[-1] for path in fs.ls(root, detail=False))}"
    message = (
        f"{root}: not a complete Space Ranger output: looked for one of {list(names)}, but "
        f"{found}. Give the folder that Space Ranger names `outs`."
    )
    raise ValueError(message)


def _read_bytes(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    """Read a file whole, unzipping it when its name ends in .gz."""
    try:
        with fs.open(path, "rb", compression="infer") as file:
            return bytes(file.read())
    except (EOFError, OSError) as error:
        message = f"{path}: cannot be read ({error}). Is it whole? Copy it again."
        raise ValueError(message) from error


def _read_mex(
    fs: fsspec.AbstractFileSystem, folder: str
) -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Read a MEX folder; return counts [B, G], barcodes and gene symbols."""
    matrix_path = _find_mex(fs, folder, ("matrix.mtx",))
    features = _read_columns(fs, _find_mex(fs, folder, ("features.tsv", "genes.tsv")))
    barcodes = _read_columns(fs, _find_mex(fs, folder, ("barcodes.tsv",)))[0]
    try:
        matrix = scipy_io.mmread(io.BytesIO(_read_bytes(fs, matrix_path)))
    except (ValueError, OverflowError) as error:
        message = f"{matrix_path}: not a whole MatrixMarket file ({error}). Copy it again."
        raise ValueError(message) from error
    counts_BG = sparse.csr_matrix(matrix.T)
    if counts_BG.shape != (len(barcodes), len(features[0])):
        message = (
            f"{matrix_path}: {counts_BG.shape[1]} features x {counts_BG.shape[0]} barcodes, but "
            f"the folder lists {len(features[0])} features and {len(barcodes)} barcodes. The three "
            "files must come from one run of Space Ranger."
        )
        raise ValueError(message)
    genes = features[min(1, len(features) - 1)]  # id, symbol, type; or the symbol alone
    kinds = features[2] if len(features) > 2 else None
    return _only_genes(counts_BG, barcodes, genes, kinds, folder)


def _find_mex(fs: fsspec.AbstractFileSystem, folder: str, names: tuple[str, ...]) -> str:
    """Find a file of a MEX folder, gzipped (Space Ranger's default) or plain."""
    return _find(fs, folder, [name + end for name in names for end in (".gz", "")])


def _read_columns(fs: fsspec.AbstractFileSystem, path: str) -> list[list[str]]:
    """Read the columns of a header-less TSV as strings."""
    table = _read_csv(_read_bytes(fs, path), path, separator="\t")
    return [column.to_list() for column in table]


def _read_csv(text: bytes, path: str, *, separator: str, has_header: bool = False) -> pl.DataFrame:
    """Read a table as strings."""
    try:
        return pl.read_csv(
            text,
            separator=separator,
            has_header=has_header,
            infer_schema=False,
            quote_char='"' if separator == "," else None,
        )
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        message = f"{path}: not a table ({reason}). Copy it again from Space Ranger's output."
        raise ValueError(message) from error


def _read_h5(
    fs: fsspec.AbstractFileSystem, path: str
) -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Read Space Ranger's HDF5 matrix; return counts [B, G], barcodes and gene symbols."""
    try:
        file = h5py.File(io.BytesIO(_read_bytes(fs, path)), "r")
    except OSError as error:
        message = f"{path}: not a readable HDF5 file ({error}). Copy it again."
        raise ValueError(message) from error
    with file:
        if "matrix" not in file or "features" not in file["matrix"]:
            message = (
                f"{path}: holds {sorted(file)}, expected the group `matrix` with `features`, "
                "`barcodes` and the counts (Cell Ranger 3 and later, any Space Ranger)."
            )
            raise ValueError(message)
        group = file["matrix"]
        num_features, num_barcodes = (int(size) for size in group["shape"][:])
        # The file is features x barcodes by column, which is barcodes x features by row.
        counts_BG = sparse.csr_matrix(
            (group["data"][:], group["indices"][:], group["indptr"][:]),
            shape=(num_barcodes, num_features),
        )
        barcodes = group["barcodes"].asstr()[:].tolist()
        genes = group["features/name"].asstr()[:].tolist()
        has_kinds = "feature_type" in group["features"]
        kinds = group["features/feature_type"].asstr()[:].tolist() if has_kinds else None
    return _only_genes(counts_BG, barcodes, genes, kinds, path)


def _only_genes(
    counts_BG: sparse.csr_matrix,
    barcodes: list[str],
    genes: list[str],
    kinds: list[str] | None,
    source: str,
) -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Keep features of type "Gene Expression" (antibodies and probes are no genes)."""
    if kinds is None:
        return counts_BG, barcodes, genes
    columns = [column for column, kind in enumerate(kinds) if kind == GENE_EXPRESSION]
    if not columns:
        message = (
            f"{source}: no feature of type {GENE_EXPRESSION!r} among {len(kinds)}; the types are "
            f"{sorted(set(kinds))[:5]}. Give the gene-expression matrix."
        )
        raise ValueError(message)
    return counts_BG[:, np.array(columns)], barcodes, [genes[column] for column in columns]


def _read_positions(fs: fsspec.AbstractFileSystem, path: str) -> pl.DataFrame:
    """Read spots under tissue as spot_id, x0, y0 (level-0 px), by name where a header exists."""
    text = _read_bytes(fs, path)
    has_header = b"barcode" in text.partition(b"\n")[0]
    table = _read_csv(text, path, separator=",", has_header=has_header)
    if not has_header and table.width == len(POSITION_COLUMNS):
        table.columns = list(POSITION_COLUMNS)
    missing = [name for name in POSITION_COLUMNS if name not in table.columns]
    if missing:
        message = (
            f"{path}: {table.width} columns {table.columns}, {missing} missing. Expected "
            f"{list(POSITION_COLUMNS)}, with that header or without any in that order."
        )
        raise ValueError(message)
    try:
        table = table.select(
            pl.col("barcode").alias("spot_id"),
            pl.col("in_tissue").str.strip_chars().cast(pl.Int64),
            pl.col("pxl_col_in_fullres").str.strip_chars().cast(pl.Float64).alias("x0"),
            pl.col("pxl_row_in_fullres").str.strip_chars().cast(pl.Float64).alias("y0"),
        )
    except pl.exceptions.InvalidOperationError as error:
        reason = str(error).splitlines()[0]
        message = f"{path}: a position is not a number ({reason}). Expected pixels in every row."
        raise ValueError(message) from error
    inside = table.filter(pl.col("in_tissue") == 1)
    if inside.is_empty():
        message = (
            f"{path}: none of {table.height} spots has in_tissue equal to 1, so no spot can be "
            "used. Mark the spots under tissue (Loupe Browser) or use another section."
        )
        raise ValueError(message)
    return inside.drop("in_tissue")
