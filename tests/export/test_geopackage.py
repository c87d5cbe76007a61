"""GeoPackage: pyogrio counts every cell, layer by layer, and its outlines are those of the run."""

import builtins

import numpy as np
import pyogrio
import pytest
import shapely

from scellst_ray.export.geopackage import write_geopackage
from scellst_ray.runs import compaction
from tests.support import exported_runs
from tests.support.exported_runs import GENES, make_run

predicted = exported_runs.predicted  # a fixture


def test_layers_hold_every_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "ROW_GROUP", 7)
    run = make_run(tmp_path, head=True)
    out = tmp_path / "out" / "cells.gpkg"
    assert write_geopackage(run, str(out), ["b", "a"], GENES) == 70
    assert pyogrio.list_layers(out)[:, 0].tolist() == ["b", "a"]
    for slide_id in ("b", "a"):
        cells = run.cells(slide_id)
        assert pyogrio.read_info(out, layer=slide_id)["features"] == len(cells)
        frame = pyogrio.read_dataframe(out, layer=slide_id)
        assert frame["cell_id"].tolist() == cells["cell_id"].to_pylist()
        assert frame["nucleus_type"].tolist() == cells["nucleus_type"].to_pylist()
        stored = shapely.from_wkb(cells["polygon"].to_numpy())
        assert shapely.equals(frame.geometry.to_numpy(), stored).all()
        expected = run.expression_numpy(None, slide_id)
        np.testing.assert_allclose(frame[GENES].to_numpy(), expected, rtol=1e-6)
    assert [path.name for path in out.parent.iterdir()] == ["cells.gpkg"]


def test_without_pyogrio_a_line_names_the_extra(predicted, tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pyogrio":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'scellst-ray\[gis\]'"):
        write_geopackage(predicted, str(tmp_path / "x.gpkg"), ["a"], [])
