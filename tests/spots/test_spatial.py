"""Compare Moran's I and the graph of neighbours with squidpy's; find planted genes."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scellst_ray.spots.spatial import morans_i, neighbour_graph, spatially_variable
from tests.support.paths import SHARED

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # libraries that squidpy imports warn
    import squidpy

HER2ST = SHARED / "data" / "st_her2st"


def hexagons(rows=9, columns=11, pitch0=137.0, jitter=0.0, seed=0):
    """Return centres of a Visium-like lattice: every other row half a pitch to the right."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    xy0 = np.column_stack([(column + row % 2 / 2) * pitch0, row * pitch0 * np.sqrt(3) / 2])
    return xy0 + np.random.default_rng(seed).uniform(-jitter, jitter, xy0.shape) * pitch0


def squares(rows=8, columns=9, pitch0=291.0):
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.column_stack([column, row]) * pitch0


def by_squidpy(weights, values_SG, *, row_normalise):
    adata = anndata.AnnData(np.asarray(values_SG, np.float64))
    adata.obsp["spatial_connectivities"] = weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = squidpy.gr.spatial_autocorr(
            adata, mode="moran", transformation=row_normalise, copy=True, show_progress_bar=False
        )
    return table.loc[adata.var_names, "I"].to_numpy()


@pytest.mark.parametrize("row_normalise", [True, False])
@pytest.mark.parametrize("layout", ["hexagons", "squares", "scattered", "islands"])
def test_morans_i_equals_squidpy(layout, row_normalise):
    rng = np.random.default_rng(1)
    xy0 = {
        "hexagons": hexagons(jitter=0.03),
        "squares": squares(),
        "scattered": rng.uniform(0, 1000, (83, 2)),
        "islands": np.concatenate([hexagons(5, 5), [[1e5, 1e5], [2e5, 0]]]),  # two without links
    }[layout]
    values_SG = np.log1p(rng.poisson(rng.gamma(2, 2, 40), (len(xy0), 40)))
    values_SG[:, :5] += np.sin(xy0[:, :1] / 300)
    graph = neighbour_graph(xy0, "here")
    found = morans_i(graph.weights, values_SG, row_normalise=row_normalise)
    expected = by_squidpy(graph.weights, values_SG, row_normalise=row_normalise)
    np.testing.assert_allclose(found, expected, atol=1e-9, rtol=0)


def test_morans_i_by_its_formula():
    xy0 = hexagons(4, 4)
    weights = neighbour_graph(xy0, "here").weights.toarray()
    values = np.random.default_rng(0).gamma(2, 1, (16, 3))
    for gene, found in enumerate(morans_i(sparse.csr_matrix(weights), values, row_normalise=False)):
        z = values[:, gene] - values[:, gene].mean()
        top = sum(weights[i, j] * z[i] * z[j] for i in range(16) for j in range(16))
        assert found == pytest.approx(16 / weights.sum() * top / (z**2).sum(), rel=1e-12)


def test_blocks_of_genes_change_nothing(monkeypatch):
    graph = neighbour_graph(hexagons(), "here")
    values = np.random.default_rng(0).gamma(2, 1, (99, 23)).astype(np.float32)
    whole = morans_i(graph.weights, values)
    monkeypatch.setattr("scellst_ray.spots.spatial.BLOCK_GENES", 5)
    np.testing.assert_allclose(morans_i(graph.weights, values), whole, rtol=1e-12)


def test_a_constant_gene_has_none_and_a_gradient_much():
    xy0 = hexagons()
    values = np.column_stack([np.full(99, 0.1), xy0[:, 0], np.arange(99) % 2])
    found = morans_i(neighbour_graph(xy0, "here").weights, values)
    assert np.isnan(found[0])
    assert found[1] > 0.8
    assert found[2] < 0.1


