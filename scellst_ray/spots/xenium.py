"""Read the cells of a Xenium run, whose measured counts are compared with predictions per cell.

Training does not use them, since they come without spots. N: cells; G: genes.
"""

import io
from dataclasses import dataclass, replace

import fsspec
import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from scellst_ray.spots.files import positive_number, read_bytes, read_json_object, reason_of, shown
from scellst_ray.spots.table import unique_gene_names
from scellst_ray.spots.tenx import find_file, read_matrix

CELLS = ("cells.parquet", "cells.csv.gz", "cells.csv")
MATRICES = ("cell_feature_matrix.h5", "cell_feature_matrix")
COLUMNS = ("cell_id", "x_centroid", "y_centroid")
# um per px of the full-resolution morphology image if experiment.xenium is absent.
MORPHOLOGY_MPP = 0.2125


@dataclass(frozen=True)
class MeasuredCells:
    """N cells with the counts of G genes.

    Attributes:
        cell_id: Xenium's unique name of each cell, str [N].
        xy0: Centroids (x, y) in level-0 px of the H&E image, float64 [N, 2].
        counts: Raw counts, CSR float32 [N, G].
        genes: G unique gene names.
    """

    cell_id: NDArray[np.str_]
    xy0: NDArray[np.float64]
    counts: sparse.csr_matrix
    genes: list[str]

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.cell_id)


def read_xenium(
    outs: str, mpp: float | None = None, alignment_uri: str | None = None
) -> MeasuredCells:
    """Read cells and counts, and place the cells on the H&E image.

    The morphology image is Xenium's own image of the section. Exactly one of `mpp` and
    `alignment_uri` says how the H&E image lies on it.

    Args:
        outs: Path or fsspec address of a Xenium output folder. It holds cells.parquet or
            cells.csv.gz, and cell_feature_matrix.h5 or the folder of that name. Control probes are
            left out.
        mpp: um per level-0 px of an H&E image without shift or rotation against the morphology
            image, such as a registered and resampled one.
        alignment_uri: Xenium Explorer's *_he_imagealignment.csv, the 3 x 3 matrix from px of the
            H&E image to px of the morphology image. experiment.xenium states the um per px of the
            latter; the default is 0.2125.

    Raises:
        ValueError: Files are missing or do not fit together, or both or none of mpp and
            alignment_uri are given.
    """
    fs, root = fsspec.core.url_to_fs(outs)
    matrix_33 = um_to_level0(outs, mpp, alignment_uri)
    table = _read_cells(fs, find_file(fs, root, CELLS))
    counts, barcodes, genes = read_matrix(fs, find_file(fs, root, MATRICES))
    row_of = {name: row for row, name in enumerate(table["cell_id"])}
    absent = [name for name in barcodes if name not in row_of]
    if absent or len(row_of) != table.height:
        message = (
            f"{outs}: {len(absent)} of {len(barcodes)} cells of the matrix, such as "
            f"{shown(absent[:3])}, "
            f"are not among the {len(row_of)} different cell_id of {table.height} cells. Both "
            "files must come from one run."
        )
        raise ValueError(message)
    rows = np.array([row_of[name] for name in barcodes], np.int64)
    xy_um = table.select("x_centroid", "y_centroid").to_numpy().astype(np.float64)[rows]
    return MeasuredCells(
        cell_id=np.array(barcodes, np.str_),
        xy0=transform(matrix_33, xy_um),
        counts=sparse.csr_matrix(counts, dtype=np.float32),
        genes=unique_gene_names(genes),
    )


def um_to_level0(outs: str, mpp: float | None, alignment_uri: str | None) -> NDArray[np.float64]:
    """Return the 3 x 3 matrix from um of a Xenium run to level-0 px.

    Arguments and errors are those of `read_xenium`.
    """
    if (mpp is None) == (alignment_uri is None):
        message = (
            f"{outs}: mpp {mpp} and alignment {alignment_uri}; give exactly one: um per px of an "
            "image that lies on the morphology image, or the file of the alignment matrix."
        )
        raise ValueError(message)
    if mpp is not None:
        return np.diag([1 / mpp, 1 / mpp, 1.0])
    to_morphology = read_affine(str(alignment_uri))
    morphology_mpp = _morphology_mpp(outs)
    scale = np.diag([1 / morphology_mpp, 1 / morphology_mpp, 1.0])
    return np.asarray(np.linalg.inv(to_morphology) @ scale)


