"""Slides segmented by other software: their nuclei go through the pass unchanged, by tile."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from scellst_ray import storage
from scellst_ray.pipelines.extract import extract
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.stages.config import ExtractConfig
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.write import WriteShards
from scellst_ray.storage import node_cache


@pytest.fixture(scope="module")
def truth(synthetic_slide):
    """Return the true nuclei of the synthetic slide: polygon, x0, y0, nucleus_type."""
    return pq.read_table(synthetic_slide.truth)


@pytest.fixture(scope="module")
def segmentation(truth, tmp_path_factory):
    """Return them as a QuPath GeoJSON file."""
    features = [
        {
            "type": "Feature",
            "geometry": json.loads(shapely.to_geojson(shapely.from_wkb(row["polygon"]))),
            "properties": {
                "objectType": "detection",
                "classification": {"name": row["nucleus_type"], "color": [1, 2, 3]},
            },
        }
        for row in truth.to_pylist()
    ]
    path = tmp_path_factory.mktemp("segmentation") / "nuclei.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


@pytest.fixture(scope="module")
def imported_spec(cells_spec):
    return replace(cells_spec, segmenter="imported", encoder="none", store_embeddings=False)


def finished(run, rows, spec, helpers):
    receipts = WriteShards(run)(helpers.find_stage(spec)(rows))
    return finish_slide(run, "s", receipts, imported=True), storage.read_table(run.cells_uri("s"))


def test_every_nucleus_once_with_its_outline_and_type(
    tmp_path, truth, segmentation, imported_spec, synthetic_slide, helpers
):
    run = RunFolder(str(tmp_path), "d1g")
    row = helpers.slide_row(
        synthetic_slide.slide,
        segmentation=str(segmentation),
        imported_uri=run.imported_uri("s"),
    )
    rows = plan_slide(row, imported_spec)
    assert len(rows) > 4
    record, cells = finished(run, rows, imported_spec, helpers)
    polygons = shapely.from_wkb(truth["polygon"].to_pylist())
    centroids = shapely.get_coordinates(shapely.centroid(polygons))
    inside = (centroids >= 0).all(1) & (centroids < (720, 520)).all(1)
    assert record["num_cells"] == len(cells) == inside.sum()
    assert record["imported"]["fingerprint"] == str(node_cache.fingerprint(str(segmentation)))
    assert record["imported"]["dropped"].get("outside", 0) == (~inside).sum()
    found = np.stack([cells["x0"], cells["y0"]], axis=1)
    order, expected = np.lexsort(found.T), np.lexsort(centroids[inside].T)
    np.testing.assert_allclose(found[order], centroids[inside][expected], atol=1e-3)
    kinds = np.array(truth["nucleus_type"].to_pylist())[inside][expected]
    assert np.array(cells["nucleus_type"].to_pylist())[order].tolist() == kinds.tolist()
    outlines = shapely.from_wkb(cells["polygon"].to_pylist())[order]
    same = shapely.equals_exact(
        shapely.normalize(outlines), shapely.normalize(polygons[inside][expected]), 1e-6
    )
    assert same.all()
    areas = shapely.area(polygons[inside][expected]) * record["mpp"] ** 2
    np.testing.assert_allclose(cells["area_um2"].to_numpy()[order], areas, rtol=1e-5)


def test_tiles_done_are_not_done_again_and_the_file_is_sorted_once(
    tmp_path, segmentation, imported_spec, synthetic_slide, helpers, monkeypatch
):
    uri = str(tmp_path / "by_tile")
    row = helpers.slide_row(synthetic_slide.slide, segmentation=str(segmentation), imported_uri=uri)
    rows = plan_slide(row, imported_spec)
    monkeypatch.setattr("scellst_ray.stages.plan_slide.read_segmentation", None)
    done = [r["tile_id"] for r in rows[::2]]
    row |= {"done_tiles": done, "source": rows[0]["source"]}
    rest = plan_slide(row, imported_spec)
    assert [r["tile_id"] for r in rest] == [r["tile_id"] for r in rows[1::2]]
    assert {r["num_tiles"] for r in rest} == {len(rows)}


def test_nuclei_that_were_replaced_are_sorted_again(
    tmp_path, segmentation, imported_spec, synthetic_slide, helpers
):
    nuclei, folder = tmp_path / "nuclei.geojson", tmp_path / "by_tile"
    shutil.copy(segmentation, nuclei)
    changes = {"segmentation": str(nuclei), "imported_uri": str(folder)}
    row = helpers.slide_row(synthetic_slide.slide, **changes)
    rows = plan_slide(row, imported_spec)
    collection = json.loads(nuclei.read_text())
    features = collection["features"] if isinstance(collection, dict) else collection
    del features[1::2]
    nuclei.write_text(json.dumps(collection))
    row |= {"done_tiles": [rows[0]["tile_id"]], "source": rows[0]["source"]}
    again = plan_slide(row, imported_spec)
    assert again[0]["source"] != rows[0]["source"]
    assert len(again) == again[0]["num_tiles"]
    (by_tile,) = folder.iterdir()  # what was made of the file before is gone
    assert again[0]["imported"] == str(by_tile) != rows[0]["imported"]
    assert len(storage.read_table(str(by_tile))) <= len(features)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"segmentation": None}, "the manifest names no file in column segmentation"),
        ({"segmentation": "/no/such.geojson"}, "/no/such.geojson: no such file"),
    ],
)
def test_a_slide_without_its_segmentation_says_so(
    tmp_path, imported_spec, synthetic_slide, helpers, changes, reason
):
    uri = str(tmp_path / "by_tile")
    row = helpers.slide_row(synthetic_slide.slide, imported_uri=uri, **changes)
    (planned,) = plan_slide(row, imported_spec)
    assert planned["stage"] == "plan"
    assert reason in planned["error"]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_extract_takes_the_segmentation_the_manifest_names(
    tmp_path, truth, segmentation, synthetic_slide
):
    swapped = json.loads(segmentation.read_text())
    for feature in swapped["features"]:
        rings = feature["geometry"]["coordinates"]
        feature["geometry"]["coordinates"] = [[[y + 500, x] for x, y in ring] for ring in rings]
    (tmp_path / "wrong.geojson").write_text(json.dumps(swapped))
    (tmp_path / "m.csv").write_text(
        f"slide_id,uri,segmentation\ngood,{synthetic_slide.slide},{segmentation}\n"
        f"wrong,{synthetic_slide.slide},wrong.geojson\nwithout,{synthetic_slide.slide},\n"
    )
    config = ExtractConfig(
        manifest=str(tmp_path / "m.csv"),
        out=str(tmp_path / "run"),
        segmenter="imported",
        encoder="none",
        core_px=250,
        gpus=False,
        memory_gb=0.5,
    )
    records = extract(config)
    assert {k: r["status"] for k, r in records.items()} == {
        "good": "done",
        "wrong": "failed",
        "without": "failed",
    }
    assert "centroids lie outside" in records["wrong"]["error"]
    assert records["good"]["num_cells"] >= 0.95 * len(truth)
    cells = pq.read_table(tmp_path / "run" / "cells" / "good.parquet")
    assert pa.types.is_binary(cells.schema.field("polygon").type)
    assert not (tmp_path / "run" / "imported" / "good").exists()
