"""Readers of files with nuclei: label maps, typed points, CELLS.

| file | content |
| --- | --- |
| .png .tif .tiff .npy .npz | label map: integers [H, W], one per nucleus, 0 = background |
| .csv .tsv | points: columns x, y and optionally type |
| .parquet | CELLS table of this project |

The types of a label map come from a second table with columns label and type.
"""

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Any

import cv2
import numpy as np
import polars as pl
import pyarrow as pa
import shapely
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.evaluation.segmentation.detection_metrics import UNKNOWN

MAPS, POINTS, CELLS = (".png", ".tif", ".tiff", ".npy", ".npz"), (".csv", ".tsv"), (".parquet",)
CELL_COLUMNS = ("x0", "y0", "nucleus_type", "polygon")
# Errors that the readers raise for files that are cut off or of another format.
READ_ERRORS = (
    *(ValueError, TypeError, IndexError, ZeroDivisionError, EOFError, RuntimeError),
    *(struct.error, zlib.error, zipfile.BadZipFile, cv2.error, tifffile.TiffFileError),
)
_MAP_NAMES = ("labels", "inst_map")


@dataclass(frozen=True)
class NucleiFile:
    """N nuclei of one file, in px (x, y) of the image they were drawn on.

    Attributes:
        source: Name of the file in messages.
        centroid_N2: float64 [N, 2].
        types_N: str [N]; UNKNOWN where the file names no type.
        labels_HW: int32 [H, W], nucleus i has label i + 1; None unless the file is a label map.
        polygons_N: shapely outlines [N]; None unless the file has outlines.
    """

    source: str
    centroid_N2: NDArray[np.float64]
    types_N: NDArray[np.str_]
    labels_HW: NDArray[np.int32] | None = None
    polygons_N: NDArray[np.object_] | None = None

    @property
    def has_masks(self) -> bool:
        """Whether the file says which pixels belong to each nucleus."""
        return self.labels_HW is not None or self.polygons_N is not None


def read_nuclei(uri: str, types_uri: str | None = None) -> NucleiFile:
    """Read a label map, points or CELLS; the suffix of the name decides which.

    Args:
        uri: Local path or fsspec URI.
        types_uri: Table (.csv, .tsv) with columns label and type; for a label map only.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the content does not match the suffix, or `types_uri` is given for a file that
            is no label map.
    """
    suffix = PurePosixPath(uri).suffix.lower()
    if suffix not in MAPS + POINTS + CELLS:
        known = ", ".join(MAPS + POINTS + CELLS)
        message = f"{uri}: unknown suffix; expected one of {known}"
        raise ValueError(message)
    if types_uri is not None and suffix not in MAPS:
        message = f"{uri}: holds types itself; give a table of types for label maps only"
        raise ValueError(message)
    if not storage.exists(uri):
        message = f"{uri}: no such file; check the path"
        raise FileNotFoundError(message)
    if suffix in MAPS:
        return _label_map(uri, _read_map(uri, suffix), types_uri)
    if suffix in POINTS:
        return _points(uri)
    schemas.check(storage.read_schema(uri), "CELLS", uri)
    return nuclei_of_cells(storage.read_table(uri, list(CELL_COLUMNS)), uri)


def nuclei_of_cells(cells: pa.Table, source: str) -> NucleiFile:
    """Return CELLS (with the columns CELL_COLUMNS) as nuclei, in level-0 px."""
    centroid_N2 = np.stack([cells["x0"].to_numpy(), cells["y0"].to_numpy()], axis=1)
    return NucleiFile(
        source,
        centroid_N2.astype(np.float64),
        np.array(cells["nucleus_type"].to_pylist(), np.str_),
        polygons_N=shapely.from_wkb(cells["polygon"].to_numpy(zero_copy_only=False)),
    )


def _read_map(uri: str, suffix: str) -> NDArray[np.integer]:
    """Return the integer array [H, W] of a label map file.

    Raises:
        ValueError: the file is cut off or is no label map.
    """
    data = storage.read_bytes(uri)
    content: Any  # the libraries declare an array, and return None if they cannot read the file
    try:
        if suffix == ".png":
            content = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        elif suffix in (".tif", ".tiff"):
            content = tifffile.imread(io.BytesIO(data))
        else:
            content = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(content, np.lib.npyio.NpzFile):
            content = content[_array_name(content, uri)]
    except READ_ERRORS as error:
        message = f"{uri}: cannot be read as {suffix} ({error}); is the file cut off?"
        raise ValueError(message) from error
    if content is None:
        message = f"{uri}: cannot be read as an image; is the file cut off?"
        raise ValueError(message)
    labels_HW = np.asarray(content)
    if labels_HW.ndim != 2 or labels_HW.dtype.kind not in "iu":
        message = (
            f"{uri}: holds {labels_HW.dtype} {labels_HW.shape}; expected a label map, integers "
            "[H, W] with 0 for background and a number per nucleus"
        )
        raise ValueError(message)
    return labels_HW


