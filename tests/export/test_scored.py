"""Exports hold the scores that `annotate` has left, in the order of the cells."""

import json

import anndata as ad
import numpy as np
import pyogrio
import pytest
import spatialdata as sd

from scellst_ray.commands.annotate import run_annotate
from scellst_ray.commands.configs import AnnotateConfig
from scellst_ray.export.anndata import to_anndata
from scellst_ray.export.anndata_file import write_anndata
from scellst_ray.export.geojson import write_geojson
from scellst_ray.export.geopackage import write_geopackage
from scellst_ray.export.scored import CellScores
from scellst_ray.export.spatialdata_store import write_spatialdata
from scellst_ray.runs import compaction
from scellst_ray.runs.reading import open_run
from scellst_ray.runs.scores import read_scores
from tests.support.exported_runs import add_slide, make_run

SCORES = ["score_T_cells", "score_tumour"]


@pytest.fixture
def scored(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "ROW_GROUP", 7)
    run = make_run(tmp_path, head=True)
    (tmp_path / "m.json").write_text('{"T cells": ["CD3E"], "tumour": ["ERBB2"]}')
    run_annotate(AnnotateConfig(run=run.uri, markers=str(tmp_path / "m.json")))
    return open_run(run.uri)


def expected(run, slide_id):
    return read_scores(run, slide_id).to_pandas()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_obs_of_anndata_and_spatialdata(scored, tmp_path):
    write_anndata(scored, str(tmp_path / "x.h5ad"))
    write_anndata(scored, str(tmp_path / "x.zarr"))
    write_spatialdata(scored, str(tmp_path / "x.sdata.zarr"), picture_mpp=0)
    for table in (
        to_anndata(scored),
        ad.read_h5ad(tmp_path / "x.h5ad"),
        ad.read_zarr(tmp_path / "x.zarr"),
        sd.read_zarr(tmp_path / "x.sdata.zarr")["table"],
    ):
        for slide_id in ("a", "b"):
            obs = table.obs[table.obs["slide_id"] == slide_id]
            stored = expected(scored, slide_id)
            assert obs["best_type"].tolist() == stored["best_type"].tolist()
            np.testing.assert_array_equal(obs[SCORES], stored[SCORES])
        assert table.obs["best_type"].cat.categories.tolist() == ["T cells", "tumour"]


def test_measurements_of_qupath_and_columns_of_gis(scored, tmp_path):
    write_geojson(scored, str(tmp_path / "a.geojson"), "a", ["CD3E"])
    stored = expected(scored, "a")
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    for feature, row in zip(features, stored.to_dict("records"), strict=True):
        properties = feature["properties"]
        assert properties["metadata"] == {"best_type": row["best_type"]}
        assert list(properties["measurements"])[-3:] == [*SCORES, "CD3E"]
        for name in SCORES:
            assert properties["measurements"][name] == pytest.approx(row[name], rel=1e-4)
    write_geopackage(scored, str(tmp_path / "x.gpkg"), ["a", "b"], ["CD3E"])
    for slide_id in ("a", "b"):
        layer = pyogrio.read_dataframe(tmp_path / "x.gpkg", layer=slide_id)
        stored = expected(scored, slide_id)
        assert layer["best_type"].tolist() == stored["best_type"].tolist()
        np.testing.assert_allclose(layer[SCORES], stored[SCORES])


def test_a_slide_without_scores_has_none(scored, caplog):
    add_slide(scored.folder, "late", 5, embedding=False, hidden=True)
    run = open_run(scored.uri)
    run.sources["late"] = {"uri": "late.png"}
    obs = to_anndata(run).obs
    late = obs["slide_id"] == "late"
    assert obs.loc[late, ["best_type", *SCORES]].isna().all(axis=None)
    assert obs.loc[~late, ["best_type", *SCORES]].notna().all(axis=None)
    text = "slide late is exported without scores: it was finished after `scellst-ray annotate`"
    assert text in caplog.text
    assert "best_type" not in to_anndata(run, ["late"]).obs


def test_scores_that_cannot_be_used_are_told_and_left_out(scored, tmp_path, caplog):
    path = tmp_path / "run" / "scores" / "a.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert CellScores(scored).of("a") is None
    assert "slide a is exported without scores: " in caplog.text
    assert str(path) in caplog.text
    (path.parent / "scores.json").write_text("{")
    assert CellScores(scored).columns == ()
    assert "scores.json" in caplog.text
    write_geojson(scored, str(tmp_path / "a.geojson"), "a", [])
    assert "score_" not in (tmp_path / "a.geojson").read_text()
