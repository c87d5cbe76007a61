"""Turn the outlines of other tools into one table: valid polygons in level-0 px, types by name.

The readers of the formats return rings and names. This module makes polygons of them and counts
every object that is left out or repaired. Arrays: P points, R rings, N objects, K kept objects.
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

from scellst_ray.nuclei.imported.rings import Rings, split_classes

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
TYPE_COLUMNS = ("class", "classification", "nucleus_type", "cell_type", "type", "label")
# Type of the reasons in `Tally.dropped`, wide enough for the longest.
REASON = np.dtype("U12")
_NUMBER = re.compile(r"[-+]?\d+(\.0*)?")


@dataclass
class Tally:
    """Counts of the objects of one file: dropped + rows of the table = num_objects.

    Attributes:
        source: Name of the file in errors.
        format: Format as which the file was read.
        num_objects: Number of nuclei, and of objects that could be nuclei, in the file.
        dropped: Number of objects left out, by reason. `no_outline`: no readable geometry, or
            fewer than 3 points. `other_object`: QuPath's tiles, and annotations in a file with
            cells. `outside`: not on the slide. `too_large`, `too_small`, `doubled`: see sift.py.
            Further: `not_finite`, `no_area`, `not_polygon`.
        changed: Number of objects kept with changes: `repaired` (was invalid), `hole_filled`,
            `largest_part` (further parts left out), `class_part` (part of an object that is a
            class of nuclei), `cell_outline` (a cell without its nucleus).
        lonlat: Whether the file declares its coordinates as longitude and latitude.
    """

    source: str
    format: str
    num_objects: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    lonlat: bool = False


def make_table(
    rings: Rings,
    names: pa.Array,
    probs: NDArray[np.float32],
    tally: Tally,
    centroid_x0y0: NDArray[np.float64] | None = None,
) -> pa.Table:
    """Turn objects into a SEGMENTATION table in their order, and count them in `tally`.

    Args:
        rings: Outer rings of the objects.
        names: Type names as `type_names` returns them, string [N].
        probs: Probabilities of the types, NaN if unknown, float32 [N].
        tally: Counts of the file; dropped and changed objects are added to it.
        centroid_x0y0: Centroids in level-0 px, float64 [N, 2]; None computes them.
    """
    batches = []
    rings, source = split_classes(rings)
    is_part = np.bincount(source)[source] > 1 if len(source) else source > 0
    for start in range(0, len(source), BATCH):
        stop = min(start + BATCH, len(source))
        kept, polygons = _outlines(rings.select(start, stop), tally)
        tally.changed["class_part"] += int(is_part[start + kept].sum())
        rows = source[start + kept]
        if centroid_x0y0 is None or is_part[start + kept].any():
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


def attach_report(table: pa.Table, tally: Tally) -> pa.Table:
    """Return the table with the tally in its schema metadata.

    Raises:
        ValueError: The file holds objects, but none has the outline of a nucleus.
    """
    if tally.num_objects and not len(table):
        reasons = ", ".join(f"{count} {name}" for name, count in (+tally.dropped).items())
        message = (
            f"{tally.source}: none of its {tally.num_objects} objects has the outline of a nucleus "
            f"({reasons}). Expected polygons; CellViT's cell_detection files hold only points: "
            "give its cells.json or cells.geojson"
        )
        raise ValueError(message)
    report = json.dumps(asdict(tally) | {"dropped": +tally.dropped, "changed": +tally.changed})
    return table.replace_schema_metadata({REPORT_KEY: report.encode()})


def import_report(table: pa.Table) -> dict[str, Any]:
    """Return the fields of the `Tally` in the metadata of a table of `read_segmentation`."""
    report: dict[str, Any] = json.loads(table.schema.metadata[REPORT_KEY])
    return report


def class_name(value: object) -> str | None:
    """Return the name in a class as QuPath or geopandas writes it; None if it has no name.

    Args:
        value: A string, `{"name": ...}`, `{"names": [...]}` (joined by ": ", as QuPath shows them),
            or the JSON of such an object in a string.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return str(value).strip()
    if isinstance(value, dict):
        names = value.get("names")
        joined = ": ".join(map(str, names)) if isinstance(names, list) else names
        value = value.get("name") or joined
    if value is None:
        return None
    # A half of a surrogate pair, which JSON can hold, is no character.
    return str(value).encode("utf-8", "replace").decode().strip() or None


