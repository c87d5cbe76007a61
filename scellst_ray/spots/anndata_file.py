"""Read the elements of an AnnData file from HDF5, checked in full.

These are data frames, columns, dense and sparse matrices, as anndata 0.7 and later write them.
S: rows (spots); G: columns (genes).
"""

from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scellst_ray.spots.files import reason_of, shown
from scellst_ray.spots.hdf5 import (
    DAMAGE,
    attribute,
    check_dataset,
    find_part,
    names_in,
    read_array,
    read_strings_of,
)
from scellst_ray.spots.matrices import checked_csr

BLOCK_BYTES = 16 * 2**20
MISSING = "nan"


def read_index(frame: h5py.Group | None, source: str) -> list[str]:
    """Return the index of a stored data frame.

    Args:
        frame: The group of the frame.
        source: Name of the file and the frame in errors.

    Raises:
        ValueError: The frame has no index, or it is no list of text.
    """
    key = attribute(frame, "_index") if isinstance(frame, h5py.Group) else None
    part = find_part(frame, key, source) if isinstance(key, str) and key else None
    if part is None:
        message = f"{source} has no index. Write the file again with anndata 0.7 or later."
        raise ValueError(message)
    return [str(name) for name in read_column(part, f"{source} {key}")]


def read_column(part: h5py.Group | h5py.Dataset, source: str) -> NDArray[Any]:
    """Return a column: numbers or text; missing text is "nan" and missing numbers are NaN.

    Args:
        part: Data set of values, or group of a categorical or nullable column.
        source: Name of the file and the column in errors.

    Raises:
        ValueError: The column is of another kind, or damaged.
    """
    if isinstance(part, h5py.Dataset):
        values = read_array(part, source)
        old = attribute(part, "categories")  # anndata 0.7 keeps categories in another place
        if isinstance(old, h5py.Reference):
            try:
                categories = read_array(part.file[old], f"{source} categories")
            except DAMAGE as error:
                message = (
                    f"{source}: its categories cannot be read ({reason_of(error)}). Copy the file "
                    "again."
                )
                raise ValueError(message) from error
            return _decode(values, categories, source)
        if values.ndim != 1:
            message = f"{source} has shape {values.shape}, expected a list. Write the file again."
            raise ValueError(message)
        return values
    members = names_in(part, source)
    if {"codes", "categories"} <= set(members):
        codes = read_array(find_part(part, "codes", source), f"{source} codes")
        categories = read_array(find_part(part, "categories", source), f"{source} categories")
        return _decode(codes, categories, source)
    if {"values", "mask"} <= set(members):
        values = read_array(find_part(part, "values", source), f"{source} values")
        mask = read_array(find_part(part, "mask", source), f"{source} mask")
        return _masked(values, mask, source)
    message = (
        f"{source} is a group of {shown(members[:5])}, expected a column. Write the file again."
    )
    raise ValueError(message)


def _decode(codes: NDArray[Any], categories: NDArray[Any], source: str) -> NDArray[Any]:
    """Return the values of a categorical column as text."""
    is_sound = codes.ndim == categories.ndim == 1 and codes.dtype.kind in "iu"
    if not is_sound or not ((codes >= -1) & (codes < len(categories))).all():
        message = (
            f"{source}: codes of {codes.dtype} and shape {codes.shape} do not fit "
            f"{categories.shape} categories. Write the file again."
        )
        raise ValueError(message)
    names = np.array([*map(str, categories), MISSING], object)
    return np.asarray(names[codes.astype(np.int64)])


def _masked(values: NDArray[Any], mask: NDArray[Any], source: str) -> NDArray[Any]:
    """Return the values of a nullable column."""
    if values.shape != mask.shape or values.ndim != 1 or mask.dtype.kind not in "biu":
        message = (
            f"{source}: values of shape {values.shape} and mask of shape {mask.shape} do not fit. "
            "Write the file again."
        )
        raise ValueError(message)
    if values.dtype.kind in "OSU":
        return np.where(mask.astype(np.bool_), MISSING, values.astype(object))
    return np.where(mask.astype(np.bool_), np.nan, values.astype(np.float64))


