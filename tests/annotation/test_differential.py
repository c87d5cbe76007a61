import anndata as ad
import numpy as np
import pytest
import scanpy as sc

from scellst_ray.annotation.differential import comparable_types, differential_genes, fold_changes
from scellst_ray.annotation.moments import block_moments, merge_moments

GENES = [f"G{n}" for n in range(40)]


def cells(seed=0, factor=1.0):
    """Return values of 300 cells of three types, which differ in some genes, and their types."""
    random = np.random.default_rng(seed)
    types = np.repeat(["a", "b", "c"], [20, 80, 200])
    x = random.gamma(2, 1, (300, len(GENES)))
    x[types == "b", :5] += 0.7
    x[:, 7] = 2
    return factor * x, types


def ours(x, types, block=37):
    parts = {}
    for start in range(0, len(x), block):
        rows = slice(start, start + block)
        for name in np.unique(types[rows]):
            part = block_moments(x[rows][types[rows] == name])
            parts.setdefault(str(name), []).append(part)
    moments = {name: merge_moments(each) for name, each in parts.items()}
    return differential_genes(moments, GENES, "d").to_pandas()


@pytest.mark.parametrize("factor", [1.0, 30.0, 0.001])
def test_equal_to_scanpy(factor):
    x, types = cells(factor=factor)
    adata = ad.AnnData(x.copy(), obs={"type": types})
    adata.var_names = GENES
    sc.tl.rank_genes_groups(adata, "type", method="t-test")
    found = ours(x, types)
    assert found["nucleus_type"].unique().tolist() == ["a", "b", "c"]
    for name, own in found.groupby("nucleus_type"):
        theirs = sc.get.rank_genes_groups_df(adata, name).set_index("names")
        theirs = theirs.loc[own["gene"]]
        for column in ("scores", "logfoldchanges", "pvals", "pvals_adj"):
            np.testing.assert_allclose(own[column], theirs[column], rtol=1e-5, atol=1e-6)
        assert own["scores"].is_monotonic_decreasing
        assert set(own["num_cells"]) == {(types == name).sum()}
        ratio = x[types == name].mean(axis=0) / x[types != name].mean(axis=0)
        columns = [GENES.index(gene) for gene in own["gene"]]
        np.testing.assert_allclose(own["log2_ratio"], np.log2(ratio[columns]), atol=1e-5)


def test_fold_changes_do_not_overflow():
    means, rest = np.array([900.0, 39.9, 40.1, 0.0]), np.array([800.0, 40.1, 39.9, 0.0])
    found = fold_changes(means, rest)
    np.testing.assert_allclose(found[1:3], (means - rest)[1:3] / np.log(2), rtol=1e-9)
    assert found[0] == pytest.approx(100 / np.log(2))
    assert found[3] == 0


def test_types_of_too_few_cells_are_left_out():
    x, types = cells()
    types = types.astype(object)
    types[0] = "single"
    found = ours(x, types)
    assert "single" not in set(found["nucleus_type"])
    moments = {"a": block_moments(x), "b": block_moments(x[:1])}
    assert comparable_types(moments) == []
    assert len(differential_genes({"nucleus": block_moments(x)}, GENES, "d")) == 0
