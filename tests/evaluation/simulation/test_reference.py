"""References of the simulation study: counts, types, panels."""

import warnings
from itertools import combinations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from scellst_ray.evaluation.simulation.reference import (
    Reference,
    marker_panel,
    medoids,
    pbmc_reference,
    read_reference,
    synthetic_reference,
    variable_panel,
    welch_t,
)


@pytest.fixture(scope="module")
def reference():
    return synthetic_reference(4, seed=3, num_genes=400, cells_per_type=80)


def write_h5ad(path, counts, types, **parts):
    genes = [f"g{i}" for i in range(counts.shape[1])]
    cells = names_of(counts.shape[0])
    obs = pd.DataFrame({"kind": types}, index=cells)
    ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes), **parts).write_h5ad(path)
    return str(path)


def typed_counts(sizes, num_genes=250, seed=0):
    """Return counts of at least one for every gene, with a block of raised genes per type."""
    rng = np.random.default_rng(seed)
    types = np.repeat(np.arange(len(sizes)), sizes)
    rate = np.full((len(sizes), num_genes), 4.0)
    for index in range(len(sizes)):
        rate[index, 10 * index : 10 * index + 10] = 30.0
    return rng.poisson(rate[types]).astype(np.float32) + 1, types


def test_a_synthetic_reference_is_fixed_by_its_seed_and_has_markers(reference):
    again = synthetic_reference(4, seed=3, num_genes=400, cells_per_type=80)
    assert (reference.counts != again.counts).nnz == 0
    assert (synthetic_reference(4, 4, 400, 80).counts != again.counts).nnz > 0
    assert (reference.counts.data % 1 == 0).all()
    assert np.median(reference.library_C) == pytest.approx(3000, rel=0.1)
    assert np.bincount(reference.type_C).tolist() == [80] * 4
    assert reference.info()["types"] == {f"type {i}": 80 for i in (1, 2, 3, 4)}


def test_the_blood_cells_of_scanpy_are_counts_again():
    found = pbmc_reference()
    scanpy = pytest.importorskip("scanpy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old file
        cells = scanpy.datasets.pbmc68k_reduced()
    assert found.counts.shape == (700, 765)
    assert found.genes == cells.raw.var_names.tolist()
    # Scaled and logged as by scanpy, they equal the file up to its rounding.
    totals = cells.obs["n_counts"].to_numpy()[:, None]
    logged = np.log1p(found.counts.toarray() * 1e4 / totals)
    np.testing.assert_allclose(logged, cells.raw.X.toarray(), atol=1.1e-3)
    assert [found.types[t] for t in found.type_C[:20]] == cells.obs["bulk_labels"][:20].tolist()


def test_six_types_of_blood_cells_are_kept():
    found = read_reference("pbmc", "", 6)
    assert len(found.types) == 6
    assert min(found.info()["types"].values()) >= 20
    assert set(found.type_C.tolist()) == set(range(6))


def test_a_missing_scanpy_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="needs scanpy: pip install scanpy"):
        pbmc_reference()


