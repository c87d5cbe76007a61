"""Import segmentations of other tools, so that a segmented slide is not segmented again.

1. `read_segmentation` turns a file of any common format into one table of nuclei.
2. `check_within` checks that the nuclei lie on the slide.
3. `publish_by_tile` stores the table once per slide, sorted by tile. A tile is a box of the slide
   that workers process at once; its core is the part that belongs to no other tile.
4. `read_tile` and `nuclei_in_frame` give a worker the nuclei of its tile in place of a segmenter.

Coordinates are level-0 px and stay unchanged. CellViT writes the indices of contour pixels. So its
outlines pass through the middles of the outermost pixels and lie half a pixel up and left.
"""

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.core.geometry import Frame
from scellst_ray.core.text import errors_in_one_line
from scellst_ray.nuclei.imported.read_json import read_json
from scellst_ray.nuclei.imported.read_parquet import read_geoparquet
from scellst_ray.nuclei.imported.sift import find_doubled, find_impossible
from scellst_ray.nuclei.imported.table import REPORT_KEY, SEGMENTATION, import_report
from scellst_ray.nuclei.instances import Nuclei

FORMATS = (
    "GeoParquet, GeoJSON (QuPath, HEST, CellViT) or CellViT's cells.json, JSON also as .gz or "
    ".snappy"
)
MAX_OUTSIDE = 0.05
# Allowed median area of nuclei; that of any tissue is 15 to 100 um2.
MEDIAN_UM2 = (5.0, 1000.0)
ROW_GROUP = 5_000
# Outlines as text shrink to a tenth or so. More than this is a file made to fill the memory.
MAX_UNPACKED, FREE_UNPACKED = 60, 1 << 26
_BY_TILE = pa.schema([pa.field("tile_id", pa.int64(), nullable=False), *SEGMENTATION])


@errors_in_one_line()
def read_segmentation(path: Path, source: str) -> pa.Table:
    """Read a segmentation as a SEGMENTATION table, in the order of the file.

    A row is a nucleus: its polygon (WKB, valid, without holes), centroid x0 and y0, area0 (level-0
    px, px2), nucleus_type and type_prob. `import_report` of the table returns the format and the
    numbers of objects that were dropped or repaired.

    Args:
        path: Local path of the file. Its content determines the format, except for `.snappy`.
        source: Name (URI) of the file in errors.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not one of FORMATS, is damaged, holds no outlines, or has types
            that are numbers.
    """
    if path.is_dir():
        message = f"{source}: is a folder; expected one file per slide: {FORMATS}"
        raise ValueError(message)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        return read_geoparquet(path, source)
    if magic == b"PK\x03\x04":
        message = f"{source}: is a zip archive (or a PyTorch file); unzip it and give {FORMATS}"
        raise ValueError(message)
    return read_json(_text(path, source), source)


def _text(path: Path, source: str) -> str:
    """Return the text of a JSON file, plain or compressed."""
    data, suffix = path.read_bytes(), path.suffix
    try:
        if data.startswith(b"\x1f\x8b"):
            data, suffix = _from_gzip(data), path.with_suffix("").suffix
        is_text = data.removeprefix(b"\xef\xbb\xbf")[:256].lstrip()[:1] in (b"{", b"[")
        if suffix == ".snappy" or not is_text:
            data = _from_snappy(data)
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        hint = " in UTF-16: save it as UTF-8" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        message = f"{source}: not readable as a segmentation{hint} ({error}); expected {FORMATS}"
        raise ValueError(message) from error


def _from_gzip(data: bytes) -> bytes:
    """Return unpacked data, of at most MAX_UNPACKED times its length or FREE_UNPACKED bytes.

    Raises:
        ValueError: The data unpack to more.
        OSError, EOFError, zlib.error: The data are damaged or cut off.
    """
    limit = max(FREE_UNPACKED, MAX_UNPACKED * len(data))
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        unpacked = file.read(limit + 1)
    if len(unpacked) > limit:
        message = f"its {len(data):,} bytes unpack to more than {limit:,}, so it is no outlines"
        raise ValueError(message)
    return unpacked


def _from_snappy(data: bytes) -> bytes:
    """Return decompressed data in the raw snappy format: its length as a varint, then blocks.

    Raises:
        ValueError: The length is no number, or exceeds the capacity of the data.
        OSError: The blocks are damaged.
    """
    length = 0
    for position, byte in enumerate(data[:5]):
        length |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            break
    else:
        length = -1
    # A block of 3 bytes holds at most 64.
    if not 0 < length <= 32 * len(data):
        message = f"not JSON, gzip or snappy: it begins with {data[:8]!r}"
        raise ValueError(message)
    return bytes(pa.decompress(data, decompressed_size=length, codec="snappy", asbytes=True))


