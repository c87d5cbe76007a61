import copy
import json

import geopandas
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from scellst_ray.nuclei.imported.read_json import PANNUKE, read_json
from scellst_ray.nuclei.imported.table import import_report


def _square(x, y, side=10):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]


def _closed(x, y, side=10):
    return [*_square(x, y, side), [x, y]]


def _cell(x, y, **fields):
    """Return a cell as CellViT writes it: bbox row first, contour x first and not closed."""
    return {
        "bbox": [[y, x], [y + 10, x + 10]],
        "centroid": [x + 5.1, y + 4.9],
        "contour": _square(x, y),
        "type_prob": 0.875,
        "type": 1,
        "patch_coordinates": [3, 4],
        "cell_status": 1,
        "offset_global": [2880, 3840],
        "edge_position": True,
        "edge_information": {"position": [1, 0, 0, 0], "edge_patches": [[2, 4]]},
    } | fields


def _cellvit(cells, **fields):
    meta = {"magnification": 40, "base_mpp": 0.25, "label_map": {"background": 0}}
    return {
        "wsi_metadata": meta,
        "type_map": {str(k): v for k, v in PANNUKE.items()},
        "cells": cells,
    } | fields


def _feature(geometry, kind="detection", classification=None, **fields):
    properties = {"objectType": kind, "measurements": {"Area": "NaN"}, "isLocked": True}
    if classification is not None:
        properties["classification"] = classification
    return {
        "type": "Feature",
        "id": "uuid",
        "geometry": geometry,
        "properties": properties,
    } | fields


def _polygon(x, y, side=10):
    return {"type": "Polygon", "coordinates": [_closed(x, y, side)]}


def _collection(*features, **fields):
    return {"type": "FeatureCollection", "features": list(features)} | fields


def _read(document):
    return read_json(json.dumps(document), "cohort/seg.json")


def _bounds(table):
    return shapely.bounds(shapely.from_wkb(table["polygon"].to_pylist())).tolist()


def test_cellvit_cells_are_their_contours_with_names():
    table = _read(
        _cellvit([_cell(10, 20), _cell(40, 20, type=5, type_prob=1), _cell(7, 8, type=0)])
    )
    assert _bounds(table) == [[10, 20, 20, 30], [40, 20, 50, 30], [7, 8, 17, 18]]
    assert table["nucleus_type"].to_pylist() == ["Neoplastic", "Epithelial", "Background"]
    assert table["type_prob"].to_pylist() == [0.875, 1, 0.875]
    assert table["x0"].to_pylist() == [15, 45, 12]
    assert table["y0"].to_pylist() == [25, 25, 13]
    assert table["area0"].to_pylist() == [100, 100, 100]
    report = import_report(table)
    assert (report["num_objects"], report["dropped"], report["changed"]) == (3, {}, {})


@pytest.mark.parametrize(
    ("type_map", "expected"),
    [
        ({"0": "Other", "1": "Lymphocyte", "2": "Plasma"}, "Lymphocyte"),
        ({"Other": 0, "Lymphocyte": 1}, "Lymphocyte"),
        ({"1": " Lymphocyte "}, "Lymphocyte"),
        ({}, "Neoplastic"),
        (None, "Neoplastic"),
    ],
)
def test_numbers_become_names_by_the_map_of_the_file(type_map, expected):
    assert _read(_cellvit([_cell(1, 1)], type_map=type_map))["nucleus_type"].to_pylist() == [
        expected
    ]


