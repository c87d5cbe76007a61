import json
import struct

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from scellst_ray.core import schemas
from scellst_ray.core.geometry import Frame
from scellst_ray.nuclei.imported.read_parquet import read_geoparquet
from scellst_ray.nuclei.imported.table import BATCH, SEGMENTATION, import_report
from scellst_ray.nuclei.instances import nuclei_from_labels
from scellst_ray.runs.compaction import GEO

POLYGONS = [shapely.box(*box) for box in ([0, 0, 9, 5], [20, 0, 29, 5], [40, 0, 49, 5])]


def _read(tmp_path, columns, geometry=None, **options):
    path = tmp_path / "s.parquet"
    geopandas.GeoDataFrame(columns, geometry=geometry or POLYGONS).to_parquet(path, **options)
    return read_geoparquet(path, "uri")


def _polygons(table):
    return shapely.from_wkb(table["polygon"].to_pylist())


@pytest.mark.parametrize(
    ("encoding", "version"), [("WKB", "1.0.0"), ("WKB", "1.1.0"), ("geoarrow", "1.1.0")]
)
def test_hest_files_are_read_without_geopandas(tmp_path, encoding, version):
    columns = {"class": ["Neoplastic", "Dead", "Neoplastic"], "cell_id": [5, 6, 7]}
    table = _read(tmp_path, columns, geometry_encoding=encoding, schema_version=version)
    assert table.schema.remove_metadata() == SEGMENTATION
    assert shapely.equals_exact(_polygons(table), POLYGONS).all()
    assert table["nucleus_type"].to_pylist() == columns["class"]
    assert table["type_prob"].null_count == 3
    assert table["area0"].to_pylist() == [45, 45, 45]
    assert table["x0"].to_pylist() == [4.5, 24.5, 44.5]
    report = import_report(table)
    assert report == {
        "source": "uri",
        "format": "GeoParquet",
        "num_objects": 3,
        "dropped": {},
        "changed": {},
        "lonlat": False,
    }


@pytest.mark.parametrize("encoding", ["WKB", "geoarrow"])
def test_parts_holes_heights_and_gaps(tmp_path, encoding):
    holed = shapely.Polygon(
        shapely.box(0, 100, 30, 130).exterior, [shapely.box(9, 109, 19, 119).exterior]
    )
    pair = shapely.MultiPolygon([shapely.box(0, 0, 2, 2), shapely.box(5, 0, 9, 4)])
    shapes = [holed, pair, None, shapely.Polygon(), shapely.MultiPolygon([POLYGONS[0]])]
    table = _read(tmp_path, {}, shapes, geometry_encoding=encoding)
    filled = [shapely.box(0, 100, 30, 130), shapely.box(5, 0, 9, 4), POLYGONS[0]]
    assert shapely.equals(_polygons(table), filled).all()
    report = import_report(table)
    assert report["num_objects"] == 5
    assert report["dropped"] == {"no_outline": 2}
    assert report["changed"] == {"hole_filled": 1, "largest_part": 1}

    high = [shapely.force_3d(polygon, 7.0) for polygon in POLYGONS]
    table = _read(tmp_path, {}, high, geometry_encoding=encoding)
    assert not shapely.has_z(_polygons(table)).any()
    assert shapely.equals_exact(_polygons(table), POLYGONS).all()


def test_interleaved_points_are_read(tmp_path):
    """GeoArrow has a second layout, which geopandas makes in memory but does not store."""
    series = geopandas.GeoSeries(POLYGONS)
    column = pa.array(series.to_arrow(geometry_encoding="geoarrow", interleaved=True))
    geo = {"primary_column": "g", "columns": {"g": {"encoding": "geoarrow.polygon", "crs": None}}}
    table = pa.table({"g": column}).replace_schema_metadata({"geo": json.dumps(geo)})
    pq.write_table(table, tmp_path / "s.parquet")
    read = read_geoparquet(tmp_path / "s.parquet", "uri")
    assert shapely.equals_exact(_polygons(read), POLYGONS).all()


