"""Read feature-barcode matrices (HDF5 or a MEX folder), the format of all 10x instruments.

Both forms are checked in full before SciPy gets them. B: barcodes (spots or cells); G: genes.
"""

import io
import re
from collections.abc import Iterable

import fsspec
import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from scellst_ray.spots.features import select_genes
from scellst_ray.spots.files import read_bytes, reason_of
from scellst_ray.spots.hdf5 import find_part, names_in, open_hdf5, read_array, read_strings_of
from scellst_ray.spots.matrices import checked_csr, refuse_too_large

MATRIX_MARKET = re.compile(
    rb"%%MatrixMarket\s+matrix\s+coordinate\s+(integer|unsigned-integer|real)\s+general\s*",
    re.IGNORECASE,
)


def read_matrix(
    fs: fsspec.AbstractFileSystem, path: str
) -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Read the genes of a matrix: features of type "Gene Expression" that are no controls by name.

    Args:
        fs: File system of the matrix.
        path: Path of an HDF5 file (its name ends in .h5), or of a MEX folder, plain or gzipped,
            with features.tsv or the older genes.tsv.

    Returns:
        (counts [B, G], B barcodes, G gene symbols).

    Raises:
        ValueError: The files are incomplete, damaged or do not fit together.
    """
    return _read_h5(fs, path) if path.endswith(".h5") else _read_mex(fs, path)


def read_features(fs: fsspec.AbstractFileSystem, path: str) -> list[tuple[str, str]]:
    """Return the id and the symbol of each feature of a matrix; none if it holds no ids.

    Args:
        fs: File system of the matrix.
        path: Path of an HDF5 file or of a MEX folder, as for `read_matrix`.
    """
    if not path.endswith(".h5"):
        columns = _read_columns(fs, _find_mex(fs, path, ("features.tsv", "genes.tsv")))
        return list(zip(columns[0], columns[1], strict=True)) if len(columns) > 1 else []
    with open_hdf5(io.BytesIO(read_bytes(fs, path)), path) as file:
        parts = [find_part(file, f"matrix/features/{name}", path) for name in ("id", "name")]
        if any(part is None for part in parts):
            return []
        ids, names = (read_strings_of(part, f"{path}: matrix/features") for part in parts)
    return list(zip(ids, names, strict=True)) if len(ids) == len(names) else []


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
        problem = f"the folder holds {files[:20]}{' and more' if len(files) > 20 else ''}"
    message = (
        f"{root}: not a complete 10x output folder: expected one of {names}, but {problem}. Give "
        "the folder as the instrument's software wrote it (Space Ranger names it `outs`)."
    )
    raise ValueError(message)


def _read_mex(
    fs: fsspec.AbstractFileSystem, folder: str
) -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Read a MEX folder; return counts [B, G], barcodes and gene symbols."""
    matrix_path = _find_mex(fs, folder, ("matrix.mtx",))
    features = _read_columns(fs, _find_mex(fs, folder, ("features.tsv", "genes.tsv")))
    barcodes = _read_columns(fs, _find_mex(fs, folder, ("barcodes.tsv",)))[0]
    try:
        content = read_bytes(fs, matrix_path)
    except ValueError as error:
        message = f"{matrix_path}: not a complete MatrixMarket file ({error}). Copy it again."
        raise ValueError(message) from error
    num_features, num_barcodes, num_values = _sizes_of_mtx(content, matrix_path)
    if (num_barcodes, num_features) != (len(barcodes), len(features[0])):
        message = (
            f"{matrix_path}: {num_features} features x {num_barcodes} barcodes, but "
            f"the folder lists {len(features[0])} features and {len(barcodes)} barcodes. The three "
            "files must come from one run of Space Ranger."
        )
        raise ValueError(message)
    rows, columns, values = _entries_of_mtx(content, num_values, matrix_path)
    is_inside = (rows < num_barcodes) & (columns < num_features) & (rows >= 0) & (columns >= 0)
    if not is_inside.all():
        message = (
            f"{matrix_path}: {np.count_nonzero(~is_inside)} values lie outside its {num_features} "
            f"features x {num_barcodes} barcodes. Copy it again."
        )
        raise ValueError(message)
    refuse_too_large(values, matrix_path)
    counts_BG = sparse.csr_matrix((values, (rows, columns)), shape=(num_barcodes, num_features))
    genes = features[min(1, len(features) - 1)]  # columns are id, symbol, type; or only symbol
    kinds = features[2] if len(features) > 2 else None
    return _only_genes(counts_BG, barcodes, genes, kinds, folder)


