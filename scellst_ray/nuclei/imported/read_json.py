"""Read segmentations in JSON: CellViT's cells.json, GeoJSON of QuPath, HEST, CellViT, geopandas.

During parsing every complete cell or feature moves into flat arrays. So memory holds the text and
16 bytes per point instead of a Python object per number. A class of nuclei in one MultiPolygon
(CellViT, HEST) is complete only at its end.
"""

import json
from array import array
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scellst_ray.nuclei.imported.rings import Rings
from scellst_ray.nuclei.imported.table import (
    REASON,
    TYPE_COLUMNS,
    UNTYPED,
    Tally,
    attach_report,
    class_name,
    make_table,
    type_names,
)

# Type numbers of PanNuke, on which CellViT's weights are trained; its files use them.
PANNUKE = {
    0: "Background",
    1: "Neoplastic",
    2: "Inflammatory",
    3: "Connective",
    4: "Dead",
    5: "Epithelial",
}
_NUCLEI = ["cell", "detection"]
_NEVER_NUCLEI = ["root", "tile", "tmacore"]
_AREAL = ("Polygon", "MultiPolygon", "GeometryCollection")
_GEOMETRIES = (*_AREAL, "Point", "MultiPoint", "LineString", "MultiLineString")
# Stands in a parsed document for a cell or feature that the collector has taken.
_TAKEN = object()


def read_json(text: str, source: str) -> pa.Table:
    """Read a JSON segmentation as a SEGMENTATION table with its report.

    Args:
        text: Content of the file.
        source: Name of the file in errors.

    Raises:
        ValueError: The JSON is damaged or another kind of document, holds points instead of
            outlines, or has types that are numbers without names.
    """
    collector = _Collector(source)
    try:
        document = json.loads(text, object_hook=collector.take)
    except _OutlineError:
        raise
    except RecursionError as error:
        message = f"{source}: its JSON is nested too deeply; export it again"
        raise ValueError(message) from error
    except ValueError as error:
        message = (
            f"{source}: damaged JSON ({error}); the file may be cut off: copy or export it again"
        )
        raise ValueError(message) from error
    del text
    members = _members(document)
    if isinstance(members.get("cells"), list):
        return _cellvit_table(members, collector)
    features = document if isinstance(document, list) else members.get("features")
    if members.get("type") in _GEOMETRIES:
        features, members = [document], {}
    if isinstance(features, list):
        collector.take_rest(features)
    if isinstance(members.get("features"), list) or collector.kinds or document == []:
        is_list = isinstance(document, list)
        return _geojson_table(collector, crs=members.get("crs"), is_list=is_list)
    content = f"an object with the keys {sorted(members)[:8]}" if members else "no GeoJSON features"
    message = (
        f"{source}: found {content}; expected CellViT's cells.json (`cells` with contours) or "
        "GeoJSON (a FeatureCollection or a list of Features)"
    )
    raise ValueError(message)


class _OutlineError(ValueError):
    """An outline that is no list of points; the message names the file."""


