"""`genes` writes all slides, goes on from those that are there, and names slides that failed."""

import pytest

from scellst_ray.commands.configs import GenesConfig
from scellst_ray.commands.genes import run_genes
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


def test_what_cannot_be_asked_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'CD3E'"):
        ask(run, tmp_path / "out", ["CD3D"])
    ask(run, tmp_path / "out")
    with pytest.raises(ValueError, match="holds other genes"):
        ask(run, tmp_path / "out", ["EPCAM"])