@pytest.mark.parametrize("encoding", ["WKB", "geoarrow"])
def test_more_rows_than_a_batch(tmp_path, encoding):
    number = BATCH + 100
    x = np.arange(number) * 20.0
    polygons = shapely.box(x, 0, x + 9, 5)
    names = np.where(np.arange(number) % 2, "odd", "even")
    path = tmp_path / "s.parquet"
    frame = geopandas.GeoDataFrame({"class": names}, geometry=polygons)
    frame.to_parquet(path, geometry_encoding=encoding, row_group_size=30_000)
    table = read_geoparquet(path, "uri")
    assert shapely.equals_exact(_polygons(table), polygons).all()
    assert table["nucleus_type"].to_pylist() == names.tolist()
    assert import_report(table)["num_objects"] == number


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"class": ["a", None, ""]}, ["a", "nucleus", "nucleus"]),
        ({"cell_type": ["a", "b", "b"], "area": [1, 2, 3]}, ["a", "b", "b"]),
        ({"label": [1, 2, 3], "cell_type": ["a", "b", "b"]}, ["a", "b", "b"]),
        ({"class": [1, 2, 3], "type": ["a", "b", "b"]}, ["a", "b", "b"]),
        (
            {"classification": ['{"name": "T", "color": [1, 2, 3]}', None, "S"]},
            ["T", "nucleus", "S"],
        ),
        ({"classification": [{"name": "T"}, None, {"name": None}]}, ["T", "nucleus", "nucleus"]),
        ({"classification": [{"names": ["T", "+"]}] * 3}, ["T: +"] * 3),
        ({"classification": [None, None, None]}, ["nucleus"] * 3),
        ({"score": [1, 2, 3]}, ["nucleus"] * 3),
    ],
)
def test_the_first_column_with_names_tells_the_types(tmp_path, columns, expected):
    assert _read(tmp_path, columns)["nucleus_type"].to_pylist() == expected


def test_categories_are_names(tmp_path):
    frame = geopandas.GeoDataFrame({"class": ["a", None, "b"]}, geometry=POLYGONS)
    frame["class"] = frame["class"].astype("category")
    frame.to_parquet(tmp_path / "s.parquet")
    table = read_geoparquet(tmp_path / "s.parquet", "uri")
    assert table["nucleus_type"].to_pylist() == ["a", "nucleus", "b"]


@pytest.mark.parametrize(
    "values", [[1, 2, 3], [1.0, 2.0, 3.0], ["1", "2", "3"], [True, False, True]]
)
def test_numbers_are_refused_as_types(tmp_path, values):
    with pytest.raises(ValueError, match=r"^uri: .*expected names, since .*remove"):
        _read(tmp_path, {"class": values})


def test_points_are_refused_in_both_encodings(tmp_path):
    points = [shapely.Point(i, i) for i in range(3)]
    with pytest.raises(ValueError, match=r"none of its 3 objects .*3 not_polygon"):
        _read(tmp_path, {}, points)
    with pytest.raises(
        ValueError, match="column geometry has the encoding point; expected polygons"
    ):
        _read(tmp_path, {}, points, geometry_encoding="geoarrow")


def test_what_is_no_polygon_is_counted(tmp_path):
    shapes = [*POLYGONS, shapely.Point(1, 1), shapely.LineString([(0, 0), (9, 9)])]
    table = _read(tmp_path, {}, shapes)
    assert len(table) == 3
    assert import_report(table)["dropped"] == {"not_polygon": 2}


@pytest.mark.parametrize("encoding", ["WKB", "geoarrow"])
def test_a_class_in_one_row_is_its_parts(tmp_path, encoding):
    classes = [
        shapely.MultiPolygon([shapely.box(i * 20, y, i * 20 + 9, y + 9) for i in range(num)])
        for num, y in ((80, 0), (2, 50), (1, 100))
    ]
    names = {"class": ["a", "b", "c"]}
    table = _read(tmp_path, names, classes, geometry_encoding=encoding)
    assert table["nucleus_type"].to_pylist() == ["a"] * 80 + ["b"] * 2 + ["c"]
    parts = shapely.get_parts(classes)
    assert shapely.equals(_polygons(table), parts).all()
    assert table["x0"].to_pylist() == shapely.get_x(shapely.centroid(parts)).tolist()
    assert import_report(table)["changed"] == {"class_part": 82}