def check_within(
    table: pa.Table, width0: int, height0: int, source: str, mpp: float | None = None
) -> pa.Table:
    """Return the nuclei whose centroid lies on the slide, each once; count the rest by reason.

    A share of up to MAX_OUTSIDE may lie outside (nuclei on the edge of the scan). Coordinates in um
    or in px of a smaller level lie on the slide too. The size of the nuclei shows such a mistake,
    if `mpp` is given. Objects that cannot be nuclei and nuclei that are there twice are left out
    (sift.py); of nuclei that are the same the first in the file stays.

    Args:
        table: Table as `read_segmentation` returns it.
        width0: Width of the slide in level-0 px.
        height0: Height of the slide in level-0 px.
        source: Name of the segmentation in errors.
        mpp: Resolution of the slide, um per level-0 px.

    Raises:
        ValueError: The coordinates cannot be level-0 px of this slide.
    """
    if not len(table):
        return table
    x0, y0 = table["x0"].to_numpy(), table["y0"].to_numpy()
    inside = (x0 >= 0) & (x0 < width0) & (y0 >= 0) & (y0 < height0)
    problem = _problem(table, (width0, height0), inside, mpp)
    if problem:
        message = (
            f"{source}: its coordinates cannot be level-0 px of a slide of {width0} x {height0}: "
            f"{problem}. Convert them to level-0 px and give the converted file"
        )
        raise ValueError(message)
    table = _without(table, {"outside": ~inside})
    table = _without(table, {"doubled": find_doubled(table, source)})
    return _without(table, find_impossible(table, mpp))


def _problem(
    table: pa.Table, size0: tuple[int, int], inside: NDArray[np.bool_], mpp: float | None
) -> str | None:
    """Return why coordinates cannot be level-0 px of the slide, and the likely cause, or None."""
    x0, y0 = table["x0"].to_numpy(), table["y0"].to_numpy()
    is_small = np.abs(x0).max() <= 180 and np.abs(y0).max() <= 90
    if import_report(table)["lonlat"] and is_small and (size0[0] > 180 or size0[1] > 90):
        return (
            "the file declares longitude and latitude (GeoParquet without `crs` does), and the "
            "values are in their range; if they are px, write the file with `crs` null"
        )
    if 1 - inside.mean() <= MAX_OUTSIDE:
        return None if mpp is None else _size_problem(table, mpp)
    inside_swapped = (y0 >= 0) & (y0 < size0[0]) & (x0 >= 0) & (x0 < size0[1])
    if 1 - inside_swapped.mean() <= MAX_OUTSIDE:
        cause = "x and y seem to be swapped, since swapped coordinates fit"
    elif ((x0 < 0) | (y0 < 0)).mean() > MAX_OUTSIDE:
        cause = "they seem to have another origin, or y points upwards"
    else:
        cause = "they may be px of another level, another unit, or px of another slide"
    return (
        f"{1 - inside.mean():.0%} of {len(x0)} centroids lie outside "
        f"(x {x0.min():.0f} to {x0.max():.0f}, y {y0.min():.0f} to {y0.max():.0f}); {cause}"
    )


def _size_problem(table: pa.Table, mpp: float) -> str | None:
    """Return that the nuclei are too small or too large for their slide, or None."""
    area0 = table["area0"].to_numpy()
    # Of an even number the lower one: a nucleus and a region have the median of a nucleus.
    median_um2 = float(np.quantile(area0, 0.5, method="lower")) * mpp**2
    if MEDIAN_UM2[0] <= median_um2 <= MEDIAN_UM2[1]:
        return None
    return (
        f"the median nucleus would have {median_um2:.3g} um2 at {mpp} um/px, expected "
        f"{MEDIAN_UM2[0]:.0f} to {MEDIAN_UM2[1]:.0f}; they may be um or px of another level, or "
        "the objects may not be nuclei"
    )


def _without(table: pa.Table, reasons: Mapping[str, NDArray[np.bool_]]) -> pa.Table:
    """Return the table without the rows that have a reason, which the report then counts.

    Args:
        table: SEGMENTATION table of N rows.
        reasons: For each reason which rows it has, bool [N]; no row has two.
    """
    counts = {reason: int(rows.sum()) for reason, rows in reasons.items() if rows.any()}
    if not counts:
        return table
    report = import_report(table)
    report["dropped"] = dict(Counter(report["dropped"]) + Counter(counts))
    kept = ~np.logical_or.reduce(list(reasons.values()))
    table = table.filter(pa.array(kept))
    return table.replace_schema_metadata({REPORT_KEY: json.dumps(report).encode()})