def test_without_a_type_a_cell_is_a_nucleus_and_names_stay():
    cells = [_cell(1, 1), _cell(30, 1, type="Mitosis"), _cell(60, 1, type=None, type_prob=None)]
    del cells[0]["type"], cells[0]["type_prob"]
    table = _read({"cells": cells})
    assert table["nucleus_type"].to_pylist() == ["nucleus", "Mitosis", "nucleus"]
    assert table["type_prob"].to_pylist() == [None, 0.875, None]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (
            _cellvit([_cell(1, 1, type=7)]),
            r"type 7 is not in the file's type_map \(0 Background, 1",
        ),
        (_cellvit([_cell(1, 1)], type_map=["a", "b"]), "type_map is .*expected numbers and their"),
        (_cellvit([_cell(1, 1)], type_map={"a": "b"}), "type_map is .*expected numbers and their"),
        (_cellvit([_cell(1, 1)], type_map={"1": "3"}), "the number 3; expected names"),
        (_cellvit([{"bbox": [], "centroid": [1, 2], "type": 1}]), "cell_detection.json; give the"),
        (_cellvit([_cell(1, 1), _cell(1, 1, contour=[1, 2, 3])]), "outline 2 .*list of"),
        (_cellvit([_cell(1, 1, contour=[[1, 2], [3]])]), "outline 1 .*list of"),
        (_cellvit([_cell(1, 1, contour={"x": 1})]), "outline 1 .*list of"),
        (_cellvit([_cell(1, 1, contour="abc")]), "outline 1 .*list of"),
        (_collection(_feature(_polygon(0, 0), classification="2")), "the number 2; expected names"),
        (
            _collection(
                _feature(_polygon(0, 0), classification={"name": "-1.0", "color": [1, 2, 3]})
            ),
            "the number -1.0; expected names",
        ),
        (
            _collection(_feature({"type": "Polygon", "coordinates": _closed(0, 0)})),
            "outline 1 .*list of",
        ),
        (
            [_feature({"type": "MultiPoint", "coordinates": [[1, 2]]}, "annotation", "Dead")],
            "none of its 1 objects .*1 not_polygon.*cell_detection files hold only points",
        ),
        (_collection(_feature(None)), "none of its 1 objects .*1 no_outline"),
        ({"nuc": {}, "mag": 40}, r"found an object with the keys \['mag', 'nuc'\]; expected"),
        ([1, 2, 3], "found no GeoJSON features; expected"),
        (None, "found no GeoJSON features; expected"),
        ({}, "found no GeoJSON features; expected"),
    ],
)
def test_refusals_say_what_was_found_and_what_to_do(document, expected):
    with pytest.raises(ValueError, match=r"^cohort/seg\.json: (.*)" + expected):
        _read(document)


def test_broken_json_is_named():
    with pytest.raises(ValueError, match=r"^u: damaged JSON .*line 1 column \d+.*cut"):
        read_json('{"cells": [{"contour": [[1, 2]', "u")


def test_cells_that_are_no_outline_are_counted():
    cells = [
        _cell(10, 10),
        _cell(0, 0, contour=[]),
        _cell(0, 0, contour=None),
        _cell(0, 0, contour=[[1, 1], [2, 2]]),
        _cell(0, 0, contour=[[1, 1], [2, 2], [1, 1]]),
        _cell(0, 0, contour=[[1, 1], [2, 2], [3, 3]]),
        _cell(0, 0, contour=[[1, 1], [float("nan"), 2], [3, 5]]),
        _cell(0, 0, contour=[[1, 1], [None, 2], [3, 5]]),
        _cell(0, 0, contour=[[1, 1], [float("inf"), 2], [3, 5]]),
        {"bbox": [], "centroid": [3, 3], "type": 1},
    ]
    table = _read(_cellvit(cells))
    assert _bounds(table) == [[10, 10, 20, 20]]
    report = import_report(table)
    assert report["num_objects"] == 10
    assert report["dropped"] == {"no_outline": 5, "no_area": 1, "not_finite": 3}


def test_closed_contours_and_heights_change_nothing():
    """CellViT closes the contours of cells.json where it also writes GeoJSON."""
    contour = [[x, y, 7] for x, y in _closed(10, 20)]
    plain, other = (_read(_cellvit([_cell(10, 20, contour=c)])) for c in (_square(10, 20), contour))
    assert plain["polygon"].equals(other["polygon"])


