"""`genes` writes all slides, goes on from those that are there, and names slides that failed."""

from pathlib import Path

import anndata as ad
import pytest

from scellst_ray.commands.configs import ExportConfig, GenesConfig, PseudobulkConfig
from scellst_ray.commands.export import run_export
from scellst_ray.commands.genes import run_genes
from scellst_ray.commands.pseudobulk import run_pseudobulk
from scellst_ray.pipelines.over_slides import NUM_FOR_RAY
from tests.support.exported_runs import add_slide, make_run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, head=True)


def ask(run, out, genes=("CD3E",), **more):
    return run_genes(GenesConfig(run=run.uri, genes=list(genes), out=str(out), **more))


def test_all_slides_and_then_none(run, tmp_path, capsys):
    add_slide(run.folder, "c", 0, embedding=False, hidden=True)
    assert ask(run, tmp_path / "out", slides=["a"]) == 0
    assert "wrote 1 slide(s)" in capsys.readouterr().out
    assert ask(run, tmp_path / "out") == 0
    assert "wrote 1 slide(s) into" in (said := capsys.readouterr().out)
    assert "40 cells, 1 were there before" in said
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a.parquet", "b.parquet"]  # an empty slide has no cells to ask


def test_a_damaged_slide_costs_no_other_one(run, tmp_path):
    path = tmp_path / "run/expression/a.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"1 slide.* not written: a; the first: .*a\.parquet"):
        ask(run, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.parquet"]


@pytest.mark.ray
def test_workers_of_ray_find_what_is_named_from_here(run, tmp_path, local_ray, monkeypatch):
    del local_ray  # its workers run in another folder
    for number in range(NUM_FOR_RAY):
        add_slide(run.folder, f"n{number}", 5 + number, embedding=False, hidden=True)
    monkeypatch.chdir(tmp_path)
    for work, settings in [
        (run_genes, GenesConfig(run="run", genes=["CD3E"], out="out/genes")),
        (run_export, ExportConfig(run="run", out="out/x.geojson", per_slide=True)),
        (run_pseudobulk, PseudobulkConfig(run="run", out="out/slides.h5ad")),
    ]:
        assert work(settings) == 0
    assert len(list(Path("out/genes").iterdir())) == NUM_FOR_RAY + 2
    assert len(list(Path("out").glob("x.*.geojson"))) == NUM_FOR_RAY + 2
    assert ad.read_h5ad("out/slides.h5ad").n_obs == NUM_FOR_RAY + 2


def test_what_cannot_be_asked_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'CD3E'"):
        ask(run, tmp_path / "out", ["CD3D"])
    ask(run, tmp_path / "out")
    with pytest.raises(ValueError, match="holds other genes"):
        ask(run, tmp_path / "out", ["EPCAM"])
