"""`annotate` scores all slides, goes on from those that are there, and refuses bad input."""

import json
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from scellst_ray.commands import annotate
from scellst_ray.commands.annotate import run_annotate
from scellst_ray.commands.cli import main
from scellst_ray.commands.configs import AnnotateConfig
from scellst_ray.pipelines.over_slides import NUM_FOR_RAY
from scellst_ray.runs.leftovers import sweep
from scellst_ray.runs.reading import open_run
from scellst_ray.runs.scores import (
    read_agreement,
    read_differential_genes,
    read_scores,
    read_scores_info,
)
from scellst_ray.runs.verify import verify_run
from tests.support import exported_runs
from tests.support.exported_runs import add_slide, make_run

GENES = [f"G{n}" for n in range(60)]
SETS = {"T cell": ["G1", "G7", "G9"], "t_cell": ["G2", "G3"], "B": ["G5"]}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(exported_runs, "GENES", GENES)
    return make_run(tmp_path, head=True)


def ask(run, sets=SETS, **more):
    path = Path(run.uri).parent / "m.json"
    path.write_text(json.dumps(sets))
    assert run_annotate(AnnotateConfig(run=run.uri, markers=str(path), **more)) == 0
    return open_run(run.uri)


def column(run, name):
    return np.concatenate([read_scores(run, s)[name].to_numpy() for s in run.choose()])


@pytest.mark.parametrize("scale", [True, False])
def test_scores_equal_scanpys(run, scale, capsys):
    add_slide(run.folder, "c", 55, embedding=False, hidden=True)
    run = ask(run, scale=scale)
    info = read_scores_info(run.uri)
    assert [each["column"] for each in info["types"]] == [
        "score_T_cell",
        "score_t_cell_2",
        "score_B",
    ]
    adata = ad.AnnData(np.concatenate([run.expression_numpy(None, s) for s in run.choose()]))
    adata.var_names = GENES
    sc.pp.normalize_total(adata, target_sum=1e4)
    if scale:
        sc.pp.scale(adata)
    for each in info["types"]:
        if scale:  # the controls of scanpy would depend on the order of cells
            parts = [adata[:, each[key]].X.mean(axis=1) for key in ("markers", "controls")]
            expected = parts[0] - parts[1]
        else:
            sc.tl.score_genes(adata, each["markers"])
            expected = adata.obs["score"].to_numpy()
        np.testing.assert_allclose(
            column(run, each["column"]), expected, rtol=1e-4, atol=1e-4 * expected.std()
        )
    assert "scored 125 cells of 3 slide(s) for 3 type(s)" in capsys.readouterr().out


def test_a_second_call_does_nothing_and_another_one_all(run, capsys, monkeypatch):
    run = ask(run)
    before = column(run, "score_B")
    monkeypatch.setattr(annotate, "over_slides", None)
    ask(run)
    assert "have these scores already" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(exported_runs, "GENES", GENES)
    ask(run, scale=False)
    assert not np.allclose(column(run, "score_B"), before)
    add_slide(run.folder, "late", 9, embedding=False, hidden=True)
    assert set(read_scores_info(ask(run).uri)["slides"]) == {"a", "b", "late"}


def test_an_interrupted_call_keeps_what_is_there(run):
    run = ask(run)
    info = read_scores_info(run.uri)
    scores = Path(run.uri) / "scores"
    (scores / "scores.json").unlink()
    (scores / "b.parquet").unlink()
    kept = (scores / "a.parquet").stat().st_mtime_ns
    found = read_scores_info(ask(run).uri)
    assert found["slides"] == info["slides"]
    assert (scores / "a.parquet").stat().st_mtime_ns == kept


def test_a_damaged_slide_costs_no_other_one(run, tmp_path):
    path = tmp_path / "run/expression/a.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"1 slide.* not read: a; the first: .*a\.parquet"):
        ask(run)
    assert list(read_scores_info(run.uri)["slides"]) == ["b"]
    path.write_bytes(content)
    assert list(read_scores_info(ask(run).uri)["slides"]) == ["a", "b"]