def _per_class(shapes_by_class):
    """CellViT and HEST write a bare list with one MultiPolygon per class."""
    return [
        _feature(
            {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]},
            "annotation",
            {"name": name, "color": [255, 0, 0]},
        )
        for name, rings in shapes_by_class.items()
    ]


def test_parts_of_a_class_are_nuclei():
    rings = [_closed(20 * i, 0) for i in range(100)]
    table = _read(_per_class({"Neoplastic": rings, "Dead": [_closed(5, 90)]}))
    assert len(table) == 101
    assert table["nucleus_type"].to_pylist() == ["Neoplastic"] * 100 + ["Dead"]
    assert _bounds(table)[99:] == [[1980, 0, 1990, 10], [5, 90, 15, 100]]
    assert import_report(table)["num_objects"] == 101


def test_a_part_without_area_costs_only_itself():
    rings = [_closed(0, 0), [[1, 1], [1, 1], [1, 1], [1, 1]], _closed(50, 0)]
    table = _read(_per_class({"Dead": rings}))
    assert _bounds(table) == [[0, 0, 10, 10], [50, 0, 60, 10]]
    assert import_report(table)["dropped"] == {"no_area": 1}


@pytest.mark.parametrize("kind", ["detection", "cell", "annotation"])
def test_one_object_in_parts_is_its_largest_part(kind):
    geometry = {"type": "MultiPolygon", "coordinates": [[_closed(0, 0, 3)], [_closed(50, 0)]]}
    table = _read(_collection(_feature(geometry, kind, "Tumor")))
    assert _bounds(table) == [[50, 0, 60, 10]]
    assert import_report(table)["changed"]["largest_part"] == 1


@pytest.mark.parametrize("num_parts", [2, 3, 7, 8, 64, 65])
@pytest.mark.parametrize("kind", ["annotation", "detection"])
def test_a_class_in_a_collection_is_its_parts(num_parts, kind):
    rings = [_closed(20 * (i % 9), 20 * (i // 9)) for i in range(num_parts)]
    (feature,) = _per_class({"Dead": rings})
    feature["properties"]["objectType"] = kind
    other = _feature(_polygon(900, 900), kind, {"name": "Immune"})
    for document in (_collection(feature, other), _collection(other, feature)):
        table = _read(document)
        assert sorted(_bounds(table))[:num_parts] == sorted([*ring[0], *ring[2]] for ring in rings)
        assert sorted(table["nucleus_type"].to_pylist()) == ["Dead"] * num_parts + ["Immune"]
        report = import_report(table)
        assert report["changed"] == {"class_part": num_parts}
        assert report["num_objects"] == num_parts + 1


def test_holes_and_damage_of_a_class_are_those_of_its_parts():
    holed = [_closed(40, 0, 30), _closed(50, 10)]
    flat = [[[1, 1], [9, 1], [1, 1], [1, 1]]]
    coordinates = [[_closed(0, 0)], holed, flat, [_closed(0, 60)]]
    geometry = {"type": "MultiPolygon", "coordinates": coordinates}
    report = import_report(_read(_collection(_feature(geometry, classification="Dead"))))
    assert report["changed"] == {"class_part": 3, "hole_filled": 1}
    assert report["dropped"] == {"no_area": 1}
    assert report["num_objects"] == 4


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 0, 10, 20), (10, 0, 10, 20)],
        [(0, 0, 10, 20), (12, 0, 10, 20)],
        [(0, 0, 10, 10), (10, 10, 10, 10)],
        [(0, 0, 9, 9), (10, 0, 9, 9), (0, 10, 9, 9), (10, 10, 9, 9)],
        [(0, 0, 20, 20), (90, 90, 2, 2)],
        [(0, 0, 20, 20), *((25 + 3 * i, 0, 2, 2) for i in range(99))],
    ],
)
def test_one_nucleus_in_pieces_stays_one(parts):
    rings = [shapely.box(x, y, x + w, y + h).exterior.coords[:] for x, y, w, h in parts]
    geometry = {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]}
    table = _read(_collection(_feature(geometry)))
    assert import_report(table)["changed"] == {"largest_part": 1}
    assert table["area0"].to_pylist() == [max(w * h for _, _, w, h in parts)]