def type_names(names: pa.Array, source: str) -> pa.Array:
    """Return names, string [N], with `nucleus` for missing ones.

    Args:
        names: Names or null, string [N].
        source: Name of the file in errors.

    Raises:
        ValueError: A name is a number, whose meaning differs between tools.
    """
    column = pc.fill_null(names, UNTYPED)
    for name in pc.unique(column).to_pylist():
        if _NUMBER.fullmatch(name):
            message = (
                f"{source}: a nucleus type is the number {name}; expected names, since the meaning "
                "of a number differs between tools. Write the names into the file, or remove its "
                "type column to import nuclei without types"
            )
            raise ValueError(message)
    return column


def _outlines(rings: Rings, tally: Tally) -> tuple[NDArray[np.int64], NDArray[np.object_]]:
    """Return which objects have an outline, int64 [K], and their valid polygons [K]."""
    reason = rings.missing.copy()
    tally.num_objects += len(reason)
    tally.changed["hole_filled"] += len(np.unique(rings.owner[rings.has_hole]))
    polygons, owner = _polygons(rings, reason)
    invalid = ~shapely.is_valid(polygons)
    polygons[invalid] = _repair(polygons[invalid])
    area = shapely.area(polygons)
    usable = np.isfinite(area) & (area > 0)
    reason[owner[~usable]] = "no_area"
    polygons, owner, invalid = polygons[usable], owner[usable], invalid[usable]
    chosen, num_parts = _largest(owner, area[usable])
    is_dropped = np.ones(len(reason), np.bool_)
    is_dropped[owner[chosen]] = False
    tally.dropped.update(reason[is_dropped].tolist())
    tally.changed["repaired"] += int(invalid[chosen].sum())
    tally.changed["largest_part"] += int((num_parts > 1).sum())
    return owner[chosen], polygons[chosen]


def _polygons(
    rings: Rings, reason: NDArray[np.str_]
) -> tuple[NDArray[np.object_], NDArray[np.int64]]:
    """Return the polygons of usable rings and their owners; write into `reason` why a ring is not.

    Args:
        rings: Outer rings of N objects.
        reason: Reason why an object is dropped, str [N]; changed in place.
    """
    reason[rings.owner] = "no_outline"
    points, lengths = rings.points_x0y0, rings.lengths
    ring = np.repeat(np.arange(len(lengths)), lengths)
    not_finite = np.bincount(ring[~np.isfinite(points).all(axis=1)], minlength=len(lengths)) > 0
    reason[rings.owner[not_finite]] = "not_finite"
    last = np.cumsum(lengths) - 1
    several = lengths > 1
    is_closed = np.zeros(len(lengths), np.bool_)
    is_closed[several] = (points[last[several]] == points[(last - lengths + 1)[several]]).all(
        axis=1
    )
    usable = ~not_finite & (lengths - is_closed >= 3)
    wanted = usable[ring]
    wanted[last[is_closed]] = False
    number = np.cumsum(usable) - 1
    closed_rings = shapely.linearrings(points[wanted], indices=number[ring[wanted]])
    return np.atleast_1d(shapely.polygons(closed_rings)), rings.owner[usable]


def _repair(polygons: NDArray[np.object_]) -> NDArray[np.object_]:
    """Return the largest valid part of each polygon, without holes; None if it has no area."""
    # A repaired polygon may be a collection of lines (spikes) and a MultiPolygon: split it twice.
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
    """Return the index of each owner's largest part (the first of equal ones), and its parts."""
    _, start, count = np.unique(owner, return_index=True, return_counts=True)
    return np.lexsort((-area, owner))[start], count