@pytest.mark.parametrize("jitter", [0.0, 0.03])
def test_lattice_of_visium_equals_squidpys_grid(jitter):
    xy0 = hexagons(jitter=jitter)
    xy0 = np.delete(xy0, [17, 40, 41], axis=0)  # spots off the tissue
    graph = neighbour_graph(xy0, "here")
    assert graph.kind == "lattice"
    assert graph.pitch0 == pytest.approx(137, rel=0.05)
    adata = anndata.AnnData(np.zeros((len(xy0), 1)), obsm={"spatial": xy0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        squidpy.gr.spatial_neighbors(adata, n_rings=1, coord_type="grid", n_neighs=6)
    theirs = adata.obsp["spatial_connectivities"]
    theirs = theirs.maximum(theirs.T)
    assert (graph.weights != theirs).nnz == 0


def test_lattice_of_an_st_array_has_four_neighbours():
    graph = neighbour_graph(squares(), "here")
    assert graph.kind == "lattice"
    num_neighbours = np.asarray(graph.weights.sum(axis=1)).ravel()
    assert np.unique(num_neighbours, return_counts=True)[0].tolist() == [2, 3, 4]
    assert (num_neighbours == 2).sum() == 4


@pytest.mark.parametrize("section", ["C2", "C3", "C4"])
def test_real_st_arrays_are_lattices(section):
    path = HER2ST / f"{section}_selection.tsv"
    if not path.exists():
        pytest.skip("real ST arrays ../shared/data/st_her2st are absent")
    table = pd.read_csv(path, sep="\t").query("selected == 1")
    graph = neighbour_graph(table[["pixel_x", "pixel_y"]].to_numpy(), "here")
    assert graph.kind == "lattice"
    assert graph.pitch0 == pytest.approx(291, rel=0.02)  # 200 um at 0.687 um/px
    # Neighbours in pixels are neighbours in the array, but for a few diagonals and lost links.
    place = table[["x", "y"]].to_numpy()
    step = np.abs(place[:, None] - place[None]).sum(axis=-1) == 1
    assert (graph.weights.toarray() > step).sum() < 0.01 * step.sum()
    assert graph.weights.nnz > 0.95 * step.sum()


def test_scattered_spots_take_the_nearest_in_either_direction():
    xy0 = np.random.default_rng(5).uniform(0, 1000, (60, 2))
    graph = neighbour_graph(xy0, "here")
    assert graph.kind == "nearest"
    distance = np.linalg.norm(xy0[:, None] - xy0[None], axis=-1)
    nearest = np.argsort(distance, axis=1)[:, 1:7]
    slow = np.zeros((60, 60))
    for spot, others in enumerate(nearest):
        slow[spot, others] = slow[others, spot] = 1
    np.testing.assert_array_equal(graph.weights.toarray(), slow)


@pytest.mark.parametrize(
    ("xy0", "words"),
    [
        (hexagons(2, 3), "slide A: 6 spots are too few"),
        (np.zeros((9, 2)), "slide A: most spots lie on other spots"),
    ],
)
def test_spots_that_make_no_graph_are_refused(xy0, words):
    with pytest.raises(ValueError, match=words):
        neighbour_graph(xy0, "slide A")


def test_planted_spatial_genes_are_found_and_not_the_first_ones():
    """The published code lost the scores and took the first genes in genome order."""
    rng = np.random.default_rng(2)
    scores = []
    for seed in (0, 1, 2):
        xy0 = hexagons(12, 12, jitter=0.02, seed=seed)
        rate_SG = np.full((144, 40), 4.0)
        rate_SG[:, 25] *= np.exp(np.sin(xy0[:, 0] / 250))
        rate_SG[:, 28] *= np.exp(np.cos(xy0[:, 1] / 300))
        rate_SG[:, 33] *= np.exp(np.sin(xy0[:, 0] / 250)) if seed == 0 else 1  # on one slide only
        values = np.log1p(rng.poisson(rate_SG))
        scores.append(morans_i(neighbour_graph(xy0, "x").weights, values))
    columns, found = spatially_variable(np.stack(scores), 2)
    assert sorted(columns.tolist()) == [25, 28]
    assert found["geometric_mean"][25] > 0.2
    assert 33 not in spatially_variable(np.stack(scores), 4)[0][:2]


def test_geometric_mean_over_slides_and_what_negative_scores_do():
    score_BG = np.array([[0.4, 0.9, 0.3, -0.1, np.nan, 0.5], [0.1, 0.0, 0.3, 0.9, 0.2, -0.6]])
    columns, found = spatially_variable(score_BG, 6)
    expected = [0.2, 0, 0.3, 0, 0, 0]
    np.testing.assert_allclose(found["geometric_mean"], expected, atol=1e-12)
    # Behind those that are spatial everywhere, by arithmetic mean: 0.45, 0.4, 0.1, -0.05.
    assert columns.tolist() == [2, 0, 1, 3, 4, 5]
    assert spatially_variable(score_BG[::-1], 6)[0].tolist() == columns.tolist()
    assert spatially_variable(np.full((2, 3), 0.3), 2)[0].tolist() == [0, 1]