def test_polygons_in_collections_of_geometries_are_found():
    pieces = {"type": "MultiPolygon", "coordinates": [[_closed(0, 0)], [_closed(10, 0)]]}
    point = {"type": "Point", "coordinates": [1, 2]}
    inner = {"type": "GeometryCollection", "geometries": [point, pieces]}
    both = {"type": "GeometryCollection", "geometries": [inner, _polygon(90, 0)]}
    assert len(_read(_collection(_feature(inner)))) == 1
    for document in (both, [both], _collection(_feature(both)), _feature(both)):
        table = _read(document)
        assert _bounds(table) == [[0, 0, 10, 10], [10, 0, 20, 10], [90, 0, 100, 10]]
    empty = {"type": "GeometryCollection", "geometries": None}
    table = _read(_collection(_feature(empty), _feature(_polygon(0, 0))))
    assert import_report(table)["dropped"] == {"no_outline": 1}


def test_bare_geometries_are_objects():
    assert _bounds(_read(_polygon(5, 5))) == [[5, 5, 15, 15]]
    assert len(_read([_polygon(5, 5), _polygon(50, 5)])) == 2
    with pytest.raises(ValueError, match=r"outline of a nucleus \(1 not_polygon\)"):
        _read({"type": "Point", "coordinates": [1, 2]})


def test_features_without_geometry_are_counted():
    nothing = [None, {}, {"type": "Feature"}, {"type": "Feature", "geometry": None}, 7]
    nothing.append({"type": "Feature", "properties": {"objectType": "annotation"}})
    table = _read(_collection(*nothing, {"type": "Feature", "geometry": _polygon(5, 5)}))
    report = import_report(table)
    assert (len(table), report["num_objects"], report["dropped"]) == (1, 7, {"no_outline": 6})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"type": "Feature", "geometry": ' * 100_000, "nested too deeply"),
        ("[" + "9" * 5000 + "]", "damaged JSON"),
        ('{"features": [', "damaged JSON"),
        ('{"features": NaN}', "expected CellViT's cells.json"),
    ],
)
def test_json_that_cannot_be_parsed_gives_a_line(text, words):
    with pytest.raises(ValueError, match=f"^s: .*{words}"):
        read_json(text, "s")


def test_numbers_that_are_none_cost_their_object():
    text = json.dumps(_collection(_feature(_polygon(5, 5)), _feature(_polygon(0.25, 0))))
    table = read_json(text.replace("10.25", "-Infinity").replace("0.25", "NaN"), "s")
    assert import_report(table)["dropped"] == {"not_finite": 1}


def test_qupath_cells_are_their_nuclei_and_regions_are_left_out():
    cell = _feature(_polygon(0, 0, 30), "cell", {"name": "Immune", "color": [1, 2, 3]})
    cell["nucleusGeometry"] = _polygon(10, 10, 5)
    bare = _feature(_polygon(60, 0, 30), "cell")
    region = _feature(_polygon(-500, -500, 9000), "annotation", {"name": "1", "color": [0, 0, 0]})
    tile = _feature(_polygon(0, 0, 200), "tile")
    table = _read(_collection(region, cell, tile, bare))
    assert _bounds(table) == [[10, 10, 15, 15], [60, 0, 90, 30]]
    assert table["nucleus_type"].to_pylist() == ["Immune", "nucleus"]
    report = import_report(table)
    assert report["num_objects"] == 4
    assert report["dropped"] == {"other_object": 2}
    assert report["changed"] == {"cell_outline": 1}


def test_annotations_are_nuclei_where_there_is_nothing_else():
    unnamed = {"type": "Feature", "geometry": _polygon(0, 0), "properties": None}
    old = _feature(_polygon(40, 0), "annotation")
    old["properties"] = {"object_type": "annotation", "classification": {"name": "Dead"}}
    core = _feature(_polygon(0, 0, 900), "tmaCore")
    table = _read(_collection(unnamed, old, core))
    assert table["nucleus_type"].to_pylist() == ["nucleus", "Dead"]
    assert import_report(table)["dropped"] == {"other_object": 1}


