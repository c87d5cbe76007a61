import anndata as ad
import numpy as np
import pytest
import scanpy as sc

from scellst_ray.annotation.gene_scores import make_scorer
from scellst_ray.annotation.moments import merge_moments
from scellst_ray.annotation.normalised import slide_moments
from scellst_ray.annotation.score_slide import Plan, best_types, is_scored, score_slide
from scellst_ray.models.mil import stored_head
from scellst_ray.runs.scores import scores_uri
from scellst_ray.storage import read_table
from tests.support import exported_runs
from tests.support.exported_runs import make_run

GENES = [f"G{n}" for n in range(50)]
SETS = {"one": [1, 7], "two": [2, 3, 30]}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(exported_runs, "GENES", GENES)
    monkeypatch.setattr(stored_head, "BLOCK_VALUES", 600)  # blocks of 12 cells
    return make_run(tmp_path, head=True)


def plan_of(run, *, scale, digest="d"):
    parts = [m for s in ("a", "b") for m in slide_moments(run, s).values()]
    scorer = make_scorer(merge_moments(parts), SETS, scale=scale)
    return Plan(scorer, ("score_one", "score_two"), digest)


@pytest.mark.parametrize("scale", [True, False])
def test_scores_are_scanpys_of_all_cells(run, scale):
    plan = plan_of(run, scale=scale)
    x = np.concatenate([run.expression_numpy(None, s) for s in ("a", "b")])
    adata = ad.AnnData(x)
    adata.var_names = GENES
    sc.pp.normalize_total(adata, target_sum=1e4)
    if scale:
        sc.pp.scale(adata)
    tables = []
    for slide_id in ("a", "b"):
        slide, counts = score_slide(run, slide_id, plan)
        tables.append(read_table(scores_uri(run.uri, slide_id)))
        assert slide["num_cells"] == counts.total() == len(tables[-1])
        assert tables[-1]["cell_id"].equals(run.cells(slide_id)["cell_id"])
    scores = []
    for name, members, controls in zip(SETS, SETS.values(), plan.scorer.controls, strict=True):
        expected = adata.X[:, members].mean(axis=1) - adata.X[:, controls].mean(axis=1)
        if not scale:
            sc.tl.score_genes(adata, [GENES[i] for i in members])
            expected = adata.obs["score"].to_numpy()
        got = np.concatenate([table[f"score_{name}"].to_numpy() for table in tables])
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.std())
        scores.append(got)
    best = [value for table in tables for value in table["best_type"].to_pylist()]
    assert best == [list(SETS)[i] for i in np.argmax(scores, axis=0)]


def test_a_table_that_is_there_is_kept(run):
    plan = plan_of(run, scale=True)
    first = score_slide(run, "a", plan)
    path = scores_uri(run.uri, "a")
    assert is_scored(run, "a", plan)
    assert not is_scored(run, "b", plan)
    assert score_slide(run, "a", plan) == first
    assert not is_scored(run, "a", plan_of(run, scale=True, digest="other"))
    with open(path, "wb") as file:  # noqa: PTH123 - cut by a crash
        file.write(b"PAR1")
    assert not is_scored(run, "a", plan)
    assert score_slide(run, "a", plan) == first


def test_counts_are_by_nucleus_type_and_best_type(run):
    _, counts = score_slide(run, "a", plan_of(run, scale=True))
    types = run.cells("a")["nucleus_type"].to_pylist()
    best = read_table(scores_uri(run.uri, "a"))["best_type"].to_pylist()
    pairs = list(zip(types, best, strict=True))
    assert dict(counts) == {pair: pairs.count(pair) for pair in pairs}


def test_the_first_of_equal_scores_is_best_and_no_score_is_none():
    scores = np.array([[1.0, 1.0], [0.0, 2.0], [np.nan, np.nan], [-2.0, -3.0]])
    assert best_types(scores, ["a", "b"]).to_pylist() == ["a", "b", None, "a"]
