"""From other people's outlines to one table: valid polygons in level-0 px, types by name.

Every reader of a format hands over rings and names; here they become polygons, and what was left
out or mended on the way is counted, never silent. Arrays: P points, R rings, N objects, K kept.
"""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

SEGMENTATION = pa.schema(
    [
        pa.field("polygon", pa.binary(), nullable=False),
        pa.field("x0", pa.float64(), nullable=False),
        pa.field("y0", pa.float64(), nullable=False),
        pa.field("area0", pa.float64(), nullable=False),
        pa.field("nucleus_type", pa.string(), nullable=False),
        pa.field("type_prob", pa.float32()),
    ]
)
REPORT_KEY = b"scellst_ray.imported"
UNTYPED = "nucleus"
BATCH = 16_384
# A nucleus may be cut in pieces; an object of more parts than this is a whole class.
MAX_PARTS = 64
TYPE_COLUMNS = ("class", "classification", "nucleus_type", "cell_type", "type", "label")
# Wide enough for every reason.
REASON = np.dtype("U12")
_NUMBER = re.compile(r"[-+]?\d+(\.0*)?")


@dataclass
class Tally:
    """What became of the objects of one file: dropped + rows of the table = num_objects.

    Attributes:
        source: The file's name in errors.
        format: What it was read as.
        num_objects: Nuclei, or what could have been nuclei, in the file.
        dropped: Objects left out, by reason: `no_outline` (no geometry, an unreadable one, or
            fewer than 3 points), `not_finite`, `no_area`, `not_polygon`, `other_object` (of
            QuPath: an annotation beside cells, a tile), `outside` (of the slide).
        changed: Objects kept but not as given: `repaired` (invalid), `hole_filled`,
            `largest_part` (the others left out), `cell_outline` (a cell without its nucleus).
        lonlat: Whether the file says its coordinates are longitude and latitude.
    """

    source: str
    format: str
    num_objects: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    lonlat: bool = False


@dataclass(frozen=True)
class Rings:
    """Outer rings, each of one part of an object.

    Attributes:
        points_x0y0: float64 [P, 2], one ring after the other, closed or not.
        lengths: int64 [R], points per ring.
        owner: int64 [R], ascending: the number of the object a ring belongs to.
        missing: str [N], why an object has no ring, if it has none (a key of `Tally.dropped`).
    """

    points_x0y0: NDArray[np.float64]
    lengths: NDArray[np.int64]
    owner: NDArray[np.int64]
    missing: NDArray[np.str_]

    def of(self, start: int, stop: int) -> "Rings":
        """Return the rings of objects `start` to `stop`, counted from `start`."""
        first, last = np.searchsorted(self.owner, [start, stop])
        offset = self.lengths[:first].sum()
        lengths = self.lengths[first:last]
        points = self.points_x0y0[offset : offset + lengths.sum()]
        return Rings(points, lengths, self.owner[first:last] - start, self.missing[start:stop])


def table_of(
    rings: Rings,
    names: pa.Array,
    probs: NDArray[np.float32],
    tally: Tally,
    centroid_x0y0: NDArray[np.float64] | None = None,
) -> pa.Table:
    """Turn objects into a SEGMENTATION table in their order, adding to `tally`.

    Args:
        rings: Their outer rings.
        names: string [N], type names as `type_names` returns them.
        probs: float32 [N], NaN where there is none.
        tally: Counts what is dropped and changed.
        centroid_x0y0: float64 [N, 2], level-0 px; None to take the polygons' own.

    Raises:
        ValueError: An object has so many parts that it is a class of nuclei, not a nucleus.
    """
    batches = []
    for start in range(0, len(names), BATCH):
        stop = min(start + BATCH, len(names))
        kept, polygons = _outlines(rings.of(start, stop), tally)
        rows = start + kept
        if centroid_x0y0 is None:
            centroids = shapely.get_coordinates(shapely.centroid(polygons))
        else:
            centroids = centroid_x0y0[rows]
        columns = {
            "polygon": pa.array(shapely.to_wkb(polygons), pa.binary()),
            "x0": centroids[:, 0],
            "y0": centroids[:, 1],
            "area0": shapely.area(polygons),
            "nucleus_type": names.take(pa.array(rows)),
            "type_prob": pa.array(probs[rows], pa.float32(), from_pandas=True),
        }
        batches.append(pa.table(columns, schema=SEGMENTATION))
    return pa.concat_tables([SEGMENTATION.empty_table(), *batches])


def with_report(table: pa.Table, tally: Tally) -> pa.Table:
    """Return the table with the tally in its schema metadata.

    Raises:
        ValueError: The file holds objects, but none that gives the outline of a nucleus.
    """
    if tally.num_objects and not len(table):
        reasons = ", ".join(f"{count} {name}" for name, count in tally.dropped.items())
        message = (
            f"{tally.source}: none of its {tally.num_objects} objects gives the outline of a "
            f"nucleus ({reasons}). Expected polygons; CellViT's cell_detection files hold points "
            "only: give its cells.json or cells.geojson"
        )
        raise ValueError(message)
    report = json.dumps(asdict(tally) | {"dropped": +tally.dropped, "changed": +tally.changed})
    return table.replace_schema_metadata({REPORT_KEY: report.encode()})


