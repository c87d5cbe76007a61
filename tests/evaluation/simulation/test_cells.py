"""The data of the simulation study: clusters, scenarios, spots."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from scellst_ray.evaluation.simulation.cells import (
    CellCounts,
    assign_expression,
    bootstrap_mean,
    choose_image_cells,
    draw_spots,
    expressed_counts,
    split_cells,
    synthetic_embeddings,
)


def test_synthetic_embeddings_are_clusters_that_kmeans_finds_again():
    # With this small spread, a cluster is the cells near its first cell.
    embeddings_ND = synthetic_embeddings(600, 40, 4, 0.01, seed=1)
    gaps = np.linalg.norm(embeddings_ND[:, None] - embeddings_ND[None], axis=2)
    planted_N = (gaps < 2.5).argmax(axis=1)
    assert np.unique(planted_N, return_counts=True)[1].tolist() == [150] * 4
    rows, cluster_N = choose_image_cells(embeddings_ND, 4, 100, seed=0)
    assert embeddings_ND.dtype == np.float32
    assert len(set(rows.tolist())) == 400
    assert np.bincount(cluster_N).tolist() == [100] * 4
    assert adjusted_rand_score(planted_N[rows], cluster_N) == 1.0
    again_ND = synthetic_embeddings(600, 40, 4, 0.01, seed=1)
    np.testing.assert_array_equal(embeddings_ND, again_ND)


def test_spread_is_relative_to_that_of_the_centres():
    near, far = (synthetic_embeddings(3000, 200, 6, spread, seed=0) for spread in (0.1, 1.0))
    # 30 latent dimensions: variance per feature 1 (5/6 for 6 centres) + spread^2 + 0.1^2.
    assert near.var(axis=0).mean() == pytest.approx(1.0 * 5 / 6 + 0.01 + 0.01, abs=0.15)
    assert far.var(axis=0).mean() - near.var(axis=0).mean() == pytest.approx(0.99, abs=0.1)


def test_the_cells_nearest_to_each_centroid_are_kept():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])
    points = np.repeat(centres, 60, axis=0) + rng.normal(0, 1, (180, 2))
    rows, cluster_N = choose_image_cells(points, 3, 30, seed=0)
    for group in range(3):
        members = np.arange(60) + 60 * group
        distance = np.linalg.norm(points[members] - points[members].mean(axis=0), axis=1)
        nearest = set(members[np.argsort(distance)[:30]].tolist())
        label = cluster_N[np.isin(rows, members)]
        assert len(set(label.tolist())) == 1
        # k-means's centroid differs from the mean by rounding at most.
        assert set(rows[np.isin(rows, members)].tolist()) == nearest


def test_clusters_keep_as_many_as_the_smallest_has():
    points = np.concatenate([np.zeros((30, 3)), np.full((90, 3), 9.0)])
    points += np.random.default_rng(0).normal(0, 0.1, points.shape)
    _, cluster_N = choose_image_cells(points, 2, 50, seed=0)
    assert np.bincount(cluster_N).tolist() == [30, 30]


@pytest.mark.parametrize(
    ("embeddings", "words"),
    [
        (np.full((100, 4), np.nan), "100 of 100 embeddings hold NaN"),
        (np.zeros((30, 4)), "at least 40 cells for 2 clusters"),
        (np.repeat([[0.0, 0.0], [9.0, 9.0]], [95, 5], axis=0), "has 5 cells"),
    ],
)
def test_unfit_embeddings_are_refused(embeddings, words):
    with pytest.raises(ValueError, match=words):
        choose_image_cells(embeddings, 2, 50, seed=0)


@given(st.lists(st.integers(10, 60), min_size=1, max_size=5), st.integers(0, 9))
def test_parts_are_apart_and_hold_half_of_every_group(sizes, seed):
    groups_N = np.repeat(np.arange(len(sizes)), sizes)
    parts = split_cells(groups_N, 0.2, seed)
    together = np.concatenate([parts.fit, parts.val, parts.test])
    assert sorted(together.tolist()) == list(range(len(groups_N)))
    assert sorted(parts.train.tolist()) == sorted([*parts.fit, *parts.val])
    for group, size in enumerate(sizes):
        assert (groups_N[parts.test] == group).sum() == size // 2
        assert (groups_N[parts.val] == group).sum() == round(0.2 * (size - size // 2))


def test_spots_add_counts_up_before_they_normalise():
    rng = np.random.default_rng(2)
    counts_NP = rng.poisson(3, (50, 4)).astype(np.float32)
    library_N = counts_NP.sum(axis=1) + rng.integers(5, 50, 50)
    cells = CellCounts(counts_NP, library_N.astype(np.float64))
    cells_SK = draw_spots(np.arange(10, 50), 30, 7, seed=0)
    expected = np.empty((30, 4))
    for spot, members in enumerate(cells_SK):
        total = sum(counts_NP[cell] for cell in members)
        expected[spot] = np.log1p(total * 1e4 / sum(library_N[cell] for cell in members))
    np.testing.assert_allclose(cells.normalise_spots(cells_SK), expected, rtol=1e-5)
    # A spot of one cell equals the cell.
    rows = np.arange(5)
    np.testing.assert_allclose(
        cells.normalise_spots(rows[:, None]), cells.normalise_cells(rows), rtol=1e-6
    )


def test_spots_are_drawn_with_replacement_from_the_given_cells():
    cells = np.array([3, 5, 8])
    drawn = draw_spots(cells, 400, 20, seed=1)
    assert drawn.shape == (400, 20)
    assert set(drawn.ravel().tolist()) == {3, 5, 8}
    np.testing.assert_array_equal(drawn, draw_spots(cells, 400, 20, seed=1))


def planted():
    """Return counts that identify their reference cell, with types and parts."""
    type_C = np.repeat(np.arange(3), 40)
    counts = CellCounts(np.arange(120.0, dtype=np.float32)[:, None] + 1, np.full(120, 1000.0))
    cluster_N = np.repeat(np.arange(3), 200)
    parts = split_cells(cluster_N, 0.2, 0), split_cells(type_C, 0.2, 1)
    return counts, type_C, cluster_N, parts


@pytest.mark.parametrize("scenario", ["random", "cell"])
def test_training_and_test_cells_express_different_reference_cells(scenario):
    counts, type_C, cluster_N, parts = planted()
    cells = expressed_counts(scenario, counts, type_C, cluster_N, parts, seed=0)
    drawn_N = cells.counts_NP[:, 0].astype(int) - 1
    assert set(drawn_N[parts[0].train]) <= set(parts[1].train.tolist())
    assert set(drawn_N[parts[0].test]) <= set(parts[1].test.tolist())
    agreement = (type_C[drawn_N] == cluster_N).mean()
    assert agreement == (1.0 if scenario == "cell" else pytest.approx(1 / 3, abs=0.08))


def test_a_centroid_is_the_mean_of_its_types_training_cells():
    counts, type_C, cluster_N, parts = planted()
    cells = expressed_counts("centroid", counts, type_C, cluster_N, parts, seed=0)
    for index in range(3):
        members = [c for c in parts[1].train if type_C[c] == index]
        mean = np.mean([counts.counts_NP[c, 0] for c in members])
        np.testing.assert_allclose(cells.counts_NP[cluster_N == index, 0], mean, rtol=1e-6)
    np.testing.assert_allclose(cells.library_N, 1000.0)


def test_what_cannot_be_assigned_is_refused():
    with pytest.raises(ValueError, match="'centroid', expected 'random' or 'cell'"):
        assign_expression("centroid", np.zeros(2, int), np.zeros(2, int), 0)
    with pytest.raises(ValueError, match="cluster 1 is matched with a type without"):
        assign_expression("cell", np.array([0, 1]), np.array([0, 0]), 0)


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    mean, low, high = bootstrap_mean(np.append(values, np.nan), seed=0)
    error = values.std(ddof=1) / 20
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.3 * error)
    assert np.isnan(bootstrap_mean(np.array([np.nan]), seed=0)).all()
