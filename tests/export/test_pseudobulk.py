"""Pseudobulk equals plain loops over cells, and its example in docs runs on patients left out."""

import dataclasses
import re
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scellst_ray.export.pseudobulk import make_pseudobulk, slide_bulk, write_pseudobulk
from tests.support import exported_runs
from tests.support.exported_runs import GENES, MPP
from tests.support.paths import ROOT

predicted = exported_runs.predicted  # a fixture
RADIUS_UM = 40.0


def test_a_slide_equals_a_loop_over_its_cells(predicted):
    bulk = slide_bulk(predicted, "b", RADIUS_UM)
    values_NG = predicted.expression_numpy(None, "b")
    np.testing.assert_allclose(bulk.mean_G, values_NG.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(bulk.sd_G, values_NG.std(axis=0), rtol=1e-4)
    cells = predicted.cells("b").to_pylist()
    xy = np.array([[row["x0"], row["y0"]] for row in cells]) * MPP
    types = np.array([row["nucleus_type"] for row in cells])
    is_near = np.linalg.norm(xy[:, None] - xy[None], axis=2) <= RADIUS_UM
    np.fill_diagonal(is_near, val=False)
    assert bulk.counts == {name: (types == name).sum() for name in np.unique(types)}
    for (around, of), found in bulk.near.items():
        expected = is_near[np.ix_(types == around, types == of)].sum(axis=1).mean()
        assert found == pytest.approx(expected)


def test_a_slide_of_an_earlier_release_is_read_from_its_cells(predicted):
    records = {
        s: {k: v for k, v in r.items() if k != "files"} for s, r in predicted.records.items()
    }
    old = dataclasses.replace(predicted, records=records)
    one, two = (slide_bulk(run, "a", RADIUS_UM) for run in (old, predicted))
    np.testing.assert_allclose(one.mean_G, two.mean_G, rtol=1e-5)
    np.testing.assert_allclose(one.sd_G, two.sd_G, rtol=1e-4)


def test_the_table_of_slides(predicted, tmp_path):
    bulks = {s: slide_bulk(predicted, s, RADIUS_UM) for s in ("b", "a")}
    bulks["a"] = dataclasses.replace(bulks["a"], counts={"Neoplastic": 30}, near={})
    columns = {"b": {"patient_id": "P1", "age": 61.5, "grade": 2}, "a": {"patient_id": "P2"}}
    made = make_pseudobulk(predicted, bulks, columns, RADIUS_UM)
    write_pseudobulk(made, str(tmp_path / "x.h5ad"))
    found = ad.read_h5ad(tmp_path / "x.h5ad")
    assert found.obs_names.tolist() == ["b", "a"]
    assert found.var_names.tolist() == GENES
    np.testing.assert_array_equal(found.X[0], bulks["b"].mean_G)
    np.testing.assert_array_equal(found.layers["sd"][1], bulks["a"].sd_G)
    assert found.obs["num_cells"].tolist() == [40, 30]
    assert found.obs["share_Neoplastic"].tolist()[1] == 1
    assert found.obs["share_immune"].tolist()[1] == 0
    assert found.obs["near_immune_stroma"].tolist()[1] == 0
    assert found.obs["patient_id"].tolist() == ["P1", "P2"]
    assert found.obs["age"].tolist()[0] == 61.5
    assert np.isnan(found.obs["age"].tolist()[1])
    assert found.uns["scellst_ray"]["radius_um"] == RADIUS_UM
    with pytest.raises(ValueError, match="columns num_cells have names of pseudobulk's own"):
        make_pseudobulk(predicted, bulks, {"a": {"num_cells": 1}}, RADIUS_UM)
    with pytest.raises(ValueError, match="no slide has cells"):
        make_pseudobulk(predicted, {}, {}, RADIUS_UM)


@pytest.mark.parametrize(
    ("types", "names"),
    [
        (["T/NK", "B"], ["share_B", "share_T_NK", "near_B_B", "near_B_T_NK", "near_T_NK_T_NK"]),
        (["T/NK", "T_NK"], ["share_T_NK", "share_T_NK_2", "near_T_NK_T_NK_4"]),
        (["/", "a/b/c"], ["share__", "share_a_b_c", "near____", "near_a_b_c__"]),
        (["a", "a_a"], ["share_a", "share_a_a", "near_a_a_a", "near_a_a_a_2"]),
    ],
)
def test_names_of_types_may_hold_slashes(predicted, tmp_path, types, names):
    near = {(a, b): 10.0 * i + j for i, a in enumerate(types) for j, b in enumerate(types)}
    bulk = slide_bulk(predicted, "a", RADIUS_UM)
    counts = dict(zip(types, (10, 20), strict=True))
    bulk = dataclasses.replace(bulk, counts=counts, near=near)
    columns = {"a": {"grade 1/2": "x", "grade 1_2": "y", "T/N": 3}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        made = make_pseudobulk(predicted, {"a": bulk}, columns, RADIUS_UM)
        write_pseudobulk(made, str(tmp_path / "x.h5ad"))
    found = ad.read_h5ad(tmp_path / "x.h5ad").obs
    assert set(names) <= set(found)
    assert not [name for name in found if "/" in name]
    # Types are in the order of the alphabet, and no value is lost.
    order = sorted(types)
    expected = [30, *[counts[t] / 30 for t in order], *[near[a, b] for a in order for b in order]]
    assert found.iloc[0, :7].tolist() == pytest.approx(expected)
    assert list(found)[7:] == ["grade 1_2_2", "grade 1_2", "T_N"]
    assert found.iloc[0, 7:].tolist() == ["x", "y", 3]


def test_the_example_in_docs_finds_a_response_in_patients_left_out(tmp_path, monkeypatch):
    """Patients who respond have more immune cells; slides of one patient are alike."""
    rng = np.random.default_rng(0)
    patients = np.repeat([f"P{n}" for n in range(12)], 3)
    responds = np.repeat(np.arange(12) % 2 == 0, 3)
    share = 0.2 + 0.2 * responds + rng.normal(0, 0.03, 36)
    obs = {"share_immune": share, "near_immune_immune": 10 * share, "patient_id": patients}
    obs["response"] = np.where(responds, "yes", "no")
    names = [f"s{n}" for n in range(36)]
    adata = ad.AnnData(rng.normal(size=(36, 5)).astype(np.float32), pd.DataFrame(obs, index=names))
    adata.write_h5ad(tmp_path / "slides.h5ad")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/response-models.md").read_text()
    scope = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], scope)
    assert scope["features"].shape == (36, 7)
    assert scope["auc"] > 0.9
