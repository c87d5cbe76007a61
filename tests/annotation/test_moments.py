import anndata as ad
import numpy as np
import pytest
import scanpy as sc

from scellst_ray.annotation.moments import block_moments, merge_moments, t_test


def values(num_cells=300, num_genes=40, seed=0):
    return np.random.default_rng(seed).gamma(2, 1, (num_cells, num_genes))


@pytest.mark.parametrize("cuts", [[], [1], [0, 7, 7, 150], [299]])
def test_blocks_give_the_moments_of_all_cells(cuts):
    x = 1e6 + values()
    moments = merge_moments([block_moments(part) for part in np.split(x, cuts)])
    assert moments.num_cells == 300
    np.testing.assert_allclose(moments.mean_G, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance_G, x.var(axis=0, ddof=1), rtol=1e-7)


@pytest.mark.parametrize("method", ["t-test", "t-test_overestim_var"])
def test_t_equals_scanpys(method):
    x = values()
    x[:, 3] = 1
    types = np.repeat(["a", "b", "c"], [20, 80, 200])
    adata = ad.AnnData(x, obs={"type": types})
    sc.tl.rank_genes_groups(adata, "type", method=method)
    for name in "abc":
        group, rest = block_moments(x[types == name]), block_moments(x[types != name])
        t, p = t_test(group, rest, overestimate_variance=method != "t-test")
        theirs = sc.get.rank_genes_groups_df(adata, name)
        order = theirs["names"].astype(int).to_numpy()
        np.testing.assert_allclose(t[order], theirs["scores"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(p[order], theirs["pvals"], rtol=1e-6)


def test_too_few_cells_are_refused():
    with pytest.raises(ValueError, match="1 cells against 299"):
        t_test(block_moments(values()[:1]), block_moments(values()[1:]))
    with pytest.raises(ValueError, match="no moments"):
        merge_moments([])


def test_the_rest_of_some_cells():
    x = 1e6 + values()
    whole = block_moments(x)
    rest = whole.without(block_moments(x[:70]))
    expected = block_moments(x[70:])
    assert rest.num_cells == 230
    np.testing.assert_allclose(rest.mean_G, expected.mean_G, rtol=1e-12)
    np.testing.assert_allclose(rest.squares_G, expected.squares_G, rtol=1e-6)
    assert whole.without(whole).num_cells == 0
