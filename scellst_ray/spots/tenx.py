"""Read feature-barcode matrices (HDF5 or a MEX folder), the format of all 10x instruments.

B: barcodes (spots or cells); G: genes.
"""

import io
from collections.abc import Iterable

import fsspec
import h5py  # type: ignore[import-untyped]
import numpy as np
import polars as pl
from scipy import io as scipy_io
from scipy import sparse

GENE_EXPRESSION = "Gene Expression"


def read_matrix(
    fs: fsspec.AbstractFileSystem, path: str
) -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Read the features of type "Gene Expression" of a matrix.

    Args:
        fs: File system of the matrix.
        path: Path of an HDF5 file (its name ends in .h5), or of a MEX folder, plain or gzipped,
            with features.tsv or the older genes.tsv.

    Returns:
        (counts [B, G], B barcodes, G gene symbols).

    Raises:
        ValueError: The files are incomplete or do not fit together.
    """
    return _read_h5(fs, path) if path.endswith(".h5") else _read_mex(fs, path)


def find_file(fs: fsspec.AbstractFileSystem, root: str, names: Iterable[str]) -> str:
    """Return the path of the first of the names that exists in the folder.

    10x's downloads put the name of the data set and "_" before the name. A single file with such a
    name is returned if no plain name exists.

    Args:
        fs: File system of the folder.
        root: Path of the folder.
        names: File or folder names, in order of preference.

    Raises:
        ValueError: No such file exists; the message lists the names and the folder's content.
    """
    root = root.rstrip("/")
    names = list(names)
    for name in names:
        if fs.exists(f"{root}/{name}"):
            return f"{root}/{name}"
    problem = "the folder does not exist"
    if fs.isdir(root):
        files = sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(root, detail=False))
        for name in names:
            matches = [file for file in files if file.endswith(f"_{name}")]
            if len(matches) == 1:
                return f"{root}/{matches[0]}"
        problem = f"the folder holds {files}"
    message = (
        f"{root}: not a complete 10x output folder: expected one of {names}, but {problem}. Give "
        "the folder as the instrument's software wrote it (Space Ranger names it `outs`)."
    )
    raise ValueError(message)


def read_bytes(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    """Return the content of a file, decompressed if its name ends in .gz."""
    try:
        with fs.open(path, "rb", compression="infer") as file:
            return bytes(file.read())
    except (EOFError, OSError) as error:
        message = f"{path}: cannot be read ({error}). It may be cut off: copy it again."
        raise ValueError(message) from error


def _read_mex(
    fs: fsspec.AbstractFileSystem, folder: str
) -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Read a MEX folder; return counts [B, G], barcodes and gene symbols."""
    matrix_path = _find_mex(fs, folder, ("matrix.mtx",))
    features = _read_columns(fs, _find_mex(fs, folder, ("features.tsv", "genes.tsv")))
    barcodes = _read_columns(fs, _find_mex(fs, folder, ("barcodes.tsv",)))[0]
    try:
        matrix = scipy_io.mmread(io.BytesIO(read_bytes(fs, matrix_path)))
    except (ValueError, OverflowError) as error:
        message = f"{matrix_path}: not a complete MatrixMarket file ({error}). Copy it again."
        raise ValueError(message) from error
    counts_BG = sparse.csr_matrix(matrix.T)
    if counts_BG.shape != (len(barcodes), len(features[0])):
        message = (
            f"{matrix_path}: {counts_BG.shape[1]} features x {counts_BG.shape[0]} barcodes, but "
            f"the folder lists {len(features[0])} features and {len(barcodes)} barcodes. The three "
            "files must come from one run of Space Ranger."
        )
        raise ValueError(message)
    genes = features[min(1, len(features) - 1)]  # columns are id, symbol, type; or only symbol
    kinds = features[2] if len(features) > 2 else None
    return _only_genes(counts_BG, barcodes, genes, kinds, folder)


def _find_mex(fs: fsspec.AbstractFileSystem, folder: str, names: tuple[str, ...]) -> str:
    """Return the path of a file of a MEX folder, gzipped (Space Ranger's default) or plain."""
    return find_file(fs, folder, [name + end for name in names for end in (".gz", "")])


def _read_columns(fs: fsspec.AbstractFileSystem, path: str) -> list[list[str]]:
    """Return the columns of a TSV without header as strings."""
    table = read_strings(read_bytes(fs, path), path, separator="\t")
    return [column.to_list() for column in table]


def read_strings(
    text: bytes, path: str, *, separator: str, has_header: bool = False
) -> pl.DataFrame:
    """Parse a table and return its cells as strings.

    Args:
        text: Content of the file.
        path: Name of the file in errors.
        separator: Separator of columns.
        has_header: Whether the first line names the columns.

    Raises:
        ValueError: The text is no table.
    """
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
        file = h5py.File(io.BytesIO(read_bytes(fs, path)), "r")
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
        # The file holds features x barcodes by column, which equals barcodes x features by row.
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
    """Return the features of type "Gene Expression", without antibodies and probes."""
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