def test_differential_genes_and_agreement_are_of_all_cells(run, capsys):
    run = ask(run, type_map=["B=immune", "T cell=immune", "t_cell=stroma"])
    slides = run.choose()
    adata = ad.AnnData(np.concatenate([run.expression_numpy(None, s) for s in slides]))
    adata.var_names = GENES
    adata.obs["type"] = run.cells_frame(slides, ["nucleus_type"])["nucleus_type"].to_list()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.tl.rank_genes_groups(adata, "type", method="t-test")
    found = read_differential_genes(run).to_pandas()
    for name, own in found.groupby("nucleus_type"):
        theirs = sc.get.rank_genes_groups_df(adata, name).set_index("names").loc[own["gene"]]
        for column in ("scores", "pvals", "pvals_adj"):
            np.testing.assert_allclose(own[column], theirs[column], rtol=1e-3, atol=1e-4)
        finite = np.isfinite(theirs["logfoldchanges"].to_numpy())
        np.testing.assert_allclose(
            own["logfoldchanges"][finite], theirs["logfoldchanges"][finite], rtol=1e-3, atol=1e-2
        )
    assert set(found["nucleus_type"]) == {"Neoplastic", "immune", "stroma"}
    agreement = read_agreement(run).to_pandas()
    assert agreement["n"].sum() == 70
    expected = {}
    for nucleus, types in (("immune", ["B", "T cell"]), ("stroma", ["t_cell"])):
        of = agreement[agreement["nucleus_type"] == nucleus]
        expected[nucleus] = of["n"][of["best_type"].isin(types)].sum() / of["n"].sum()
    stored = read_scores_info(run.uri)["agreement"]
    assert stored["recall"] == expected
    balanced = sum(expected.values()) / 2
    assert stored["balanced_accuracy"] == pytest.approx(balanced)
    said = capsys.readouterr().out
    assert f"balanced accuracy {balanced:.3f} over 2 types (chance 0.500)" in said
    # Another map needs no new scores.
    ask(run, type_map=["B=Neoplastic", "t_cell=stroma"])
    assert "have these scores already" in capsys.readouterr().out
    assert set(read_scores_info(run.uri)["agreement"]["recall"]) == {"Neoplastic", "stroma"}
    ask(run)
    assert "agreement" not in read_scores_info(run.uri)
    with pytest.raises(ValueError, match=r"type_map: nucleus types.*'imune'.*'immune'"):
        ask(run, type_map=["B=imune"])


def test_nuclei_of_one_type_have_no_differential_genes(run, monkeypatch, caplog):
    monkeypatch.setattr(exported_runs, "TYPES", ["nucleus"])
    for slide_id, count in (("a", 30), ("b", 40)):
        add_slide(run.folder, slide_id, count, embedding=False, hidden=True)
    run = ask(open_run(run.uri))
    assert len(read_differential_genes(run)) == 0
    assert "all nuclei are of one type, 'nucleus'" in caplog.text


def test_a_cell_that_is_not_finite_has_no_scores(run, monkeypatch, capsys):
    monkeypatch.setattr(exported_runs, "NAN_CELLS", [3])
    add_slide(run.folder, "a", 30, embedding=False, hidden=True)
    run = ask(open_run(run.uri))
    table = read_scores(run, "a")
    assert [i for i, best in enumerate(table["best_type"].to_pylist()) if best is None] == [3]
    assert table["score_B"].null_count == 1
    assert read_scores_info(run.uri)["slides"]["a"]["num_unscored"] == 1
    assert "1 cells have no scores" in capsys.readouterr().out


def test_gc_leaves_scores_and_takes_what_a_crash_left(run):
    run = ask(run)
    left = Path(run.uri) / "scores" / ".b.parquet.0123456789abcdef"
    left.write_bytes(b"x")
    removed = [Path(each.path) for each in sweep(run.uri)]
    assert [path for path in removed if path.parent == left.parent] == [left]
    assert len(read_scores(run, "b")) == 40


