"""`export` writes the format of the suffix, for all slides or a file for each."""

import json

import anndata as ad
import pyogrio
import pytest

from scellst_ray.commands.configs import ExportConfig
from scellst_ray.commands.export import name_of, run_export, suffix_of
from scellst_ray.nuclei.imported.tiles import read_segmentation
from scellst_ray.runs.reading import open_run
from tests.support.exported_runs import add_slide, make_run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, head=True)


def export(run, out, **more):
    return run_export(ExportConfig(run=run.uri, out=str(out), picture_px=0, **more))


def test_the_longest_suffix_decides():
    assert suffix_of("a.b.geojson.gz") == ".geojson.gz"
    assert suffix_of("cells.zarr/") == ".zarr"
    assert suffix_of("out.d/cells.sdata.zarr/") == ".sdata.zarr"
    for out in ("cells.csv", "cells", "cells.gz", "cells.h5ad.gz"):
        with pytest.raises(ValueError, match=r"end the name in one of \.h5ad, \.zarr, \.sdata"):
            suffix_of(out)
    assert name_of("out/cells.geojson.gz", "P 1") == "out/cells.P 1.geojson.gz"
    assert name_of("s3://b/cells.zarr/", "P1") == "s3://b/cells.P1.zarr"
    assert name_of("cells.sdata.zarr", "P1") == "cells.P1.sdata.zarr"


def test_the_suffix_tells_two_kinds_of_zarr_stores_apart(run, tmp_path):
    for name in ("x.zarr", "x.sdata.zarr"):
        assert export(run, f"{tmp_path}/{name}/", slides=["a"], picture_mpp=0) == 0
    assert (tmp_path / "x.zarr/X").is_dir()
    assert (tmp_path / "x.sdata.zarr/tables/table/X").is_dir()


@pytest.mark.parametrize("suffix", [".h5ad", ".geojson", ".geojson.gz", ".gpkg"])
def test_the_name_of_a_folder_is_refused(run, tmp_path, suffix):
    for name in ("x", "x.a"):
        (tmp_path / f"{name}{suffix}").mkdir()
    with pytest.raises(ValueError, match="is a folder, and the export is a file"):
        export(run, tmp_path / f"x{suffix}", slides=["a"])
    with pytest.raises(ValueError, match=r"1 slide\(s\) were not exported: a; .*is a folder"):
        export(run, tmp_path / f"x{suffix}", per_slide=True)
    assert (tmp_path / f"x.b{suffix}").is_file()


def test_all_slides_in_one_file(run, tmp_path, capsys):
    for name in ("x.h5ad", "x.gpkg"):
        assert export(run, tmp_path / name, genes=["CD3E"]) == 0
        assert f"{name}: 70 cells" in capsys.readouterr().out
    assert ad.read_h5ad(tmp_path / "x.h5ad").var_names.tolist() == ["CD3E"]
    fields = pyogrio.read_info(tmp_path / "x.gpkg", layer="a")["fields"]
    assert fields.tolist()[-1] == "CD3E"


def test_a_file_for_each_slide(run, tmp_path, capsys):
    assert export(run, tmp_path / "out" / "x.geojson.gz", per_slide=True) == 0
    assert "x.b.geojson.gz: 40 cells" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["x.a.geojson.gz", "x.b.geojson.gz"]
    assert len(read_segmentation(tmp_path / "out" / names[0], "a")) == 30


def test_spatialdata_of_all_slides_or_each(run, tmp_path, capsys):
    assert export(run, tmp_path / "x.sdata.zarr", genes=["CD3E"], picture_mpp=0.5) == 0
    assert "x.sdata.zarr: 70 cells" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "x.sdata.zarr").glob("*/*")}
    assert names >= {"a_he", "b_he", "a_cells", "b_cells", "table"}
    assert export(run, tmp_path / "y.sdata.zarr", per_slide=True, picture_mpp=0) == 0
    for slide_id in ("a", "b"):
        store = tmp_path / f"y.{slide_id}.sdata.zarr"
        assert {path.name for path in store.glob("*/*")} >= {"cells", "table"}
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="picture_mpp"):
            export(run, tmp_path / "x.sdata.zarr", picture_mpp=wrong)


def test_a_bad_slide_costs_no_other_one_its_file(run, tmp_path, caplog):
    path = tmp_path / "run/cells/a.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"1 slide\(s\) were not exported: a; .*cells/a\.parquet"):
        export(run, tmp_path / "x.h5ad", per_slide=True)
    assert "slide a was not exported" in caplog.text
    assert ad.read_h5ad(tmp_path / "x.b.h5ad").n_obs == 40
    assert not (tmp_path / "x.a.h5ad").exists()


@pytest.mark.parametrize("suffix", [".geojson", ".explorer"])
def test_some_formats_hold_one_slide(run, tmp_path, suffix):
    with pytest.raises(ValueError, match=r"holds one slide, and 2 are chosen: .*--per-slide"):
        export(run, tmp_path / f"x{suffix}")


def test_geojson_of_a_slide(run, tmp_path):
    assert export(run, tmp_path / "x.geojson", slides=["a"]) == 0


def test_nuclei_without_expression_have_outlines(tmp_path):
    run = make_run(tmp_path, head=False)
    assert export(run, tmp_path / "x.geojson", slides=["a"]) == 0
    with pytest.raises(ValueError, match="run predict"):
        export(run, tmp_path / "x.geojson", slides=["a"], genes=["CD3E"])


def test_an_empty_slide_has_no_file_of_its_own(run, tmp_path):
    add_slide(run.folder, "c", 0, embedding=False, hidden=True)
    assert open_run(run.uri).records["c"]["status"] == "empty"
    assert export(run, tmp_path / "x.geojson", per_slide=True) == 0
    assert not (tmp_path / "x.c.geojson").exists()
    # Asked for by name it has one, without cells.
    assert export(run, tmp_path / "c.geojson", slides=["c"]) == 0
    assert len(read_segmentation(tmp_path / "c.geojson", "c")) == 0


def test_accuracy_of_genes(run, tmp_path):
    by_gene = {"gene": ["CD3E"], "ours": {"pcc": [0.5]}}
    evaluation = {"slides": {"z": {"spots": {"models": {}, "by_gene": by_gene}}}}
    file = tmp_path / "s.json"
    file.write_text(json.dumps(evaluation))
    for name in ("x.h5ad", "x.sdata.zarr"):
        assert export(run, tmp_path / name, evaluation=str(file), picture_mpp=0) == 0
    var = ad.read_h5ad(tmp_path / "x.h5ad").var
    assert var["pcc_spots"].dropna().to_dict() == {"CD3E": 0.5}
    table = ad.read_zarr(tmp_path / "x.sdata.zarr/tables/table")
    assert list(table.var) == ["pcc_spots", "num_slides_spots"]
    with pytest.raises(ValueError, match=r"s\.json: \.geojson has no place for accuracy"):
        export(run, tmp_path / "x.geojson", evaluation=str(file), slides=["a"])
    with pytest.raises(FileNotFoundError, match=r"t\.json: no such file"):
        export(run, tmp_path / "y.h5ad", evaluation=str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match="no score of the exported genes"):
        export(run, tmp_path / "y.h5ad", evaluation=str(file), genes=["EPCAM"])
    assert not (tmp_path / "y.h5ad").exists()
