"""Read segmentations in GeoParquet: HEST's cellvit_seg, geopandas, and our CELLS tables."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from scellst_ray.core import schemas
from scellst_ray.nuclei.imported.rings import Rings
from scellst_ray.nuclei.imported.table import (
    BATCH,
    REASON,
    SEGMENTATION,
    TYPE_COLUMNS,
    UNTYPED,
    Tally,
    attach_report,
    class_name,
    make_table,
    type_names,
)

ENCODINGS = ("wkb", "polygon", "multipolygon")
# The start of a collection in WKB, with its flags and codes for heights, and its shortest length.
COLLECTION = re.compile(
    rb"\x01(?:\x07\x00\x00[\x00\x20\x40\x60\x80\xa0\xc0\xe0]|(?:\xef\x03|\xd7\x07|\xbf\x0b)\x00\x00)"
    rb"|\x00(?:[\x00\x20\x40\x60\x80\xa0\xc0\xe0]\x00\x00\x07|\x00\x00(?:\x03\xef|\x07\xd7|\x0b\xbf))"
)
COLLECTION_BYTES, MAX_DEPTH = 9, 32
AREAL = (
    shapely.GeometryType.POLYGON,
    shapely.GeometryType.MULTIPOLYGON,
    shapely.GeometryType.GEOMETRYCOLLECTION,
)


def read_geoparquet(path: Path, source: str) -> pa.Table:
    """Read a GeoParquet file as a SEGMENTATION table with its report, a batch of rows at a time.

    Args:
        path: Local path of the file.
        source: Name of the file in errors.

    Raises:
        ValueError: The file is damaged or no GeoParquet, holds no polygons, has types that are
            numbers, or is a CELLS table of a newer release.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            tally = Tally(source, "GeoParquet")
            column, encoding = _geometry_column(schema, tally)
            _check_doubled(schema, column, source)
            type_column = _type_column(schema, source)
            tables = list(_tables(file, column, encoding, type_column, tally))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        message = f"{source}: not a readable Parquet file ({error}); copy or export it again"
        raise ValueError(message) from error
    return attach_report(pa.concat_tables([SEGMENTATION.empty_table(), *tables]), tally)


def _geometry_column(schema: pa.Schema, tally: Tally) -> tuple[str, str]:
    """Return the primary geometry column and its encoding; set format and lonlat of the tally."""
    source = tally.source
    metadata = schema.metadata or {}
    try:
        geo = json.loads(metadata.get(b"geo", b"null"))
        column = geo["primary_column"]
        details = geo["columns"][column]
        encoding = str(details["encoding"]).lower().removeprefix("geoarrow.")
        schema.field(column)
    except (ValueError, TypeError, KeyError) as error:
        message = (
            f"{source}: is Parquet without a valid `geo` key, so no GeoParquet; its columns are "
            f"{schema.names[:12]}. Write it with geopandas (GeoDataFrame.to_parquet)"
        )
        raise ValueError(message) from error
    if encoding not in ENCODINGS:
        message = (
            f"{source}: column {column} has the encoding {encoding}; expected polygons "
            f"({', '.join(ENCODINGS)}): write it with geopandas (GeoDataFrame.to_parquet)"
        )
        raise ValueError(message)
    if not _holds(schema.field(column).type, encoding):
        message = (
            f"{source}: column {column} is {schema.field(column).type}, which cannot hold polygons "
            f"encoded as {encoding}: write it with geopandas (GeoDataFrame.to_parquet)"
        )
        raise ValueError(message)
    if metadata.get(b"scellst_ray.table") == b"CELLS":
        schemas.check(schema, "CELLS", source)
        tally.format = "CELLS"
    tally.lonlat = _is_lonlat(details)
    return column, encoding


