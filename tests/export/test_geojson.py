"""GeoJSON for QuPath: read by geopandas and by the product's own importer, equal to the run."""

import gzip
import json
import tracemalloc
import uuid

import geopandas
import numpy as np
import pytest
import shapely

from scellst_ray.export.geojson import write_geojson
from scellst_ray.nuclei.imported.tiles import read_segmentation
from scellst_ray.runs import compaction
from scellst_ray.runs.reading import open_run
from tests.support import exported_runs
from tests.support.exported_runs import GENES, add_slide, make_run

predicted = exported_runs.predicted  # a fixture


def read_features(path):
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("name", ["b.geojson", "b.geojson.gz"])
def test_detections_have_outlines_classes_and_measurements(predicted, tmp_path, name):
    genes = ["CD3E", "EPCAM"]
    assert write_geojson(predicted, str(tmp_path / name), "b", genes) == 40
    document = read_features(tmp_path / name)
    assert document["type"] == "FeatureCollection"
    assert document["scellst_ray"]["frame"] == "level-0 px, y points down"
    cells, features = predicted.cells("b"), document["features"]
    values_NG = predicted.expression_numpy(genes, "b")
    assert len({feature["id"] for feature in features}) == 40
    for row, feature, values in zip(cells.to_pylist(), features, values_NG, strict=True):
        uuid.UUID(feature["id"])
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert properties["classification"]["name"] == row["nucleus_type"]
        assert len(properties["classification"]["color"]) == 3
        measured = properties["measurements"]
        assert list(measured) == ["area_um2", *genes]  # no type_prob, no distance in this run
        np.testing.assert_allclose([measured[gene] for gene in genes], values, rtol=1e-4)
        outline = shapely.from_wkb(row["polygon"])
        assert shapely.equals_exact(shapely.geometry.shape(feature["geometry"]), outline)
    frame = geopandas.read_file(json.dumps(document))
    assert len(frame) == 40


@pytest.mark.parametrize("name", ["b.geojson", "b.geojson.gz"])
def test_the_importer_reads_it_back(predicted, tmp_path, name):
    write_geojson(predicted, str(tmp_path / name), "b", GENES)
    table = read_segmentation(tmp_path / name, name)
    cells = predicted.cells("b")
    assert table["nucleus_type"].to_pylist() == cells["nucleus_type"].to_pylist()
    found, stored = (shapely.from_wkb(t["polygon"].to_numpy()) for t in (table, cells))
    assert shapely.equals(found, stored).all()


def test_equal_runs_give_equal_bytes(predicted, tmp_path):
    for name in ("one", "two"):
        write_geojson(predicted, str(tmp_path / name / "x.geojson.gz"), "a", GENES)
    one, two = ((tmp_path / name / "x.geojson.gz").read_bytes() for name in ("one", "two"))
    assert one == two


def test_numbers_that_are_none_are_texts(predicted, tmp_path):
    layer = predicted.last_layer
    layer.bias_KG[:] = np.nan
    write_geojson(predicted, str(tmp_path / "x.geojson"), "a", ["EPCAM"])
    text = (tmp_path / "x.geojson").read_text()
    json.loads(text, parse_constant=pytest.fail)
    assert '"EPCAM":"NaN"' in text


def test_a_gene_with_the_name_of_another_measurement(tmp_path, monkeypatch):
    genes = ["area_um2", "CD3E", "Cd3e"]
    monkeypatch.setattr(exported_runs, "GENES", genes)
    run = make_run(tmp_path, head=True)
    write_geojson(run, str(tmp_path / "x.geojson"), "a", genes)
    features = read_features(tmp_path / "x.geojson")["features"]
    measured = [feature["properties"]["measurements"] for feature in features]
    assert list(measured[0]) == ["area_um2", "area_um2_2", "CD3E", "Cd3e"]
    found = [[m["area_um2_2"], m["CD3E"], m["Cd3e"]] for m in measured]
    np.testing.assert_allclose(found, run.expression_numpy(genes, "a"), rtol=1e-4)
    areas = run.cells("a")["area_um2"].to_numpy()
    np.testing.assert_allclose([m["area_um2"] for m in measured], areas, rtol=1e-4)


def test_a_run_without_expression(tmp_path):
    run = make_run(tmp_path, head=False)
    assert write_geojson(run, str(tmp_path / "x.geojson"), "a", []) == 30
    features = read_features(tmp_path / "x.geojson")["features"]
    assert list(features[0]["properties"]["measurements"]) == ["area_um2"]


def test_memory_does_not_grow_with_the_slide(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "ROW_GROUP", 500)
    run = make_run(tmp_path, head=True)
    peaks = []
    for count in (1_000, 10_000):
        add_slide(run.folder, f"n{count}", count, embedding=False, hidden=True)
        opened = open_run(run.uri)
        tracemalloc.start()
        write_geojson(opened, str(tmp_path / f"{count}.geojson"), f"n{count}", GENES)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
