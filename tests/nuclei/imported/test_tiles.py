import gzip
import json
import math

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from scellst_ray.core import schemas
from scellst_ray.core.geometry import Frame
from scellst_ray.nuclei.imported import tiles as module
from scellst_ray.nuclei.imported.tiles import (
    check_within,
    import_report,
    nuclei_in_frame,
    publish_by_tile,
    read_segmentation,
    read_tile,
)
from scellst_ray.slides.tiling import plan_tiles

WIDTH0, HEIGHT0 = 4000, 3000


def _discs(centres, radius=8.0):
    return list(shapely.buffer(shapely.points(np.asarray(centres, float)), radius))


def _written(path, polygons, **columns):
    """Return the path of a file that geopandas, an independent writer, wrote."""
    geopandas.GeoDataFrame(columns, geometry=polygons).to_parquet(path)
    return path


def _table(tmp_path, centres, radius=8.0):
    return read_segmentation(_written(tmp_path / "s.parquet", _discs(centres, radius)), "s")


def _scattered(num, seed=0, width=WIDTH0, height=HEIGHT0):
    return np.random.default_rng(seed).random((num, 2)) * [width - 40, height - 40] + 20


CELLS_JSON = {
    "type_map": {"1": "Neoplastic"},
    "cells": [{"contour": [[10, 10], [20, 10], [20, 20]], "type": 1, "type_prob": 0.75}],
}


def _snappy(text):
    return pa.compress(text.encode(), codec="snappy", asbytes=True)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("cells.json", str.encode),
        ("bom.json", lambda text: text.encode("utf-8-sig")),
        ("indented.json", lambda text: b"\n  \n" + json.dumps(json.loads(text), indent=2).encode()),
        ("cells.json.snappy", _snappy),
        ("no-suffix", _snappy),
        ("cells.json.gz", lambda text: gzip.compress(text.encode())),
        ("cells.json.snappy.gz", lambda text: gzip.compress(_snappy(text))),
        ("misleading.parquet", str.encode),
    ],
)
def test_content_tells_the_format(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(json.dumps(CELLS_JSON)))
    table = read_segmentation(path, "s3://bucket/cells")
    assert table["nucleus_type"].to_pylist() == ["Neoplastic"]
    assert table["area0"].to_pylist() == [50]
    assert import_report(table)["format"] == "CellViT cells.json"
    assert import_report(table)["source"] == "s3://bucket/cells"


def test_a_long_snappy_file_is_read_whole(tmp_path):
    cells = CELLS_JSON | {"cells": CELLS_JSON["cells"] * 3000}
    (tmp_path / "c.json.snappy").write_bytes(_snappy(json.dumps(cells)))
    assert len(read_segmentation(tmp_path / "c.json.snappy", "c")) == 3000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not JSON, gzip or snappy"),
        (b"\x80\x04\x95 a pickle", "not readable as a segmentation"),
        (b"\xff" * 40, "not JSON, gzip or snappy"),
        (_snappy(json.dumps(CELLS_JSON))[:-9], "not readable as a segmentation"),
        (_snappy("x" * 100), "damaged JSON"),
        (gzip.compress(json.dumps(CELLS_JSON).encode())[:-20], "not readable as a segmentation"),
        (json.dumps(CELLS_JSON).encode()[:-9], "damaged JSON"),
        (b'{"a": "\xe9"}', "not readable as a segmentation"),
        (b"PK\x03\x04....", "unzip it"),
        (b"PAR1 and nothing else", "not a readable Parquet file"),
    ],
)
def test_what_is_no_segmentation_is_refused_by_its_name(tmp_path, content, expected):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^s3://b/seg: .*" + expected):
        read_segmentation(path, "s3://b/seg")


def test_a_cut_parquet_file_is_refused(tmp_path):
    path = _written(tmp_path / "s.parquet", _discs(_scattered(50)))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(
        ValueError, match=r"s: not a readable Parquet file .* copy or export it again"
    ):
        read_segmentation(path, "s")


def test_a_folder_is_refused_and_a_missing_file_is_missing(tmp_path):
    with pytest.raises(ValueError, match="one file per slide"):
        read_segmentation(tmp_path, "s")
    with pytest.raises(FileNotFoundError):
        read_segmentation(tmp_path / "absent.parquet", "s")


