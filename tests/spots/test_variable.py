"""Compare variable genes with scanpy's, and with a slow loop."""

import importlib
import warnings
from functools import partial

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
from scipy import sparse

from scellst_ray.spots.panel import gene_columns
from scellst_ray.spots.variable import (
    highly_variable,
    most_variable,
    normalised_variance,
    rank_over_slides,
)

VARIABLE = importlib.import_module("scanpy.preprocessing._highly_variable_genes")


def slide_counts(num_spots, num_genes, seed, dropout=0.0):
    """Return counts over-dispersed gene by gene, each gene as deep on every slide."""
    rng = np.random.default_rng(seed)
    genes = np.random.default_rng(7)
    mean_G, shape_G = genes.lognormal(0.5, 1.5, num_genes), genes.uniform(0.3, 20.0, num_genes)
    depth_S1 = rng.gamma(6.0, 1 / 6, (num_spots, 1))
    rate_SG = rng.gamma(shape_G, 1 / shape_G, (num_spots, num_genes)) * mean_G * depth_S1
    counts_SG = rng.poisson(rate_SG)
    counts_SG[rng.random(counts_SG.shape) < dropout] = 0
    return sparse.csr_matrix(counts_SG.astype(np.float32))


def moments_of_each_alone(adata, by, func):
    """Stand in for scanpy's `aggregate`, which sums in another order.

    From scanpy 1.12 on, that moves means of several slides in the last bit, and the loess makes up
    to per cents of a variance of it, where means tie. Each slide alone gives these, as scanpy 1.11.
    """
    assert func == ["mean", "var"]
    groups = adata.obs[by].cat.categories
    parts = [
        VARIABLE.stats.mean_var(adata.X[(adata.obs[by] == g).to_numpy()], axis=0, correction=1)
        for g in groups
    ]
    mean_BG, var_BG = map(np.stack, zip(*parts, strict=True))
    obs = pd.DataFrame({by: list(groups)}, index=[str(g) for g in groups])
    return anndata.AnnData(obs=obs, var=adata.var, layers={"mean": mean_BG, "var": var_BG})


def by_scanpy(slides, num_genes, *, stable=True):
    """Return scanpy's table; genes are named so that their order is that of the columns.

    Its sort leaves the order of ties to chance (to the CPU's vector units, even); made stable here.
    """
    adata = anndata.AnnData(sparse.vstack(slides, format="csr"))
    adata.var_names = [f"G{i:05d}" for i in range(adata.n_vars)]
    names = [f"slide{i}" for i, counts in enumerate(slides) for _ in range(counts.shape[0])]
    adata.obs_names = [str(i) for i in range(adata.n_obs)]
    adata.obs["slide"] = pd.Categorical(names)
    with pytest.MonkeyPatch.context() as patch:
        if stable:
            patch.setattr(np, "argsort", partial(np.argsort, kind="stable"))
        if hasattr(VARIABLE, "aggregate"):
            patch.setattr(VARIABLE, "aggregate", moments_of_each_alone)
        return scanpy.pp.highly_variable_genes(
            adata,
            flavor="seurat_v3",
            n_top_genes=num_genes,
            batch_key="slide" if len(slides) > 1 else None,
            inplace=False,
        )


def check_equals_scanpy(slides, num_genes, *, stable=True):
    columns, found = highly_variable(slides, [f"slide {i}" for i in range(len(slides))], num_genes)
    table = by_scanpy(slides, num_genes, stable=stable)
    np.testing.assert_allclose(
        found["normalised_variance"], table["variances_norm"], rtol=1e-9, atol=1e-12
    )
    np.testing.assert_array_equal(found["rank"], table["highly_variable_rank"].to_numpy())
    num_slides = table.get("highly_variable_nbatches")
    if len(slides) > 1:
        np.testing.assert_array_equal(found["num_slides"], num_slides)
    assert sorted(columns) == np.flatnonzero(table["highly_variable"]).tolist()
    return columns, table


@pytest.mark.parametrize("sizes", [(200,), (120, 90)])
def test_highly_variable_equals_scanpy_as_it_is_where_nothing_ties(sizes):
    slides = [slide_counts(size, 600, seed) for seed, size in enumerate(sizes)]
    deep = sum(np.asarray(counts.sum(axis=0)).ravel() for counts in slides) > 400
    slides = [counts[:, deep] for counts in slides]
    scores = [normalised_variance(counts, "x") for counts in slides]
    assert all(len(np.unique(score)) == deep.sum() > 200 for score in scores)
    check_equals_scanpy(slides, 60, stable=False)