def test_polygons_in_collections_of_geometries_are_found(tmp_path):
    inner = shapely.GeometryCollection([shapely.Point(0, 0), shapely.MultiPolygon(POLYGONS)])
    shapes = [shapely.GeometryCollection([inner]), shapely.GeometryCollection()]
    table = _read(tmp_path, {}, shapes)
    assert shapely.equals(_polygons(table), POLYGONS).all()
    assert import_report(table)["dropped"] == {"no_outline": 1}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("code", [7, 1007, 0x20000007])
def test_collections_in_each_other_without_end_cost_their_row(tmp_path, order, code):
    """GEOS ends the process on such a geometry."""
    head = struct.pack(f"{order}BI", order == "<", code)
    head += struct.pack(f"{order}I", 4326) * (code > 2000) + struct.pack(f"{order}I", 1)
    geo = {"primary_column": "g", "columns": {"g": {"encoding": "WKB", "crs": None}}}
    table = pa.table({"g": [head * 200_000, *shapely.to_wkb(POLYGONS)]})
    pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), tmp_path / "s.parquet")
    read = read_geoparquet(tmp_path / "s.parquet", "uri")
    assert shapely.equals_exact(_polygons(read), POLYGONS).all()


@pytest.mark.parametrize("encoding", ["WKB", "polygon", "multipolygon"])
@pytest.mark.parametrize(
    "values",
    [["POLYGON ((0 0, 1 1))"], [1], [[1.5]], [[[1.5]]], [{"x": 1.0}], [[[{"x": 1.0, "z": 2.0}]]]],
)
def test_columns_that_cannot_hold_polygons_give_a_line(tmp_path, encoding, values):
    geo = {"primary_column": "g", "columns": {"g": {"encoding": encoding, "crs": None}}}
    table = pa.table({"g": values}).replace_schema_metadata({"geo": json.dumps(geo)})
    pq.write_table(table, tmp_path / "s.parquet")
    with pytest.raises(ValueError, match=r"^uri: column g is .* cannot hold polygons"):
        read_geoparquet(tmp_path / "s.parquet", "uri")


@pytest.mark.parametrize("name", ["class", "type_prob", "g"])
def test_columns_that_are_there_twice_give_a_line(tmp_path, name):
    geo = {"primary_column": "g", "columns": {"g": {"encoding": "WKB", "crs": None}}}
    wkb = pa.array(shapely.to_wkb(POLYGONS), pa.binary())
    columns = [("g", wkb), (name, pa.array(["a"] * 3)), (name, pa.array(["b"] * 3))]
    table = pa.Table.from_arrays([c for _, c in columns], [n for n, _ in columns])
    pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), tmp_path / "s.parquet")
    with pytest.raises(ValueError, match=r"^uri: (column .* is there twice|is Parquet without)"):
        read_geoparquet(tmp_path / "s.parquet", "uri")


def test_other_geometry_columns_and_bounds_are_passed_over(tmp_path):
    frame = geopandas.GeoDataFrame({"other": [shapely.Point(1, 1)] * 3}, geometry=POLYGONS)
    frame["other"] = geopandas.GeoSeries(frame["other"])
    frame.to_parquet(tmp_path / "s.parquet", write_covering_bbox=True)
    read = read_geoparquet(tmp_path / "s.parquet", "uri")
    assert shapely.equals_exact(_polygons(read), POLYGONS).all()


def test_damaged_geometry_is_counted(tmp_path):
    wkb = [*shapely.to_wkb(POLYGONS), b"\x01\x03\x00", None]
    geo = {"primary_column": "g", "columns": {"g": {"encoding": "WKB", "crs": None}}}
    table = pa.table({"g": pa.array(wkb, pa.large_binary())})
    pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), tmp_path / "s.parquet")
    read = read_geoparquet(tmp_path / "s.parquet", "uri")
    assert shapely.equals_exact(_polygons(read), POLYGONS).all()
    assert import_report(read)["dropped"] == {"no_outline": 2}


@pytest.mark.parametrize(
    "geo",
    [
        None,
        "{broken",
        "[]",
        '{"primary_column": "g"}',
        '{"primary_column": "g", "columns": {}}',
        '{"primary_column": "h", "columns": {"h": {"encoding": "WKB"}}}',
        '{"primary_column": "g", "columns": {"g": {}}}',
    ],
)
def test_other_parquet_files_are_refused(tmp_path, geo):
    table = pa.table({"g": shapely.to_wkb(POLYGONS), "n": [1, 2, 3]})
    pq.write_table(table.replace_schema_metadata(geo and {"geo": geo}), tmp_path / "s.parquet")
    with pytest.raises(
        ValueError, match=r"uri: .*no GeoParquet; its columns are \['g', 'n'\].*geopandas"
    ):
        read_geoparquet(tmp_path / "s.parquet", "uri")