def _holds(kind: pa.DataType, encoding: str) -> bool:
    """Return whether a column of this type can hold polygons in this encoding."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if encoding == "wkb":
        return kind in (pa.binary(), pa.large_binary())
    for _ in range(3 if encoding == "multipolygon" else 2):
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return False
        kind = kind.value_type
    if pa.types.is_struct(kind):
        names = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return all(pa.types.is_floating(names.get(name, pa.null())) for name in ("x", "y"))
    is_point = pa.types.is_fixed_size_list(kind) and kind.list_size >= 2
    return bool(is_point and pa.types.is_floating(kind.value_type))


def _is_lonlat(details: dict[str, Any]) -> bool:
    """Return whether a column holds longitude and latitude; by the standard also without a crs."""
    crs = details.get("crs", {"type": "GeographicCRS"})
    for _ in range(8):  # a compound or bound system states its own within
        if not isinstance(crs, dict):
            break
        parts = crs.get("components")
        crs = crs.get("source_crs") or (parts[0] if isinstance(parts, list) and parts else crs)
    if isinstance(crs, dict):
        kind, code = str(crs.get("type", "")), crs.get("id")
        code = code if isinstance(code, dict) else {}
        is_known = str(code.get("code")) in ("4326", "4979", "CRS84", "CRS84h")
        return kind.startswith(("Geographic", "Geodetic")) or (not kind and is_known)
    text = str(crs).upper()
    return text.startswith(("GEOG", "GEODCRS")) or text.endswith((":4326", "CRS84", "CRS84H"))


def _check_doubled(schema: pa.Schema, column: str, source: str) -> None:
    """Refuse a file that has a column of use twice, since nothing says which one counts."""
    for name in (column, *TYPE_COLUMNS, "type_prob", "x0", "y0"):
        if schema.names.count(name) > 1:
            message = f"{source}: column {name} is there twice; remove one of the two"
            raise ValueError(message)


def _type_column(schema: pa.Schema, source: str) -> str | None:
    """Return the first of TYPE_COLUMNS that can hold names; None if all are absent.

    Raises:
        ValueError: The present columns hold numbers.
    """
    present = [name for name in TYPE_COLUMNS if name in schema.names]
    for name in present:
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_struct(kind):
            return name
    numeric = [name for name in present if not pa.types.is_null(schema.field(name).type)]
    if numeric:
        kind = schema.field(numeric[0]).type
        message = (
            f"{source}: type column {numeric[0]} is {kind}; expected names, since the meaning of a "
            "number differs between tools. Write the names into it, or remove the column to import "
            "nuclei without types"
        )
        raise ValueError(message)
    return None


def _tables(
    file: pq.ParquetFile, column: str, encoding: str, type_column: str | None, tally: Tally
) -> Iterator[pa.Table]:
    """Yield the file as SEGMENTATION tables of at most BATCH rows."""
    columns = {column, type_column, "type_prob"}
    if tally.format == "CELLS":
        columns |= {"x0", "y0"}
    wanted = [name for name in file.schema_arrow.names if name in columns]
    for batch in file.iter_batches(BATCH, columns=wanted):
        geometry = batch[column]
        if isinstance(geometry, pa.ExtensionArray):
            geometry = geometry.storage
        if encoding == "wkb":
            rings = _from_wkb(geometry)
        else:
            rings = _from_lists(geometry, multi=encoding == "multipolygon")
        names = pa.repeat(UNTYPED, len(batch))
        if type_column is not None:
            names = type_names(_names(batch[type_column]), tally.source)
        if "type_prob" in wanted:
            probs = batch["type_prob"].cast(pa.float32()).to_numpy(zero_copy_only=False)
        else:
            probs = np.full(len(batch), np.nan, np.float32)
        centroid = None
        if tally.format == "CELLS":  # stored centroids keep a nucleus in its tile
            centroid = np.column_stack([batch["x0"], batch["y0"]]).astype(np.float64)
        yield make_table(rings, names, probs, tally, centroid)


def _names(values: pa.Array) -> pa.Array:
    """Return the names in a column of names or of QuPath's classes, string [N]."""
    if pa.types.is_struct(values.type):
        return pa.array([class_name(value) for value in values.to_pylist()], pa.string())
    if not pa.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    names = pa.array([class_name(value) for value in values.dictionary.to_pylist()], pa.string())
    return names.take(values.indices)


def _from_wkb(geometry: pa.Array) -> Rings:
    """Return the outer rings of WKB geometries; a row is an object."""
    stored = [None if _is_deep(wkb) else wkb for wkb in geometry.to_pylist()]
    shapes = shapely.from_wkb(np.array(stored, np.object_), on_invalid="ignore")
    kind = shapely.get_type_id(shapes)
    may_have_area = np.isin(kind, [-1, *AREAL])
    missing = np.where(may_have_area, "no_outline", "not_polygon").astype(REASON)
    parts, owner = shapely.get_parts(shapes, return_index=True)
    while (shapely.get_type_id(parts) > shapely.GeometryType.POLYGON).any():  # collections
        parts, inner = shapely.get_parts(parts, return_index=True)
        owner = owner[inner]
    areal = shapely.get_type_id(parts) == shapely.GeometryType.POLYGON
    parts, owner = parts[areal], owner[areal]
    has_hole = shapely.get_num_interior_rings(parts) > 0
    points, index = shapely.get_coordinates(shapely.get_exterior_ring(parts), return_index=True)
    return Rings(points, np.bincount(index, minlength=len(parts)), owner, missing, has_hole)


def _is_deep(wkb: bytes | None) -> bool:
    """Return whether collections in a geometry may lie in each other so deep that GEOS dies."""
    if wkb is None or len(wkb) < COLLECTION_BYTES * MAX_DEPTH:
        return False
    return COLLECTION.match(wkb) is not None and len(COLLECTION.findall(wkb)) > MAX_DEPTH


def _from_lists(geometry: pa.Array, *, multi: bool) -> Rings:
    """Return the outer rings of native encodings (lists of lists of points); a row is an object."""
    missing = np.full(len(geometry), "no_outline", REASON)
    owner = np.arange(len(geometry))
    if multi:
        owner = np.repeat(owner, _lengths(geometry))
        geometry = geometry.flatten()
    num_rings = _lengths(geometry)
    has_rings = num_rings > 0
    outer = geometry.flatten().take(pa.array((np.cumsum(num_rings) - num_rings)[has_rings]))
    points = outer.flatten()
    if isinstance(points, pa.FixedSizeListArray):
        points_x0y0 = points.flatten().to_numpy().reshape(-1, points.type.list_size)[:, :2]
    else:
        points_x0y0 = np.column_stack([points.field("x"), points.field("y")])
    has_hole = num_rings[has_rings] > 1
    points_x0y0 = points_x0y0.astype(np.float64)
    return Rings(points_x0y0, _lengths(outer), owner[has_rings], missing, has_hole)


def _lengths(lists: pa.Array) -> NDArray[np.int64]:
    """Return the length of every list, int64; 0 for null."""
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.asarray(lengths, np.int64)