def test_nuclei_on_the_slide_pass_and_the_few_outside_are_counted(tmp_path):
    centres = [*_scattered(97), [WIDTH0 + 2.0, 50], [50, -1.0], [50, 60]]
    table = check_within(_table(tmp_path, centres), WIDTH0, HEIGHT0, "s", mpp=0.5)
    assert len(table) == 98
    report = import_report(table)
    assert report["dropped"] == {"outside": 2}
    assert report["num_objects"] == 100


def test_the_far_edge_is_outside_and_the_near_edge_inside(tmp_path):
    centres = [*_scattered(98), [0, 0], [WIDTH0, 10]]
    table = check_within(_table(tmp_path, centres), WIDTH0, HEIGHT0, "s")
    assert len(table) == 99


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda p: p * 4, "9.% of 200 .*px of another level"),
        (lambda p: -p, "100% of 200 .*another origin, or y points upwards"),
        (lambda p: p[:, ::-1], "x and y seem to be swapped"),
        (lambda p: p + np.array([0, 50_000]), "of another slide"),
    ],
)
def test_coordinates_of_something_else_are_refused_with_a_cause(tmp_path, change, expected):
    points = _scattered(200)
    with pytest.raises(ValueError, match=f"^uri: .*4000 x 3000: .*{expected}.*level-0 px"):
        check_within(_table(tmp_path, change(points)), WIDTH0, HEIGHT0, "uri")


@pytest.mark.parametrize(("radius", "median"), [(8 * 0.25, "0.7"), (400, "3.1")])
def test_sizes_tell_coordinates_in_um_or_of_regions(tmp_path, radius, median):
    table = _table(tmp_path, _scattered(50), radius)
    expected = rf"median nucleus would have {median}.* um2 at 0.25 um/px"
    with pytest.raises(ValueError, match=expected):
        check_within(table, WIDTH0, HEIGHT0, "s", mpp=0.25)


def test_objects_that_are_no_nuclei_or_there_twice_are_counted_by_reason(tmp_path):
    discs = _discs(_scattered(90), 8)
    region, speck = shapely.box(10, 10, 3900, 2900), shapely.box(30, 30, 31.5, 31.5)
    path = _written(tmp_path / "s.parquet", [region, *discs, speck, *discs[:7]])
    table = check_within(read_segmentation(path, "s"), WIDTH0, HEIGHT0, "s", 0.5)
    assert table["polygon"].to_pylist() == shapely.to_wkb(discs).tolist()
    report = import_report(table)
    assert report["dropped"] == {"too_large": 1, "too_small": 1, "doubled": 7}
    assert report["num_objects"] == 99


def test_a_nucleus_and_a_region_have_the_median_of_a_nucleus(tmp_path):
    shapes = [shapely.box(10, 10, 3900, 2900), *_discs([[50, 50]], 8)]
    table = read_segmentation(_written(tmp_path / "s.parquet", shapes), "s")
    assert len(check_within(table, WIDTH0, HEIGHT0, "s", 0.5)) == 1


def test_gzip_is_unpacked_within_a_bound(tmp_path, monkeypatch):
    (tmp_path / "s.json.gz").write_bytes(gzip.compress(b"[" + b" " * 100_000 + b"]"))
    assert len(read_segmentation(tmp_path / "s.json.gz", "s")) == 0
    monkeypatch.setattr(module, "FREE_UNPACKED", 5_000)
    with pytest.raises(ValueError, match=r"^s: not readable .* unpack to more than [\d,]+"):
        read_segmentation(tmp_path / "s.json.gz", "s")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_of_text_give_a_line(tmp_path, encoding):
    (tmp_path / "s.json").write_bytes(json.dumps(CELLS_JSON).encode(encoding))
    with pytest.raises(ValueError, match=r"^s: (not readable|damaged JSON)"):
        read_segmentation(tmp_path / "s.json", "s")