@pytest.mark.parametrize(
    ("crs", "lonlat"),
    [
        ({}, True),
        ({"crs": None}, False),
        ({"crs": {"type": "GeographicCRS", "name": "WGS 84"}}, True),
        ({"crs": {"type": "ProjectedCRS", "name": "UTM"}}, False),
        ({"crs": 'GEOGCRS["WGS 84"]'}, True),
        ({"crs": 'LOCAL_CS["slide"]'}, False),
        ({"crs": "OGC:CRS84"}, True),
        ({"crs": "urn:ogc:def:crs:OGC:1.3:CRS84"}, True),
        ({"crs": "EPSG:4326"}, True),
        ({"crs": "EPSG:32633"}, False),
        ({"crs": {"id": {"authority": "OGC", "code": "CRS84"}}}, True),
        ({"crs": {"type": "GeodeticCRS"}}, True),
        ({"crs": {"type": "BoundCRS", "source_crs": {"type": "GeographicCRS"}}}, True),
        ({"crs": {"type": "CompoundCRS", "components": [{"type": "GeographicCRS"}]}}, True),
        ({"crs": {"type": "ProjectedCRS", "base_crs": {"type": "GeographicCRS"}}}, False),
        ({"crs": {"type": "EngineeringCRS"}}, False),
        ({"crs": [1]}, False),
    ],
)
def test_a_missing_crs_means_longitude_and_latitude(tmp_path, crs, lonlat):
    geo = {"primary_column": "g", "columns": {"g": {"encoding": "WKB"} | crs}}
    table = pa.table({"g": shapely.to_wkb(POLYGONS)}).replace_schema_metadata(
        {"geo": json.dumps(geo)}
    )
    pq.write_table(table, tmp_path / "s.parquet")
    assert import_report(read_geoparquet(tmp_path / "s.parquet", "uri"))["lonlat"] is lonlat


def _cells(tmp_path, version=None):
    labels_HW = np.kron(np.arange(12).reshape(3, 4), np.ones((9, 11), int))
    nuclei = nuclei_from_labels(labels_HW)
    frame = Frame(3000.5, 120, 2.0, 2.0)
    centroid_x0y0 = frame.to_level0(nuclei.centroid_px).astype(np.float32)
    names = [["Dead", "Neoplastic"][i % 2] for i in range(len(nuclei))]
    table = pa.table(
        {
            "slide_id": ["S"] * len(nuclei),
            "cell_id": np.arange(len(nuclei)),
            "x0": centroid_x0y0[:, 0],
            "y0": centroid_x0y0[:, 1],
            "area_um2": nuclei.area_px.astype(np.float32),
            "nucleus_type": names,
            "type_prob": pa.array([None, 0.5] * 5 + [1.0], pa.float32()),
            "polygon": pa.array(nuclei.polygon_wkb(frame), pa.binary()),
            "embedding": pa.array([[0.0] * 4] * len(nuclei), pa.list_(pa.float16(), 4)),
        }
    )
    geo = {b"geo": json.dumps(GEO).encode()}
    schema = schemas.sign_schema(schemas.cells_schema(4, with_bbox=False), "CELLS", "digest", geo)
    metadata = dict(schema.metadata)
    if version:
        metadata[b"scellst_ray.version"] = version
    table = table.cast(schema).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "cells.parquet")
    return table


def test_our_own_cells_come_back_as_they_are(tmp_path):
    cells = _cells(tmp_path)
    table = read_geoparquet(tmp_path / "cells.parquet", "uri")
    for name in ("polygon", "nucleus_type", "type_prob", "x0", "y0"):
        assert table[name].cast(cells[name].type).equals(cells[name])
    assert import_report(table)["format"] == "CELLS"


def test_cells_of_a_newer_release_are_refused(tmp_path):
    _cells(tmp_path, version=b"99")
    with pytest.raises(ValueError, match="uri: written in format version 99"):
        read_geoparquet(tmp_path / "cells.parquet", "uri")