class _Collector:
    """Collector of the cells and features of a document while it is parsed."""

    def __init__(self, source: str) -> None:
        self.source = source
        # Outer rings in order: all coordinates, points per ring, whether the ring had holes.
        self.coordinates, self.lengths, self.holes = array("d"), array("q"), bytearray()
        # CellViT's cells, one ring each: type and probability.
        self.types: list[float | str | None] = []
        self.probs = array("f")
        # Features: QuPath's object type, class, number of rings, and the reason if that is 0.
        self.kinds: list[str] = []
        self.names: list[str | None] = []
        self.num_rings = array("q")
        self.missing: list[str] = []
        self.may_be_class = bytearray()

    def take(self, value: dict[str, Any]) -> object:
        """Store a cell or feature in the arrays and return _TAKEN; return other objects unchanged.

        The JSON parser calls this hook with every complete object.
        """
        if "contour" in value:
            kind, prob = value.get("type"), value.get("type_prob")
            self.types.append(kind if isinstance(kind, int | float) else class_name(kind))
            self.probs.append(prob if isinstance(prob, float) or prob in (0, 1) else np.nan)
            self._add_ring(value["contour"] or [], has_hole=False)
            return _TAKEN
        if value.get("type") == "Feature":
            self._add_feature(value)
            return _TAKEN
        return value

    def take_rest(self, features: list[Any]) -> None:
        """Store the entries of a list of features that are none: bare geometries, null and others.

        They count as annotations. Without an outline they are counted as dropped.
        """
        for entry in features:
            if entry is not _TAKEN and (self.kinds or _members(entry).get("type") in _GEOMETRIES):
                self._add_feature({"geometry": entry})

    def _add_feature(self, feature: dict[str, Any]) -> None:
        """Add a feature, its class and its outer rings."""
        properties = _members(feature.get("properties"))
        kind = str(properties.get("objectType") or properties.get("object_type") or "annotation")
        kind = kind.lower().replace("_", "")
        geometry = _members(feature.get("nucleusGeometry") or feature.get("geometry"))
        if kind == "cell" and not feature.get("nucleusGeometry"):
            kind = "cell without nucleus"
        classes = (properties.get(key) for key in ("classification", *TYPE_COLUMNS))
        name = next((name for name in map(class_name, classes) if name), None)
        shape = str(geometry.get("type"))
        polygons = _polygons_of(geometry)
        for rings in polygons:
            outer, *holes = rings if isinstance(rings, list) else [rings]
            self._add_ring(outer, has_hole=bool(holes))
        self.kinds.append(kind)
        self.names.append(name)
        self.num_rings.append(len(polygons))
        may_have_area = shape in (*_AREAL, "None")
        self.missing.append("no_outline" if may_have_area else "not_polygon")
        self.may_be_class.append(
            shape == "MultiPolygon" and kind == "annotation" and name is not None
        )

    def _add_ring(self, points: Any, *, has_hole: bool) -> None:  # noqa: ANN401 - as parsed
        """Add one ring; further coordinates than x and y (a height) are dropped."""
        try:
            ring = np.array(points, np.float64)
        except (TypeError, ValueError, OverflowError):
            ring = np.zeros(1)  # the check below rejects ragged lists and values without numbers
        if points == []:
            ring = np.zeros((0, 2))
        if ring.ndim != 2 or ring.shape[1] < 2:
            message = (
                f"{self.source}: outline {len(self.lengths) + 1} of the file begins with "
                f"{str(points)[:60]}; expected a list of [x, y]"
            )
            raise _OutlineError(message)
        self.coordinates.frombytes(ring[:, :2].tobytes())
        self.lengths.append(len(ring))
        self.holes.append(has_hole)

    def rings(self, owner: NDArray[np.int64], missing: NDArray[np.str_]) -> Rings:
        """Return all rings; `owner` and `missing` are the fields of `Rings`."""
        points = np.frombuffer(self.coordinates, np.float64).reshape(-1, 2)
        lengths = np.frombuffer(self.lengths, np.int64)
        return Rings(points, lengths, owner, missing, np.frombuffer(self.holes, np.bool_))


def _polygons_of(geometry: dict[str, Any]) -> list[Any]:
    """Return the rings of every polygon in a geometry, as parsed; further shapes are left out."""
    polygons: list[Any] = []
    pending = [geometry]
    while pending:
        one = pending.pop()
        shape, coordinates = str(one.get("type")), one.get("coordinates")
        if shape == "GeometryCollection":
            parts = one.get("geometries")
            pending += map(_members, reversed(parts) if isinstance(parts, list) else ())
        elif shape == "MultiPolygon":
            polygons += coordinates if isinstance(coordinates, list) else [coordinates]
        elif shape == "Polygon":
            polygons.append(coordinates)
    return [rings for rings in polygons if rings]


def _members(value: object) -> dict[str, Any]:
    """Return the members of a JSON object; none for other values."""
    return value if isinstance(value, dict) else {}