@pytest.mark.parametrize(
    ("sizes", "num_genes", "num_chosen", "dropout"),
    [
        ((200,), 400, 50, 0.0),
        ((120, 90), 600, 100, 0.0),
        ((60, 150, 80), 500, 77, 0.3),
        ((300, 40), 1500, 1000, 0.1),
        ((80, 80, 80, 80), 300, 299, 0.0),
    ],
)
def test_highly_variable_equals_scanpy(sizes, num_genes, num_chosen, dropout):
    slides = [slide_counts(size, num_genes, seed, dropout) for seed, size in enumerate(sizes)]
    columns, table = check_equals_scanpy(slides, num_chosen)
    # Best genes come first, as scanpy ranks them.
    ranks = table["highly_variable_rank"].to_numpy()[columns]
    assert (np.diff(ranks) >= 0).all()


def test_genes_that_never_vary_come_last_as_in_scanpy():
    slides = [slide_counts(100, 200, seed).toarray() for seed in (0, 1)]
    for counts in slides:
        counts[:, [3, 50, 120]] = 0
        counts[:, 60] = 7
    slides[1][:, 80] = 0  # on one slide only
    slides = [sparse.csr_matrix(counts) for counts in slides]
    columns, _ = check_equals_scanpy(slides, 150)
    assert not {3, 50, 120, 60} & set(columns.tolist())


def test_ties_go_by_column_and_change_nothing_else():
    counts = slide_counts(150, 240, 5).toarray()
    counts[:, 120:] = counts[:, :120]  # every gene twice: every score ties
    slides = [sparse.csr_matrix(counts)]
    columns, found = highly_variable(slides, ["a"], 60)
    table = by_scanpy(slides, 60)
    np.testing.assert_allclose(found["normalised_variance"], table["variances_norm"], rtol=1e-9)
    # scanpy may take either twin; which genes are chosen is the same.
    expected = np.flatnonzero(table["highly_variable"]) % 120
    assert sorted(columns % 120) == sorted(expected)
    assert columns.tolist() == sorted(
        columns.tolist(), key=lambda c: (-found["normalised_variance"][c], c)
    )


def test_ranks_over_slides_with_ties_equal_scanpys_rule():
    rng = np.random.default_rng(3)
    for _ in range(60):
        score_BG = rng.integers(0, 4, (3, 12)).astype(float)
        by_score = np.argsort(-score_BG, axis=1, kind="stable")
        rank_BG = np.argsort(by_score, axis=1).astype(np.float32)
        num_slides = (rank_BG < 5).sum(axis=0)
        rank_BG[rank_BG >= 5] = np.nan
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
            table = pd.DataFrame({"rank": np.nanmedian(rank_BG, axis=0), "n": num_slides})
        expected = table.sort_values(
            ["rank", "n"], ascending=[True, False], na_position="last"
        ).index.tolist()
        order, median_G, found = rank_over_slides(score_BG, 5)
        assert order.tolist() == expected
        np.testing.assert_array_equal(median_G, table["rank"])
        np.testing.assert_array_equal(found, num_slides)


def test_order_of_slides_does_not_matter():
    slides = [slide_counts(size, 300, seed) for seed, size in enumerate((50, 90, 70))]
    plain = highly_variable(slides, ["a", "b", "c"], 40)[0].tolist()
    assert highly_variable(slides[::-1], ["c", "b", "a"], 40)[0].tolist() == plain


def test_what_cannot_be_fitted_names_the_slide_and_the_remedy():
    counts = sparse.csr_matrix(np.eye(6, dtype=np.float32))
    with pytest.raises(
        ValueError,
        match=r"slide A: the trend .* 6 genes cannot be fitted.*remedy|"
        r"slide A: the trend of variance over mean of its 6 genes.*variable:N",
    ):
        normalised_variance(counts, "slide A")
    with pytest.raises(ValueError, match=r"slide A: 1 spots have no variance"):
        normalised_variance(counts[:1], "slide A")


def test_most_variable_by_a_slow_loop():
    logs = [np.log1p(slide_counts(40, 30, seed).toarray()) for seed in (1, 2, 3)]
    scores = []
    for gene in range(30):
        parts = []
        for values in logs:
            column = values[:, gene].astype(float)
            parts.append(sum((v - column.mean()) ** 2 for v in column) / len(column))
        scores.append(sum(parts) / 3)
    expected = sorted(range(30), key=lambda gene: (-scores[gene], gene))[:7]
    columns, found = most_variable(logs, 7)
    assert columns.tolist() == expected
    assert most_variable(logs[::-1], 7)[0].tolist() == expected
    np.testing.assert_allclose(found["variance"], scores)


def test_her2st_equals_scanpy(her2st):
    sections = [her2st("C2"), her2st("C4")]
    common = sorted(set(sections[0].genes) & set(sections[1].genes))
    slides = [s.counts[:, gene_columns(s.genes, common, "x")] for s in sections]
    total = sum(np.asarray(counts.sum(axis=0)).ravel() for counts in slides)
    deep = np.flatnonzero(total >= 400)
    check_equals_scanpy([counts[:, deep] for counts in slides], 250)