def read_affine(uri: str) -> NDArray[np.float64]:
    """Read a 3 x 3 affine matrix from a CSV without header.

    Raises:
        ValueError: The file is missing, or the matrix has another shape, a last row other than
            0, 0, 1, or no inverse.
    """
    fs, path = fsspec.core.url_to_fs(uri)
    try:
        matrix_33 = np.loadtxt(io.BytesIO(read_bytes(fs, path)), delimiter=",", ndmin=2)
    except ValueError as error:
        message = f"{uri}: not a matrix ({error}). Give 3 rows of 3 numbers, separated by commas."
        raise ValueError(message) from error
    if (
        matrix_33.shape != (3, 3)
        or not np.array_equal(matrix_33[2], [0, 0, 1])
        or not np.isfinite(matrix_33).all()
        or abs(np.linalg.det(matrix_33)) < 1e-12
    ):
        message = (
            f"{uri}: {matrix_33.tolist()} is not an invertible affine map of the plane. Expected "
            "3 x 3 numbers whose last row is 0, 0, 1, as Xenium Explorer exports them."
        )
        raise ValueError(message)
    return matrix_33


def transform(matrix_33: NDArray[np.float64], points: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return points [N, 2] (x, y) mapped by an affine 3 x 3 matrix."""
    return np.asarray(points @ matrix_33[:2, :2].T + matrix_33[:2, 2])


def select_genes(cells: MeasuredCells, genes: list[str]) -> tuple[MeasuredCells, list[str]]:
    """Return the cells reduced to the measured ones of `genes`, in that order, and these genes.

    Raises:
        ValueError: None of the genes was measured.
    """
    column_of = {name: column for column, name in enumerate(cells.genes)}
    shared = [name for name in genes if name in column_of]
    if not shared:
        message = (
            f"none of {len(genes)} genes, such as {shown(genes[:3])}, is among the "
            f"{len(cells.genes)} "
            f"that Xenium measured, such as {shown(cells.genes[:3])}. Use one naming and one "
            "species."
        )
        raise ValueError(message)
    columns = np.array([column_of[name] for name in shared])
    return replace(cells, counts=cells.counts[:, columns], genes=shared), shared


def _morphology_mpp(outs: str) -> float:
    """Return the um per px of the morphology image."""
    fs, root = fsspec.core.url_to_fs(outs)
    path = f"{root.rstrip('/')}/experiment.xenium"
    if not fs.exists(path):
        return MORPHOLOGY_MPP
    values = read_json_object(fs, path)
    mpp = positive_number(values, "pixel_size")
    if mpp is None:
        found = values.get("pixel_size")
        message = (
            f"{path}: not JSON with a number `pixel_size` (it is {shown(found)}). Copy it again."
        )
        raise ValueError(message)
    return mpp


def _read_cells(fs: fsspec.AbstractFileSystem, path: str) -> pl.DataFrame:
    """Return the cells as columns cell_id (str), x_centroid and y_centroid (um)."""
    content = io.BytesIO(read_bytes(fs, path))
    try:
        if path.endswith(".parquet"):
            table = pl.read_parquet(content)
        else:
            table = pl.read_csv(content, infer_schema=False)
        missing = [name for name in COLUMNS if name not in table.columns]
        if missing:
            message = (
                f"{path}: columns {missing} are missing; the table has {table.columns}. Copy the "
                "file again from Xenium's output."
            )
            raise ValueError(message)
        identifier = pl.col("cell_id")
        if table.schema["cell_id"] == pl.Binary:
            identifier = identifier.cast(pl.String)
        return table.select(
            identifier.cast(pl.String), *[pl.col(name).cast(pl.Float64) for name in COLUMNS[1:]]
        )
    except pl.exceptions.PolarsError as error:
        message = f"{path}: not a table of cells ({reason_of(error)}). Expected {list(COLUMNS)}."
        raise ValueError(message) from error