def test_children_of_qupath_objects_are_found():
    parent = _feature(_polygon(0, 0, 500), "annotation", childObjects=[_feature(_polygon(5, 5))])
    assert _bounds(_read(_collection(parent))) == [[5, 5, 15, 15]]


def test_a_single_feature_is_a_document():
    assert _bounds(_read(_feature(_polygon(5, 5)))) == [[5, 5, 15, 15]]


@pytest.mark.parametrize(
    ("classification", "expected"),
    [
        ("Stroma", "Stroma"),
        ({"name": "Stroma", "color": [1, 2, 3]}, "Stroma"),
        ({"names": ["Tumor", "Positive"], "color": [1, 2, 3]}, "Tumor: Positive"),
        ('{"name": "Stroma", "color": [1, 2, 3]}', "Stroma"),
        ("", "nucleus"),
        (None, "nucleus"),
        ({}, "nucleus"),
        ("{odd", "{odd"),
    ],
)
def test_a_class_has_a_name_however_it_is_written(classification, expected):
    table = _read(_collection(_feature(_polygon(0, 0), classification=classification)))
    assert table["nucleus_type"].to_pylist() == [expected]


def test_holes_are_filled_and_counted():
    geometry = {"type": "Polygon", "coordinates": [_closed(0, 0, 30), _closed(10, 10)]}
    table = _read(_collection(_feature(geometry), _feature(_polygon(50, 0))))
    assert table["area0"].to_pylist() == [900, 100]
    assert import_report(table)["changed"] == {"hole_filled": 1}


def test_no_nuclei_are_an_empty_table():
    for document in ([], _collection(), {"cells": []}):
        table = _read(document)
        assert len(table) == 0
        assert import_report(table)["num_objects"] == 0


@pytest.mark.parametrize("crs", [None, 4326, 32633])
def test_geopandas_geojson_is_read(crs):
    polygons = [shapely.box(*box) for box in ([0, 0, 9, 5], [20, 0, 29, 5], [40, 0, 49, 5])]
    frame = geopandas.GeoDataFrame({"class": ["a", None, "c"]}, geometry=polygons, crs=crs)
    table = read_json(frame.to_json(show_bbox=True), "g")
    assert shapely.equals_exact(shapely.from_wkb(table["polygon"].to_pylist()), polygons).all()
    assert table["nucleus_type"].to_pylist() == ["a", "nucleus", "c"]
    assert import_report(table)["lonlat"] is False


def test_a_stated_geographic_crs_is_noted():
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}
    assert import_report(_read(_collection(_feature(_polygon(0, 0)), crs=crs)))["lonlat"] is True


def _places(value, path=()):
    """Yield the path to every value in a document."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    for key, below in enumerate(value) if isinstance(value, list) else items:
        yield from _places(below, (*path, key))


STRANGE = [None, 5, -1.5, "x", [], {}, [1, 2], [[1, 2], [3, 4], [5, 9]], {"a": 1}, 10**400]
DOCUMENTS = [
    _cellvit([_cell(1, 1)]),
    _per_class({"a": [_closed(0, 0)] * 2}),
    _collection(_feature(_polygon(0, 0), "cell", {"name": "x"}, nucleusGeometry=_polygon(2, 2))),
]


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from(DOCUMENTS), st.sampled_from(STRANGE))
def test_anything_strange_anywhere_is_read_or_refused_by_name(data, document, strange):
    path = data.draw(st.sampled_from([path for path in _places(document) if path]))
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = strange
    try:
        table = _read(document)
    except ValueError as error:
        assert str(error).startswith("cohort/seg.json: ")  # noqa: PT017 - it may also be read
        return
    report = import_report(table)
    assert len(table) + sum(report["dropped"].values()) == report["num_objects"]