def import_report(table: pa.Table) -> dict[str, Any]:
    """Return the fields of `Tally` of a table read by `read_segmentation`."""
    report: dict[str, Any] = json.loads(table.schema.metadata[REPORT_KEY])
    return report


def class_name(value: object) -> str | None:
    """Return the name in a class as QuPath and geopandas write it; None if there is none.

    A string, `{"name": ...}`, `{"names": [...]}` (joined by ": ", as QuPath shows them), or the
    JSON of such an object in a string.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return str(value).strip()
    if isinstance(value, dict):
        value = value.get("name") or ": ".join(map(str, value.get("names") or []))
    return None if value is None else str(value).strip() or None


def type_names(names: pa.Array, source: str) -> pa.Array:
    """Return names, string [N], with `nucleus` where there is none.

    Raises:
        ValueError: A name is a number: what it stands for differs between tools.
    """
    column = pc.fill_null(names, UNTYPED)
    for name in pc.unique(column).to_pylist():
        if _NUMBER.fullmatch(name):
            message = (
                f"{source}: a nucleus type is the number {name}; expected names, since what a "
                "number stands for differs between tools. Write the names into the file, or "
                "remove its type column to import nuclei without types"
            )
            raise ValueError(message)
    return column


def _outlines(rings: Rings, tally: Tally) -> tuple[NDArray[np.int64], NDArray[np.object_]]:
    """Return which objects have an outline, int64 [K], and it, valid polygons [K]."""
    reason = rings.missing.copy()
    tally.num_objects += len(reason)
    most = np.bincount(rings.owner, minlength=1).max()
    if most > MAX_PARTS:
        message = (
            f"{tally.source}: an object has {most} parts, so it is a class of nuclei rather than "
            "a nucleus. Write one object per nucleus (geopandas: GeoDataFrame.explode); parts of "
            "one are taken for nuclei only in a bare list of classified MultiPolygon annotations"
        )
        raise ValueError(message)
    polygons, owner = _polygons(rings, reason)
    invalid = ~shapely.is_valid(polygons)
    polygons[invalid] = _repaired(polygons[invalid])
    area = shapely.area(polygons)
    usable = np.isfinite(area) & (area > 0)
    reason[owner[~usable]] = "no_area"
    polygons, owner, invalid = polygons[usable], owner[usable], invalid[usable]
    chosen, num_parts = _largest(owner, area[usable])
    lost = np.ones(len(reason), np.bool_)
    lost[owner[chosen]] = False
    tally.dropped.update(reason[lost].tolist())
    tally.changed["repaired"] += int(invalid[chosen].sum())
    tally.changed["largest_part"] += int((num_parts > 1).sum())
    return owner[chosen], polygons[chosen]


def _polygons(
    rings: Rings, reason: NDArray[np.str_]
) -> tuple[NDArray[np.object_], NDArray[np.int64]]:
    """Return the polygons of usable rings and their owners; note in `reason` why others are not."""
    reason[rings.owner] = "no_outline"
    points, lengths = rings.points_x0y0, rings.lengths
    ring = np.repeat(np.arange(len(lengths)), lengths)
    strange = np.bincount(ring[~np.isfinite(points).all(axis=1)], minlength=len(lengths)) > 0
    reason[rings.owner[strange]] = "not_finite"
    last = np.cumsum(lengths) - 1
    some = lengths > 1
    closed = np.zeros(len(lengths), np.bool_)
    closed[some] = (points[last[some]] == points[(last - lengths + 1)[some]]).all(axis=1)
    usable = ~strange & (lengths - closed >= 3)
    wanted = usable[ring]
    wanted[last[closed]] = False
    number = np.cumsum(usable) - 1
    closed_rings = shapely.linearrings(points[wanted], indices=number[ring[wanted]])
    return np.atleast_1d(shapely.polygons(closed_rings)), rings.owner[usable]


def _repaired(polygons: NDArray[np.object_]) -> NDArray[np.object_]:
    """Return the largest valid part of each polygon, without holes; None where there is none."""
    # Twice: a collection may hold a MultiPolygon beside the lines of spikes.
    parts, owner = shapely.get_parts(shapely.make_valid(polygons), return_index=True)
    parts, inner = shapely.get_parts(parts, return_index=True)
    owner = owner[inner]
    areal = shapely.get_type_id(parts) == shapely.GeometryType.POLYGON
    parts, owner = parts[areal], owner[areal]
    chosen, _ = _largest(owner, shapely.area(parts))
    result = np.full(len(polygons), None, np.object_)
    result[owner[chosen]] = shapely.polygons(shapely.get_exterior_ring(parts[chosen]))
    return result


def _largest(
    owner: NDArray[np.int64], area: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each owner's largest part (the first of equals), by owner, and how many it has."""
    _, start, count = np.unique(owner, return_index=True, return_counts=True)
    return np.lexsort((-area, owner))[start], count