def read_pairs(part: h5py.Group | h5py.Dataset | None, source: str) -> NDArray[np.float64]:
    """Return an array of two columns as float64 [S, 2], from an array or a data frame.

    Raises:
        ValueError: The part is no array of numbers.
    """
    if isinstance(part, h5py.Group):
        order = attribute(part, "column-order")
        names = (
            [str(name) for name in np.atleast_1d(np.asarray(order))] if order is not None else []
        )
        if len(names) != 2:
            message = f"{source} is a group of {names_in(part, source)}, expected two columns."
            raise ValueError(message)
        columns = [read_array(find_part(part, name, source), f"{source} {name}") for name in names]
        is_pair = columns[0].ndim == 1 and columns[0].shape == columns[1].shape
        values = np.column_stack(columns) if is_pair else columns[0]
    else:
        values = read_array(part, source)
    if values.dtype.kind not in "iuf":
        message = f"{source} holds {values.dtype}, expected numbers: positions (x, y) of the spots."
        raise ValueError(message)
    return np.asarray(values, np.float64)


def read_matrix_part(
    part: h5py.Group | h5py.Dataset, shape: tuple[int, int], source: str
) -> sparse.csr_matrix:
    """Return a dense or sparse matrix as CSR [S, G], checked in full.

    Args:
        part: Data set, or group with data, indices and indptr.
        shape: (S, G) by the names of its rows and columns.
        source: Name of the file and the matrix in errors.

    Raises:
        ValueError: The matrix is of another shape or kind, or damaged.
    """
    if isinstance(part, h5py.Dataset):
        return _read_dense(part, shape, source)
    parts = {
        name: read_array(find_part(part, name, source), f"{source}/{name}")
        for name in ("data", "indices", "indptr")
    }
    stated = attribute(part, "shape")
    stated = attribute(part, "h5sparse_shape") if stated is None else stated
    try:
        sizes = tuple(int(size) for size in np.asarray(stated).ravel())
    except (TypeError, ValueError):
        sizes = ()
    if sizes != shape:
        message = f"{source} has shape {sizes}, but names for {shape}. Write the file again."
        raise ValueError(message)
    kind = str(attribute(part, "encoding-type") or attribute(part, "h5sparse_format"))
    if kind.startswith("csc"):
        return checked_csr(**parts, shape=shape[::-1], source=source).T.tocsr()
    if kind.startswith("csr"):
        return checked_csr(**parts, shape=shape, source=source)
    message = f"{source} is stored as {shown(kind)}, expected a dense, CSR or CSC matrix."
    raise ValueError(message)


def _read_dense(part: h5py.Dataset, shape: tuple[int, int], source: str) -> sparse.csr_matrix:
    """Return a dense data set as CSR [S, G], read in blocks of rows."""
    check_dataset(part, source)
    if part.shape != shape or part.dtype.kind not in "biuf":
        message = (
            f"{source} has shape {part.shape} of {part.dtype}, expected numbers of shape {shape}. "
            "Write the file again."
        )
        raise ValueError(message)
    step = max(1, BLOCK_BYTES // max(1, shape[1] * part.dtype.itemsize))
    blocks = []
    for start in range(0, shape[0], step):
        try:
            rows = part[start : start + step]
        except DAMAGE as error:
            message = f"{source} cannot be read ({reason_of(error)}). Copy the file again."
            raise ValueError(message) from error
        kind = np.float32 if rows.dtype == np.float16 else rows.dtype
        blocks.append(sparse.csr_matrix(rows.astype(kind, copy=False)))
    if not blocks:
        return sparse.csr_matrix(shape, dtype=np.float32)
    return sparse.csr_matrix(sparse.vstack(blocks, format="csr"))


def read_text_column(frame: h5py.Group, name: str, source: str) -> list[str] | None:
    """Return a column of text of a data frame; None if it is absent or no text.

    Raises:
        ValueError: The column is damaged.
    """
    part = find_part(frame, name, source)
    if part is None:
        return None
    if isinstance(part, h5py.Dataset) and part.dtype.kind in "OS":
        return read_strings_of(part, f"{source} {name}") if part.ndim == 1 else None
    values = read_column(part, f"{source} {name}")
    return [str(value) for value in values] if values.dtype.kind in "OSU" else None