def _array_name(arrays: np.lib.npyio.NpzFile, uri: str) -> str:
    """Return the name of the label map in an .npz: the only array, or one of _MAP_NAMES."""
    names = list(arrays) if len(list(arrays)) == 1 else [n for n in _MAP_NAMES if n in arrays]
    if not names:
        message = (
            f"{uri}: holds arrays {', '.join(arrays) or 'without names'}; expected one array, or "
            f"one named {' or '.join(_MAP_NAMES)}"
        )
        raise ValueError(message)
    return str(names[0])


def _label_map(uri: str, labels_HW: NDArray[np.integer], types_uri: str | None) -> NucleiFile:
    """Return the nuclei of a label map, numbered 1 to N, with centroids and types."""
    y, x = np.nonzero(labels_HW)
    names, flat = np.unique(labels_HW[y, x], return_inverse=True)
    if len(names) and names[0] < 0:
        message = f"{uri}: holds the label {names[0]}; expected 0 for background, then 1, 2, .."
        raise ValueError(message)
    compact_HW = np.zeros(labels_HW.shape, np.int32)
    compact_HW[y, x] = flat + 1
    num_parts = ndimage.label(compact_HW)[1] if len(names) == 1 else 0
    if num_parts > 1:
        message = (
            f"{uri}: all {num_parts} connected parts have the number {names[0]}; expected one "
            "number per nucleus. Label the connected parts first (skimage.measure.label)."
        )
        raise ValueError(message)
    area = np.bincount(flat, minlength=len(names))
    sums = [np.bincount(flat, weights, minlength=len(names)) for weights in (x, y)]
    centroid_N2 = np.stack(sums, axis=1) / area[:, None] + 0.5
    types_N = np.full(len(names), UNKNOWN, np.str_)
    if types_uri is not None:
        types_N = _types_of(names, types_uri, uri)
    return NucleiFile(uri, centroid_N2, types_N, labels_HW=compact_HW)


def _types_of(labels: NDArray[np.integer], types_uri: str, uri: str) -> NDArray[np.str_]:
    """Return the type of each label, from a table with columns label and type."""
    table = read_table(types_uri, ("label", "type"))
    numbers = _numbers(table, "label", types_uri)
    by_label = dict(zip(numbers.astype(np.int64).tolist(), _names(table), strict=True))
    missing = [label for label in labels.tolist() if label not in by_label]
    if missing:
        message = (
            f"{types_uri}: has no row for {len(missing)} labels of {uri}, such as {missing[0]}; "
            "add a row with an empty type where the type is unknown"
        )
        raise ValueError(message)
    return np.array([by_label[label] for label in labels.tolist()], np.str_)


def _points(uri: str) -> NucleiFile:
    """Read the points of a table with columns x, y and optionally type."""
    table = read_table(uri, ("x", "y"))
    centroid_N2 = np.stack([_numbers(table, name, uri) for name in ("x", "y")], axis=1)
    names = _names(table) if "type" in table.columns else [UNKNOWN] * len(table)
    return NucleiFile(uri, centroid_N2, np.array(names, np.str_))


def read_table(uri: str, needed: tuple[str, ...]) -> pl.DataFrame:
    """Read a CSV or TSV as text, without its empty rows.

    Args:
        uri: Local path or fsspec URI.
        needed: Columns that the table must have.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is no table, or a column is missing.
    """
    if not storage.exists(uri):
        message = f"{uri}: no such file; check the path"
        raise FileNotFoundError(message)
    separator = "\t" if uri.lower().endswith(".tsv") else ","
    data = storage.read_bytes(uri)
    try:
        table = pl.read_csv(data, infer_schema=False, separator=separator)
    except pl.exceptions.PolarsError as error:
        reason = str(error).partition("\n")[0]
        message = f"{uri}: cannot be read as a table ({reason}); expected a header and rows"
        raise ValueError(message) from error
    for name in needed:
        if name not in table.columns:
            near = get_close_matches(name, table.columns, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            has = ", ".join(table.columns)
            message = f"{uri}: column {name} not found; it has {has}{hint}"
            raise ValueError(message)
    # Spreadsheets write empty lines.
    return table.filter(~pl.all_horizontal(pl.all().is_null()))


def _numbers(table: pl.DataFrame, name: str, uri: str) -> NDArray[np.float64]:
    """Return a column of finite numbers as float64.

    Raises:
        ValueError: a value is no finite number.
    """
    column = table[name].str.strip_chars().cast(pl.Float64, strict=False)
    is_wrong = column.is_null() | ~column.is_finite()
    if is_wrong.any():
        row = int(is_wrong.arg_max() or 0)
        message = f"{uri}: row {row + 1} has {name} {table[name][row]!r}; expected a number"
        raise ValueError(message)
    return column.to_numpy().astype(np.float64)


def _names(table: pl.DataFrame) -> list[str]:
    """Return the type column; UNKNOWN where it is empty."""
    return [str(name).strip() for name in table["type"].fill_null(UNKNOWN)]