def test_longitude_and_latitude_are_refused_but_not_px_called_so(tmp_path):
    """geopandas calls the coordinates of any GeoJSON it reads EPSG:4326."""
    for factor, refused in ((1, True), (100, False)):
        degrees = np.random.default_rng(0).random((20, 2)) * [30, 20] * factor
        frame = geopandas.GeoDataFrame(geometry=_discs(degrees, 0.1 * factor), crs=4326)
        frame.to_parquet(tmp_path / "s.parquet")
        table = read_segmentation(tmp_path / "s.parquet", "s")
        if refused:
            with pytest.raises(ValueError, match="longitude and latitude"):
                check_within(table, WIDTH0, HEIGHT0, "s")
        else:
            assert len(check_within(table, WIDTH0, HEIGHT0, "s")) == 20


def test_nothing_is_within_anything(tmp_path):
    (tmp_path / "none.geojson").write_text("[]")
    table = read_segmentation(tmp_path / "none.geojson", "s")
    assert len(check_within(table, 10, 10, "s", mpp=0.25)) == 0
    assert publish_by_tile(table, np.array([0, 10]), np.array([0, 10]), str(tmp_path / "t"))
    assert len(read_tile(str(tmp_path / "t"), 0)) == 0
    assert len(nuclei_in_frame(read_tile(str(tmp_path / "t"), 0), Frame(0, 0, 1, 1))) == 0


EDGES_X, EDGES_Y = np.array([0, 1000, 2000, 3000, 4000]), np.array([0, 1000, 2000, 3000])


def test_a_centroid_on_an_edge_belongs_to_the_tile_right_or_below_once(tmp_path):
    centres = [(1000, 500), (999.5, 500), (500, 2000), (2000, 2000), (3999.5, 2999.5), (0, 0)]
    squares = [shapely.box(x - 8, y - 8, x + 8, y + 8) for x, y in centres]
    table = read_segmentation(_written(tmp_path / "s.parquet", squares), "s")
    np.testing.assert_array_equal(np.column_stack([table["x0"], table["y0"]]), centres)
    uri = str(tmp_path / "by_tile.parquet")
    publish_by_tile(table, EDGES_X, EDGES_Y, uri)
    where = {i: read_tile(uri, i).select(["x0", "y0"]).to_pylist() for i in range(12)}
    found = {(row["x0"], row["y0"]): i for i, rows in where.items() for row in rows}
    assert sum(map(len, where.values())) == 6
    assert [found[centre] for centre in centres] == [1, 0, 8, 10, 11, 0]


@pytest.mark.parametrize("rows_per_group", [1, 7, 60, 10_000])
def test_tiles_together_give_every_nucleus_once(tmp_path, monkeypatch, rows_per_group):
    monkeypatch.setattr(module, "ROW_GROUP", rows_per_group)
    table = _table(tmp_path, _scattered(300, seed=rows_per_group))
    frame = Frame(0, 0, WIDTH0 / 40, HEIGHT0 / 30)
    tiles = plan_tiles((WIDTH0, HEIGHT0), 1.3, np.ones((30, 40), bool), frame, core_px=500)
    edges_x = np.unique([t.core.x0 for t in tiles] + [WIDTH0])
    edges_y = np.unique([t.core.y0 for t in tiles] + [HEIGHT0])
    uri = str(tmp_path / "out" / "by_tile.parquet")
    report = publish_by_tile(table, edges_x, edges_y, uri)
    assert report["dropped"] == {}
    points = np.column_stack([table["x0"], table["y0"]])
    seen = 0
    for tile in tiles:
        part = read_tile(uri, tile.tile_id)
        own = table.filter(tile.core.contains(points)).sort_by([("y0", "ascending")])
        assert part.equals(own)
        seen += len(part)
    assert seen == 300
    assert len(read_tile(uri, len(tiles))) == 0


def test_a_tile_reads_only_its_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROW_GROUP", 20)
    uri = str(tmp_path / "by_tile.parquet")
    publish_by_tile(_table(tmp_path, _scattered(100)), EDGES_X, EDGES_Y, uri)
    file = pq.ParquetFile(uri)
    groups = range(file.num_row_groups)
    tiles_of = [set(file.read_row_group(i)["tile_id"].to_pylist()) for i in groups]
    assert len(tiles_of) > 4
    assert sum(map(len, tiles_of)) == 12, "no tile in two groups"
    asked = []
    read = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_groups", lambda *a, **k: (asked.extend(a[1]), read(*a, **k))[1]
    )
    read_tile(uri, 5)
    assert len(asked) == 1
    assert 5 in tiles_of[asked[0]]


