"""GeoPackage: pyogrio counts every cell, layer by layer, and its outlines are those of the run."""

import builtins
import tracemalloc

import numpy as np
import pyarrow as pa
import pyogrio
import pytest
import shapely

from scellst_ray.export.geopackage import write_geopackage
from scellst_ray.runs import compaction
from scellst_ray.runs.reading import open_run
from tests.support import exported_runs
from tests.support.exported_runs import GENES, add_slide, make_run

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


@pytest.mark.parametrize(
    ("genes", "columns"),
    [
        (["EPCAM", "Epcam", "CD3E"], ["EPCAM", "Epcam_2", "CD3E"]),  # of human and mouse
        (["fid", "CD3E", "Polygon"], ["fid_2", "CD3E", "Polygon_2"]),
        (["slide_id", "HLA-A", 'a"b'], ["slide_id_2", "HLA-A", 'a"b']),
    ],
)
def test_genes_whose_name_is_taken(tmp_path, monkeypatch, genes, columns):
    monkeypatch.setattr(exported_runs, "GENES", genes)
    run, out = make_run(tmp_path, head=True), tmp_path / "x.gpkg"
    write_geopackage(run, str(out), ["a"], genes)
    frame = pyogrio.read_dataframe(out)
    np.testing.assert_allclose(frame[columns], run.expression_numpy(genes, "a"), rtol=1e-6)


def test_slides_that_differ_by_case_alone(tmp_path):
    run = make_run(tmp_path, head=False)
    add_slide(run.folder, "A", 20, embedding=True, hidden=False)
    out = tmp_path / "x.gpkg"
    write_geopackage(open_run(run.uri), str(out), ["a", "A"], [])
    assert pyogrio.list_layers(out)[:, 0].tolist() == ["a", "A_2"]
    assert pyogrio.read_dataframe(out, layer="A_2")["slide_id"].tolist() == ["A"] * 20


def test_memory_does_not_grow_with_the_slide(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "ROW_GROUP", 500)
    run = make_run(tmp_path, head=True)
    peaks = []
    for count in (1_000, 10_000):
        add_slide(run.folder, f"n{count}", count, embedding=False, hidden=True)
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        write_geopackage(open_run(run.uri), str(tmp_path / f"{count}.gpkg"), [f"n{count}"], GENES)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert pa.total_allocated_bytes() - before < 2**20
    assert peaks[1] < 1.3 * peaks[0]


def test_without_pyogrio_a_line_names_the_extra(predicted, tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pyogrio":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'scellst-ray\[gis\]'"):
        write_geopackage(predicted, str(tmp_path / "x.gpkg"), ["a"], [])