def publish_by_tile(
    table: pa.Table, edges_x: NDArray[np.integer], edges_y: NDArray[np.integer], uri: str
) -> dict[str, Any]:
    """Store a slide's nuclei sorted by (tile_id, y0, x0), so that one tile can be read alone.

    A row group holds whole tiles: several small ones of at most ROW_GROUP nuclei, or one tile. The
    tile_id is row * (len(edges_x) - 1) + column of the core that holds the centroid. A centroid on
    an edge belongs to the core to the right or below.

    Args:
        table: Table as `read_segmentation` or `check_within` returns it.
        edges_x: Edges of the cores along x in level-0 px, ascending, from 0 to the slide's width.
        edges_y: Edges of the cores along y in level-0 px, ascending.
        uri: Path or URI of the file.

    Returns:
        The report of the stored table; nuclei beyond the edges are dropped as `outside`.
    """
    x0, y0 = table["x0"].to_numpy(), table["y0"].to_numpy()
    column, row = (
        np.searchsorted(edges, values, side="right") - 1
        for edges, values in ((edges_x, x0), (edges_y, y0))
    )
    num_columns, num_rows = len(edges_x) - 1, len(edges_y) - 1
    inside = (column >= 0) & (column < num_columns) & (row >= 0) & (row < num_rows)
    tile_id = row * num_columns + column
    table, tile_id, x0, y0 = (
        _without(table, {"outside": ~inside}),
        *(values[inside] for values in (tile_id, x0, y0)),
    )
    order = np.lexsort((x0, y0, tile_id))
    metadata = dict(table.schema.metadata)
    schema = schemas.sign_schema(_BY_TILE, "SEGMENTATION", extra=metadata)
    # A million nuclei in one array exceed the 2 GiB of 32-bit offsets.
    large = pa.schema([f.with_type(_large(f.type)) for f in SEGMENTATION], metadata)
    table = table.cast(large).combine_chunks()
    groups = _groups(tile_id[order])

    def write(writer: pq.ParquetWriter) -> None:
        for start, stop in groups:
            rows = order[start:stop]
            part = table.take(pa.array(rows)).add_column(0, schema.field(0), [tile_id[rows]])
            writer.write_table(part.cast(schema), row_group_size=len(rows))

    storage.publish_stamped(uri, schema, write, write_statistics=["tile_id"])
    return import_report(table)


def _large(kind: pa.DataType) -> pa.DataType:
    """Return the type with 64-bit offsets; other types unchanged."""
    return {pa.binary(): pa.large_binary(), pa.string(): pa.large_string()}.get(kind, kind)


def _groups(tile_id: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return (start, stop) of the row groups over ascending tile ids."""
    stops = np.flatnonzero(np.diff(tile_id, append=-1)) + 1
    groups, begin, end = [], 0, 0
    for stop in stops.tolist():
        if stop - begin > ROW_GROUP and end > begin:
            groups.append((begin, end))
            begin = end
        end = stop
    return [*groups, (begin, end)] if end else []


def read_tile(uri: str, tile_id: int) -> pa.Table:
    """Return the nuclei of one tile as a SEGMENTATION table in the order of (y0, x0).

    Only the row group of the tile is read. A tile without nuclei gives an empty table.

    Args:
        uri: Path or URI of a file that `publish_by_tile` wrote.
        tile_id: Number of the tile.

    Raises:
        ValueError: `publish_by_tile` did not write the file, or a newer release did.
    """
    with storage.open_parquet(uri) as file:
        schemas.check(file.schema_arrow, "SEGMENTATION", uri)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        bounds = [group.column(0).statistics for group in groups]
        wanted = [i for i, bound in enumerate(bounds) if bound.min <= tile_id <= bound.max]
        table = file.read_row_groups(wanted, use_threads=False)
    return table.filter(pc.equal(table["tile_id"], tile_id)).drop_columns(["tile_id"])


def nuclei_in_frame(table: pa.Table, frame: Frame) -> Nuclei:
    """Return the nuclei of a SEGMENTATION table in px of an image, in the same order.

    Args:
        table: Table as `read_tile` returns it.
        frame: Frame of the image on the slide.
    """
    polygons = shapely.from_wkb(table["polygon"].to_numpy())
    points_x0y0, index = shapely.get_coordinates(polygons, return_index=True)
    closing = np.diff(index, append=-1) != 0
    offsets = np.concatenate([[0], np.cumsum(np.bincount(index, minlength=len(table)) - 1)])
    centroid_x0y0 = np.column_stack([table["x0"].to_numpy(), table["y0"].to_numpy()])
    return Nuclei(
        centroid_px=frame.from_level0(centroid_x0y0),
        area_px=table["area0"].to_numpy() / frame.area_ratio,
        contour_points_px=frame.from_level0(points_x0y0[~closing]),
        contour_offsets=offsets.astype(np.int64),
        nucleus_type=np.array(table["nucleus_type"].to_pylist(), np.str_),
        type_prob=table["type_prob"].to_numpy().astype(np.float32),
    )