def reference(path, **more):
    random = np.random.default_rng(0)
    types = np.repeat(["B", "T"], 40)
    x = random.poisson(2, (80, len(GENES))).astype(np.float32)
    x[:40, :10] += 6
    x[40:, 10:20] += 6
    adata = ad.AnnData(x, obs={"kind": pd.Categorical(types)}, var=pd.DataFrame(index=GENES))
    adata.write_h5ad(path)
    return AnnotateConfig(reference=str(path), reference_key="kind", markers_per_type=5, **more)


def test_markers_of_a_reference(run, tmp_path):
    assert run_annotate(reference(tmp_path / "r.h5ad", run=run.uri)) == 0
    info = read_scores_info(run.uri)
    named = {each["name"]: {int(g[1:]) // 10 for g in each["markers"]} for each in info["types"]}
    assert named == {"B": {0}, "T": {1}}
    assert info["source"].startswith("5 genes of highest t")


@pytest.mark.ray
def test_workers_of_ray_find_what_is_named_from_here(run, tmp_path, local_ray, monkeypatch):
    del local_ray  # its workers run in another folder
    for number in range(NUM_FOR_RAY):
        add_slide(run.folder, f"n{number}", 5 + number, embedding=False, hidden=True)
    (tmp_path / "m.csv").write_text("B,T\nG1,G2\n")
    monkeypatch.chdir(tmp_path)
    assert run_annotate(AnnotateConfig(run="run", markers="m.csv")) == 0
    assert len(read_scores_info(run.uri)["slides"]) == NUM_FOR_RAY + 2


def test_a_run_of_the_first_release(tmp_path):
    uri = shutil.copytree(Path(__file__).parents[1] / "archives/v1/run", tmp_path / "run")
    (tmp_path / "m.csv").write_text("tumour,immune\nERBB2,PTPRC\n")
    config = AnnotateConfig(run=str(uri), markers=str(tmp_path / "m.csv"))
    assert run_annotate(config) == run_annotate(config) == 0
    run = open_run(uri)
    assert len(read_scores(run, "unseen")) == run.records["unseen"]["num_cells"] == 41
    finished = run.records["unseen"]["finished"]
    assert read_scores_info(run.uri)["slides"]["unseen"]["expression"] == finished
    assert verify_run(run.uri).problems == []


def error_of(words, capsys):
    assert main(["annotate", *words]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def test_what_cannot_be_scored_is_refused_before_any_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(annotate, "over_slides", None)
    (tmp_path / "m.csv").write_text("T,B\nG1,XX\n")
    assert "none of the 1 markers of type 'B'" in error_of(
        [run.uri, "--markers", str(tmp_path / "m.csv")], capsys
    )
    assert "no such file of markers" in error_of([run.uri, "--markers", "absent.csv"], capsys)
    assert "either --markers FILE or --reference" in error_of([run.uri], capsys)
    both = ["--markers", "m.csv", "--reference", "r.h5ad"]
    assert "either --markers FILE or --reference" in error_of([run.uri, *both], capsys)
    assert "no such reference" in error_of([run.uri, "--reference", "absent.h5ad"], capsys)
    reference(tmp_path / "r.h5ad", run="r")
    assert "no column 'cell_type'" in error_of(
        [run.uri, "--reference", str(tmp_path / "r.h5ad")], capsys
    )
    nuclei = make_run(tmp_path / "nuclei", head=False)
    assert "run predict" in error_of([nuclei.uri, "--markers", str(tmp_path / "m.csv")], capsys)


def test_a_run_without_cells_is_refused(run, tmp_path, capsys):
    for slide_id in ("a", "b"):
        add_slide(run.folder, slide_id, 0, embedding=False, hidden=True)
    (tmp_path / "m.csv").write_text("T\nG1\n")
    assert "no slide has cells" in error_of([run.uri, "--markers", str(tmp_path / "m.csv")], capsys)