def test_nuclei_beyond_the_edges_are_counted(tmp_path):
    table = _table(tmp_path, [(500, 500), (-3, 500), (4000, 500), (500, 3000.5)])
    uri = str(tmp_path / "t.parquet")
    assert publish_by_tile(table, EDGES_X, EDGES_Y, uri)["dropped"] == {"outside": 3}
    assert import_report(read_tile(uri, 0))["dropped"] == {"outside": 3}
    assert len(read_tile(uri, 0)) == 1


def test_another_parquet_file_is_no_sorted_segmentation(tmp_path):
    path = _written(tmp_path / "s.parquet", _discs([(5, 5)]))
    with pytest.raises(ValueError, match=r"s\.parquet: expected a scellst_ray SEGMENTATION"):
        read_tile(str(path), 0)


def _star(draw, points):
    """Return a simple polygon: ascending angles around a centre, any radius."""
    x, y = draw(st.tuples(st.floats(30, 5e4), st.floats(30, 5e4)))
    turns = np.sort(draw(st.lists(st.integers(0, 999), min_size=3, max_size=points, unique=True)))
    radii = draw(st.lists(st.floats(1, 30), min_size=len(turns), max_size=len(turns)))
    angles = turns * (2 * math.pi / 1000)
    return shapely.Polygon(
        np.column_stack([x + radii * np.cos(angles), y + radii * np.sin(angles)])
    )


star_polygons = st.composite(lambda draw: _star(draw, 12))().filter(lambda p: p.is_valid)
FRAMES = st.builds(
    Frame, st.floats(-50, 5e4), st.floats(-50, 5e4), st.floats(0.3, 4.0), st.floats(0.3, 4.0)
)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(star_polygons, min_size=1, max_size=5), FRAMES, st.sampled_from(["WKB", "geoarrow"])
)
def test_a_polygon_comes_back_through_any_frame(tmp_path_factory, polygons, frame, encoding):
    path = tmp_path_factory.mktemp("round") / "s.parquet"
    geopandas.GeoDataFrame(geometry=polygons).to_parquet(path, geometry_encoding=encoding)
    table = read_segmentation(path, "s")
    assert shapely.equals_exact(shapely.from_wkb(table["polygon"].to_pylist()), polygons).all()
    nuclei = nuclei_in_frame(table, frame)
    back = shapely.from_wkb(nuclei.polygon_wkb(frame))
    assert shapely.equals_exact(back, polygons, tolerance=1e-6).all()
    np.testing.assert_allclose(
        frame.to_level0(nuclei.centroid_px), [p.centroid.coords[0] for p in polygons], atol=1e-6
    )
    np.testing.assert_allclose(nuclei.area_px * frame.area_ratio, shapely.area(polygons))
    assert np.diff(nuclei.contour_offsets).tolist() == [
        len(p.exterior.coords) - 1 for p in polygons
    ]


def test_nuclei_keep_order_types_and_probabilities(tmp_path):
    path = _written(
        tmp_path / "s.parquet",
        _discs([(50, 50), (20, 20), (80, 10)]),
        **{"class": ["Dead", None, "Epithelial"], "type_prob": [0.5, None, 1.0]},
    )
    nuclei = nuclei_in_frame(read_segmentation(path, "s"), Frame(10, 0, 2, 2))
    np.testing.assert_allclose(nuclei.centroid_px, [(20, 25), (5, 10), (35, 5)])
    assert nuclei.nucleus_type.tolist() == ["Dead", "nucleus", "Epithelial"]
    np.testing.assert_array_equal(nuclei.type_prob, np.array([0.5, np.nan, 1], np.float32))
    taken = nuclei.take(np.array([2, 0]))
    assert taken.nucleus_type.tolist() == ["Epithelial", "Dead"]


def test_the_stored_table_says_what_it_is(tmp_path):
    uri = str(tmp_path / "t.parquet")
    publish_by_tile(_table(tmp_path, [(500, 500)]), EDGES_X, EDGES_Y, uri)
    schemas.check(pq.read_schema(uri), "SEGMENTATION", uri)
    assert read_tile(uri, 0).column_names == module.SEGMENTATION.names
