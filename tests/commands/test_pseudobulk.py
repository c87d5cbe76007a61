"""`pseudobulk` names the slides that it leaves out, and writes nothing if a slide fails."""

import anndata as ad
import pytest

from scellst_ray.commands.configs import PseudobulkConfig
from scellst_ray.commands.pseudobulk import run_pseudobulk
from tests.support.exported_runs import add_slide, make_run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, head=True)


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("slide_id,uri,spots,patient_id,response\na,a.png,x,P1,yes\nb,b.png,,P2,no\n")
    return str(path)


def ask(run, out, **more):
    return run_pseudobulk(PseudobulkConfig(run=run.uri, out=str(out), **more))


def test_slides_with_the_manifests_columns(run, manifest, tmp_path, capsys, caplog):
    add_slide(run.folder, "c", 0, embedding=False, hidden=True)
    assert ask(run, tmp_path / "x.h5ad", manifest=manifest) == 0
    assert "2 slides x 3 genes" in capsys.readouterr().out
    assert "1 slide(s) have no cells and are left out: c" in caplog.text
    found = ad.read_h5ad(tmp_path / "x.h5ad").obs
    assert found["response"].tolist() == ["yes", "no"]
    assert "spots" not in found


def test_a_damaged_slide_stops_the_table(run, tmp_path):
    path = tmp_path / "run/cells/a.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"1 slide.* not summed up: a; the first: .*a\.parquet"):
        ask(run, tmp_path / "x.h5ad")
    assert not (tmp_path / "x.h5ad").exists()
    assert ask(run, tmp_path / "x.h5ad", slides=["b"]) == 0


def test_what_cannot_be_used_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"end the name in \.h5ad"):
        ask(run, tmp_path / "x.csv")
    (tmp_path / "m2.csv").write_text("slide_id,uri\na,a.png\n")
    with pytest.raises(ValueError, match=r"m2\.csv: lacks slide 'b' \(1 such slides\)"):
        ask(run, tmp_path / "x.h5ad", manifest=str(tmp_path / "m2.csv"))
    nuclei = make_run(tmp_path / "nuclei", head=False)
    with pytest.raises(ValueError, match="run predict"):
        ask(nuclei, tmp_path / "x.h5ad")
    with pytest.raises(ValueError, match="radius_um"):
        PseudobulkConfig(run="r", out="x.h5ad", radius_um=0)