def _sizes_of_mtx(content: bytes, path: str) -> tuple[int, int, int]:
    """Return (features, barcodes, values) that a MatrixMarket file declares, if it may hold them.

    Raises:
        ValueError: The header is of another kind, or declares more values than the file has bytes
            for.
    """
    first = content.partition(b"\n")[0]
    start = _start_of_entries(content)
    line = content[:start].rstrip().rpartition(b"\n")[2]
    num_bytes = len(content) - start
    sizes = [int(word) for word in line.split() if re.fullmatch(rb"\d{1,18}", word)]
    reason = ""
    if MATRIX_MARKET.fullmatch(first.rstrip(b"\r")) is None:
        reason = f"begins with {first[:60].decode('utf-8', 'replace')!r}"
    elif len(sizes) != 3:
        reason = f"sizes are {line[:60].decode('utf-8', 'replace')!r}"
    elif 6 * sizes[2] > num_bytes + 1:  # the shortest line is "1 1 1", and its end
        reason = f"declares {sizes[2]} values, but only {num_bytes} bytes follow"
    if reason:
        message = (
            f"{path}: not a complete MatrixMarket file of counts ({reason}; expected `matrix "
            "coordinate integer general`). Copy it again."
        )
        raise ValueError(message)
    return sizes[0], sizes[1], sizes[2]


def _entries_of_mtx(
    content: bytes, num_values: int, path: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return barcode, feature (both from 0) and count of every entry of a MatrixMarket file [L].

    SciPy's reader is not used: bytes that are no text ended the process in it.

    Raises:
        ValueError: A line does not hold three numbers, or there are not as many as declared.
    """
    body = content[_start_of_entries(content) :].rstrip()
    if b"\t" in body or b"\r" in body or b"  " in body or b" \n" in body or b"\n " in body:
        body = b"\n".join(b" ".join(line.split()) for line in body.split(b"\n"))
    schema = {"feature": pl.Int64(), "barcode": pl.Int64(), "count": pl.Float64()}
    reason = f"declares {num_values} values"
    table = pl.DataFrame(schema=schema)
    if body:
        try:
            table = pl.read_csv(
                body, separator=" ", has_header=False, quote_char=None, schema=schema
            )
        except pl.exceptions.PolarsError as error:
            reason = reason_of(error)
    if len(table) != num_values or any(table.null_count().row(0)):
        message = f"{path}: not a complete MatrixMarket file ({reason}). Copy it again."
        raise ValueError(message)
    rows, columns = (table[name].to_numpy() - 1 for name in ("barcode", "feature"))
    return rows, columns, table["count"].to_numpy().astype(np.float32)


def _start_of_entries(content: bytes) -> int:
    """Return where the entries begin, after the comments and the line of sizes."""
    start = 0
    while content.startswith(b"%", start):
        start = content.find(b"\n", start) + 1 or len(content)
    return content.find(b"\n", start) + 1 or len(content)


def _find_mex(fs: fsspec.AbstractFileSystem, folder: str, names: tuple[str, ...]) -> str:
    """Return the path of a file of a MEX folder, gzipped or plain."""
    return find_file(fs, folder, [name + end for name in names for end in (".gz", "")])


def _read_columns(fs: fsspec.AbstractFileSystem, path: str) -> list[list[str]]:
    """Return the columns of a TSV without header as strings."""
    table = read_strings(read_bytes(fs, path), path, separator="\t").fill_null("")
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
        message = (
            f"{path}: not a table ({reason_of(error)}). Copy it again from Space Ranger's output."
        )
        raise ValueError(message) from error


def _read_h5(
    fs: fsspec.AbstractFileSystem, path: str
) -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Read Space Ranger's HDF5 matrix; return counts [B, G], barcodes and gene symbols."""
    with open_hdf5(io.BytesIO(read_bytes(fs, path)), path) as file:
        group = find_part(file, "matrix", path)
        if group is None or "features" not in names_in(group, path):
            message = (
                f"{path}: holds {names_in(file, path)}, expected the group `matrix` with "
                "`features`, `barcodes` and the counts (Cell Ranger 3 and later, any Space Ranger)."
            )
            raise ValueError(message)
        source = f"{path}: matrix"
        parts = {
            name: read_array(find_part(group, name, path), f"{source}/{name}")
            for name in ("data", "indices", "indptr", "shape")
        }
        barcodes = read_strings_of(find_part(group, "barcodes", path), f"{source}/barcodes")
        genes = read_strings_of(find_part(group, "features/name", path), f"{source}/features/name")
        kinds_part = find_part(group, "features/feature_type", path)
        kinds = None
        if kinds_part is not None:
            kinds = read_strings_of(kinds_part, f"{source}/features/feature_type")
    shape = parts.pop("shape").ravel().tolist()
    if shape != [len(genes), len(barcodes)] or (kinds is not None and len(kinds) != len(genes)):
        message = (
            f"{path}: shape {shape[:4]}, but {len(genes)} features, {len(barcodes)} barcodes and "
            f"{len(kinds or genes)} types. Copy the file again."
        )
        raise ValueError(message)
    # The file holds features x barcodes by column, which equals barcodes x features by row.
    counts_BG = checked_csr(**parts, shape=(len(barcodes), len(genes)), source=source)
    refuse_too_large(counts_BG.data, source)
    return _only_genes(counts_BG, barcodes, genes, kinds, path)


def _only_genes(
    counts_BG: sparse.csr_matrix,
    barcodes: list[str],
    genes: list[str],
    kinds: list[str] | None,
    source: str,
) -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Return the features that are genes, without antibodies, probes and controls."""
    columns = select_genes(genes, kinds, source)
    return counts_BG[:, columns], barcodes, [genes[column] for column in columns]
