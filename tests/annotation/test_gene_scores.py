import anndata as ad
import numpy as np
import pytest
import scanpy as sc

from scellst_ray.annotation.gene_scores import choose_bins, control_genes, make_scorer
from scellst_ray.annotation.moments import block_moments, merge_moments


def unit(num_cells, num_genes, seed):
    """Return values whose genes differ in mean, all with variance 1."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(num_cells, num_genes))
    return x / x.std(axis=0, ddof=1) + random.normal(size=num_genes)


@pytest.mark.parametrize("num_genes", [40, 250, 2000])
@pytest.mark.parametrize("members", [[0, 3, 9], [5], list(range(20))])
def test_scores_equal_scanpys(num_genes, members):
    x = unit(60, num_genes, seed=num_genes)
    adata = ad.AnnData(x.copy())
    moments = block_moments(x)
    # Unit variance: scaling only shifts genes, and scanpy's bins see their means.
    sc.tl.score_genes(adata, [str(i) for i in members])
    controls = control_genes(moments.mean_G, members)
    ours = x[:, members].mean(axis=1) - x[:, controls].mean(axis=1)
    np.testing.assert_allclose(ours, adata.obs["score"], atol=1e-12)
    sc.pp.scale(adata)
    scaled = adata.X[:, members].mean(axis=1) - adata.X[:, controls].mean(axis=1)
    got = make_scorer(moments, {"set": members}).score(x)[:, 0]
    np.testing.assert_allclose(got, scaled, atol=1e-10)


def test_order_of_cells_changes_nothing():
    x = unit(200, 500, seed=1)
    order = np.random.default_rng(2).permutation(200)
    first = make_scorer(block_moments(x), {"a": [1, 2], "b": [3]}).score(x)
    second = make_scorer(block_moments(x[order]), {"a": [1, 2], "b": [3]}).score(x)
    np.testing.assert_allclose(first, second, atol=1e-9)


@pytest.mark.parametrize("num_genes", [5, 24, 35])
def test_small_panels_get_fewer_bins_by_the_rules_of_scanpy(num_genes):
    x = unit(60, num_genes, seed=num_genes)
    moments = block_moments(x)
    sets = {"a": [1, 2], "b": [0]}
    scorer = make_scorer(moments, sets, scale=False)
    assert 1 < scorer.num_bins < 25
    for column, members in enumerate(sets.values()):
        adata = ad.AnnData(x.copy())
        sc.tl.score_genes(adata, [str(i) for i in members], n_bins=scorer.num_bins)
        np.testing.assert_allclose(scorer.score(x)[:, column], adata.obs["score"], atol=1e-12)


def test_the_least_panels_are_compared_with_all_other_genes():
    sets = {"low": [0], "high": [1]}
    scorer = make_scorer(block_moments(np.array([[1, 5], [0, 6]])), sets, scale=False)
    assert scorer.num_bins == 1
    assert [controls.tolist() for controls in scorer.controls] == [[1], [0]]


def test_markers_that_are_the_whole_panel_are_refused():
    with pytest.raises(ValueError, match="type 'all': its 20 genes leave none"):
        choose_bins(np.arange(20.0), {"one": [3], "all": list(range(20))})


def test_unscaled_scores_equal_scanpys():
    x = np.random.default_rng(3).gamma(2, 1, (90, 130))
    moments, members = block_moments(x), [4, 9, 77]
    adata = ad.AnnData(x.copy())
    sc.tl.score_genes(adata, [str(i) for i in members])
    got = make_scorer(moments, {"set": members}, scale=False).score(x)[:, 0]
    np.testing.assert_allclose(got, adata.obs["score"], atol=1e-12)


def test_a_gene_that_never_varies_adds_nothing_but_its_mean():
    x = np.random.default_rng(4).gamma(2, 1, (200, 60))
    x[:, 5] = 0.1  # whose mean and deviations are rounded
    parts = [block_moments(part) for part in np.split(x, [3, 70])]
    found = make_scorer(merge_moments(parts), {"a": [5, 6]}).score(x)
    assert np.abs(found).max() < 10