@pytest.mark.parametrize("seed", range(6))
def test_medoids_are_near_the_best_there_are(seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(0, 1, (9, 3))

    def cost(rows):
        gaps = points[:, None] - points[list(rows)][None]
        return np.sqrt((gaps**2).sum(axis=2)).min(axis=1).sum()

    found = medoids(points, 4)
    best = min(cost(rows) for rows in combinations(range(9), 4))
    assert len(set(found.tolist())) == 4
    assert cost(found) <= 1.05 * best
    # No single exchange lowers the sum.
    for i in range(4):
        for row in set(range(9)) - set(found.tolist()):
            assert cost([*np.delete(found, i), row]) >= cost(found) - 1e-9
    assert medoids(points, 9).tolist() == list(range(9))


def test_medoids_take_one_of_each_planted_group():
    points = np.repeat(np.eye(3) * 10, 4, axis=0)
    points += np.random.default_rng(0).normal(0, 0.1, points.shape)
    assert sorted(row // 4 for row in medoids(points, 3)) == [0, 1, 2]


def test_an_h5ad_is_filtered_and_its_types_are_chosen(tmp_path):
    counts, types = typed_counts([40, 40, 40, 5])
    counts[0, 100:] = 0  # a cell with 100 genes
    counts[:, 249] = 0
    counts[1:10, 249] = 1  # a gene with 9 counts
    labels = np.array(["b", "a", "c", "rare"])[types]
    labels = labels.astype(object)
    labels[1] = None
    path = write_h5ad(tmp_path / "r.h5ad", counts, labels)
    found = read_reference(path, "kind", 3)
    assert found.types == ["a", "b", "c"]
    assert found.info()["types"] == {"a": 40, "b": 38, "c": 40}
    assert found.genes == [f"g{i}" for i in range(249)]
    rows = list(range(2, 120))
    np.testing.assert_array_equal(found.counts.toarray(), counts[rows, :249])


@pytest.mark.parametrize("place", ["layer", "x", "raw"])
def test_counts_are_found_where_they_are(tmp_path, place):
    counts, types = typed_counts([30, 30])
    logged = np.log1p(counts)
    names = types.astype(str)
    if place == "layer":
        path = write_h5ad(tmp_path / "r.h5ad", logged, names, layers={"counts": counts})
    elif place == "x":
        path = write_h5ad(tmp_path / "r.h5ad", sparse.csr_matrix(counts), names)
    else:
        cells = ad.AnnData(counts, obs=pd.DataFrame({"kind": names}, index=names_of(60)))
        cells.var_names = [f"raw{i}" for i in range(250)]
        cells.raw = cells.copy()
        cells = cells[:, :100].copy()
        cells.X = np.log1p(cells.X)
        path = str(tmp_path / "r.h5ad")
        cells.write_h5ad(path)
    found = read_reference(path, "kind", 2)
    np.testing.assert_array_equal(found.counts.toarray(), counts)
    assert found.genes[0] == ("raw0" if place == "raw" else "g0")


def names_of(num):
    return [f"c{i}" for i in range(num)]


def test_unfit_files_are_refused(tmp_path):
    counts, types = typed_counts([30, 30])
    path = write_h5ad(tmp_path / "r.h5ad", counts, types.astype(str))
    logged = write_h5ad(tmp_path / "l.h5ad", np.log1p(counts), types.astype(str))
    shallow = write_h5ad(tmp_path / "s.h5ad", counts[:, :150], types.astype(str))
    with pytest.raises(ValueError, match="no column 'cell_type'; it has kind"):
        read_reference(path, "cell_type", 2)
    with pytest.raises(ValueError, match=r"neither layers.* holds counts"):
        read_reference(logged, "kind", 2)
    with pytest.raises(ValueError, match="no cell has a type and 200 genes"):
        read_reference(shallow, "kind", 2)
    with pytest.raises(ValueError, match="2 types have 20 cells or more, expected at least 3"):
        read_reference(path, "kind", 3)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_reference(str(tmp_path / "none.h5ad"), "kind", 2)


def test_welch_equals_scipy(reference):
    values_CG = np.log1p(reference.counts.toarray().astype(np.float64))
    values_CG[:, 7] = 1.0
    inside = reference.type_C == 2
    expected = stats.ttest_ind(
        values_CG[inside][:, :7], values_CG[~inside][:, :7], equal_var=False
    ).statistic
    found = welch_t(values_CG, inside)
    np.testing.assert_allclose(found[:7], expected, rtol=1e-10)
    assert found[7] == 0.0


def test_markers_equal_those_of_scanpy(reference):
    scanpy = pytest.importorskip("scanpy")
    names = np.array(reference.types)[reference.type_C]
    obs = pd.DataFrame({"kind": pd.Categorical(names)}, index=names_of(len(names)))
    cells = ad.AnnData(reference.counts.toarray(), obs=obs)
    cells.var_names = reference.genes
    scanpy.pp.normalize_total(cells, target_sum=1e4)
    scanpy.pp.log1p(cells)
    scanpy.tl.rank_genes_groups(cells, "kind", method="t-test")
    expected = {}
    for name in reference.types:
        top = scanpy.get.rank_genes_groups_df(cells, name)["names"][:15]
        expected.update(dict.fromkeys(top))
    assert marker_panel(reference, np.arange(len(names)), 15) == list(expected)


def test_markers_are_the_planted_genes():
    counts, type_C = typed_counts([40, 40])
    genes = [f"g{i}" for i in range(250)]
    reference = Reference(sparse.csr_matrix(counts), genes, ["a", "b"], type_C, "planted")
    rows = np.arange(80)
    assert set(marker_panel(reference, rows, 10)) == {f"g{i}" for i in range(20)}


def test_variable_genes_equal_those_of_scanpy(reference):
    scanpy = pytest.importorskip("scanpy")
    rows = np.arange(0, 320, 2)
    cells = ad.AnnData(reference.counts[rows].toarray())
    cells.obs_names, cells.var_names = names_of(160), reference.genes
    scanpy.pp.highly_variable_genes(cells, flavor="seurat_v3", n_top_genes=60)
    chosen = cells.var.index[cells.var["highly_variable"]]
    assert set(variable_panel(reference, rows, 60)) == set(chosen)
    assert set(variable_panel(reference, rows, 9999)) == set(reference.genes)


def test_panels_see_no_other_cells(reference):
    rows = np.flatnonzero(np.arange(320) % 2)
    changed = reference.counts.toarray()
    changed[np.arange(320) % 2 == 0] = 7
    other = Reference(
        sparse.csr_matrix(changed), reference.genes, reference.types, reference.type_C, "other"
    )
    assert marker_panel(reference, rows, 12) == marker_panel(other, rows, 12)
    assert variable_panel(reference, rows, 50) == variable_panel(other, rows, 50)