def _cellvit_table(document: dict[str, Any], collector: _Collector) -> pa.Table:
    """Return the table of CellViT's cells.json."""
    source, num_cells = collector.source, len(collector.types)
    tally = Tally(source, "CellViT cells.json")
    num_without = len(document["cells"]) - num_cells
    if num_without and not num_cells:
        message = (
            f"{source}: its {num_without} cells have no `contour`, as in CellViT's "
            "cell_detection.json; give the cells.json in the same folder"
        )
        raise ValueError(message)
    tally.num_objects = tally.dropped["no_outline"] = num_without
    names = _cellvit_names(collector.types, document.get("type_map"), source)
    probs = np.frombuffer(collector.probs, np.float32)
    rings = collector.rings(np.arange(num_cells), np.full(num_cells, "no_outline", REASON))
    return attach_report(make_table(rings, names, probs, tally), tally)


def _cellvit_names(types: list[float | str | None], type_map: object, source: str) -> pa.Array:
    """Return the names of CellViT's type numbers, PanNuke's names if the file has no type_map."""
    name_of = _names_of_numbers(type_map, source) if type_map else PANNUKE
    meaning: dict[float | str | None, str | None] = {}
    for value in set(types):
        if not isinstance(value, str | None) and value not in name_of:
            known = ", ".join(f"{number} {name}" for number, name in sorted(name_of.items()))
            message = f"{source}: type {value} is not in the file's type_map ({known}); add it"
            raise ValueError(message)
        meaning[value] = value if isinstance(value, str | None) else name_of[int(value)]
    return type_names(pa.array([meaning[value] for value in types], pa.string()), source)


def _names_of_numbers(type_map: object, source: str) -> dict[int, str]:
    """Return the names by number of a type map from number to name or from name to number."""
    pairs = list(type_map.items()) if isinstance(type_map, dict) else []
    if pairs and all(isinstance(value, int) for _, value in pairs):
        pairs = [(value, key) for key, value in pairs]
    try:
        names = {int(number): class_name(name) or UNTYPED for number, name in pairs}
    except ValueError:
        names = {}
    if not names:
        message = f"{source}: type_map is {str(type_map)[:80]}; expected numbers and their names"
        raise ValueError(message)
    return names


def _geojson_table(collector: _Collector, *, crs: object, is_list: bool) -> pa.Table:
    """Return the table of the nuclei among GeoJSON features.

    QuPath cells and detections are nuclei, and annotations are then regions. In a file without
    them, annotations are nuclei. One feature is one nucleus, unless its parts show that it is a
    class of nuclei (`split_classes`). In a bare list, each part of a classified MultiPolygon
    annotation is a nucleus, since CellViT and HEST write classes this way.
    """
    source = collector.source
    tally = Tally(source, "GeoJSON", lonlat=any(name in str(crs) for name in ("CRS84", "4326")))
    kinds = np.array(collector.kinds, np.str_)
    bare_cell = kinds == "cell without nucleus"
    used = np.isin(kinds, _NUCLEI) | bare_cell
    if not used.any():
        used = ~np.isin(kinds, _NEVER_NUCLEI)
    tally.num_objects = tally.dropped["other_object"] = int((~used).sum())

    num_rings = np.frombuffer(collector.num_rings, np.int64)
    is_class = np.frombuffer(collector.may_be_class, np.bool_) & is_list
    num_objects = np.where(is_class, np.maximum(num_rings, 1), 1) * used
    feature = np.repeat(np.arange(len(kinds)), num_objects)
    ring_feature = np.repeat(np.arange(len(kinds)), num_rings)
    within = np.arange(len(ring_feature)) - (np.cumsum(num_rings) - num_rings)[ring_feature]
    owner = (np.cumsum(num_objects) - num_objects)[ring_feature] + within * is_class[ring_feature]

    rings = collector.rings(owner, np.array(collector.missing, REASON)[feature])
    wanted = used[ring_feature]
    if not wanted.all():
        points = rings.points_x0y0[np.repeat(wanted, rings.lengths)]
        lengths, has_hole = rings.lengths[wanted], rings.has_hole[wanted]
        rings = Rings(points, lengths, owner[wanted], rings.missing, has_hole)
    tally.changed["cell_outline"] = int((bare_cell & (num_rings > 0)).sum())
    names = pa.array(collector.names, pa.string()).take(pa.array(feature, pa.int64()))
    probs = np.full(len(feature), np.nan, np.float32)
    return attach_report(make_table(rings, type_names(names, source), probs, tally), tally)
