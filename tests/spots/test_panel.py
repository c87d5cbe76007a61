import anndata
import numpy as np
import pytest
import scanpy
from scipy import sparse
from sklearn.preprocessing import RobustScaler

from scellst_ray.spots.panel import (
    CountFilter,
    filter_counts,
    gene_columns,
    log_normalise,
    make_targets,
    read_panel,
    robust_scale,
    size_factors,
)
from scellst_ray.spots.selection import Section, choose_genes
from scellst_ray.spots.table import Spots


def random_spots(num_spots=57, num_genes=40, seed=0) -> Spots:
    rng = np.random.default_rng(seed)
    gene_rates = np.random.default_rng(99).gamma(0.5, 8.0, num_genes)  # the same on every slide
    rates = gene_rates * rng.gamma(2.0, 0.5, (num_spots, 1))
    counts = rng.poisson(rates)
    counts[3] = 0
    counts[4] = 0
    counts[4, 5] = 19
    genes = [f"G{i:02d}" for i in range(num_genes)]
    genes[int(counts.sum(axis=0).argmax())] = "MT-CO1"
    return Spots(
        np.array([f"s{i}" for i in range(num_spots)]),
        rng.uniform(0, 1000, (num_spots, 2)),
        30.0,
        sparse.csr_matrix(counts.astype(np.float32)),
        genes,
    )


def scanpy_filtered(spots: Spots) -> anndata.AnnData:
    """Return the counts that scanpy's filters leave in the published order."""
    adata = anndata.AnnData(spots.counts.copy())
    adata.obs_names, adata.var_names = spots.spot_id, spots.genes
    num_spots = adata.n_obs
    scanpy.pp.filter_genes(adata, min_counts=200)
    scanpy.pp.filter_genes(adata, min_cells=num_spots // 10)
    scanpy.pp.filter_cells(adata, min_counts=20)
    return adata[:, ~adata.var_names.str.startswith("MT-")].copy()


def test_filters_equal_scanpy_in_the_published_order():
    spots = random_spots()
    expected, found = scanpy_filtered(spots), filter_counts(spots, "here")
    assert found.genes == expected.var_names.tolist()
    assert found.spot_id.tolist() == expected.obs_names.tolist()
    assert 0 < len(found.genes) < len(spots.genes)
    assert 0 < len(found) < len(spots)
    assert "MT-CO1" not in found.genes
    np.testing.assert_array_equal(found.counts.toarray(), expected.X.toarray())


def test_filter_that_leaves_nothing_names_the_slide():
    with pytest.raises(ValueError, match=r"slide A: 0 of 40 genes.*min_gene_counts=100000"):
        filter_counts(random_spots(), "slide A", CountFilter(min_gene_counts=100_000))


def test_mouse_mitochondrial_genes_go_too():
    spots = random_spots()
    spots.genes[spots.genes.index("MT-CO1")] = "mt-Co1"
    assert "mt-Co1" not in filter_counts(spots, "here").genes


@pytest.mark.parametrize("is_sparse", [True, False])
@pytest.mark.filterwarnings("ignore:Some cells have zero counts")
def test_log_normalise_equals_scanpy(is_sparse):
    counts = random_spots().counts
    adata = anndata.AnnData(counts.copy())
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    found = log_normalise(counts if is_sparse else counts.toarray())
    assert found.dtype == np.float32
    assert not found[3].any()  # a spot without counts stays zero
    np.testing.assert_allclose(found, adata.X.toarray(), rtol=2e-6, atol=1e-7)


def test_panel_from_a_list_or_a_file(tmp_path):
    path = tmp_path / "panel.txt"
    path.write_text("# markers\nEPCAM\n\n  CD3E \n")
    assert read_panel(str(path)) == read_panel(["EPCAM", "CD3E"]) == ["EPCAM", "CD3E"]
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"panel\.txt: the panel names no gene"):
        read_panel(str(path))
    with pytest.raises(ValueError, match=r"\['A'\] occur more than once"):
        read_panel(["A", "B", "A"])
    with pytest.raises(ValueError, match="no such file"):
        read_panel(str(tmp_path / "none.txt"))


def test_absent_panel_genes_are_named_with_close_matches():
    genes = ["EPCAM", "KRT18", "CD3E", "ERBB2"]
    assert gene_columns(genes, ["ERBB2", "EPCAM"], "x").tolist() == [3, 0]
    panel = ["ERBB2", "Epcam", "KRT8", "X1", "X2", "X3", "X4"]
    with pytest.raises(ValueError, match="slide A: 6 of 7 panel genes") as caught:
        gene_columns(genes, panel, "slide A")
    text = str(caught.value)
    assert "Epcam (close: EPCAM)" in text
    assert "KRT8 (close: KRT18)" in text
    assert "X1 (close: none)" in text
    assert "X4" not in text  # five are named


def test_panel_targets_use_the_library_of_surviving_genes():
    spots = random_spots()
    adata = scanpy_filtered(spots)
    panel = [adata.var_names[4], adata.var_names[1]]
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    targets = make_targets(spots, panel, "here")
    kept, values = targets.kept, targets.values_KP
    assert spots.spot_id[kept].tolist() == adata.obs_names.tolist()
    np.testing.assert_allclose(values, adata[:, panel].X.toarray(), rtol=2e-6)
    # A gene too rare to pass is still read, and does not change the values of further genes.
    rare = next(gene for gene in spots.genes if gene not in adata.var_names)
    with_rare = make_targets(spots, [*panel, rare], "here")
    assert with_rare.kept.tolist() == kept.tolist()
    np.testing.assert_array_equal(with_rare.values_KP[:, :2], values)


def test_targets_hold_raw_counts_and_libraries_too():
    spots = random_spots()
    adata = scanpy_filtered(spots)
    panel = [adata.var_names[4], adata.var_names[1]]
    targets = make_targets(spots, panel, "here")
    np.testing.assert_array_equal(targets.counts_KP, adata[:, panel].X.toarray())
    np.testing.assert_array_equal(targets.library_K, np.asarray(adata.X.sum(axis=1)).ravel())
    assert targets.num_genes == adata.n_vars


def test_size_factors():
    np.testing.assert_allclose(size_factors(np.array([2.0, 8, 4]), "x"), [0.5, 2, 1])
    with pytest.raises(ValueError, match=r"slide A: 1 of 2 spots have no counts.*min_spot_counts"):
        size_factors(np.array([0.0, 3]), "slide A")


@pytest.mark.parametrize(
    "wrong", [{"min_gene_counts": -1}, {"min_spot_share": 1.01}, {"min_spot_counts": -2}]
)
def test_thresholds_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*, expected 0"):
        CountFilter(**wrong)


def test_robust_scale_equals_scikit_learn():
    rng = np.random.default_rng(0)
    values = rng.gamma(2.0, 1.0, (61, 6)).astype(np.float32)
    values[:, 2] = 3.0  # no range
    values[:, 3] = 0.0
    values[:2, 3] = 5.0  # range only above the 95 % quantile
    scaled, scale = robust_scale(values)
    scaler = RobustScaler(with_centering=False, quantile_range=(0, 95))
    np.testing.assert_allclose(scaled, scaler.fit_transform(values), rtol=1e-6)
    np.testing.assert_allclose(scale, scaler.scale_, rtol=1e-6)
    assert scale[2] == scale[3] == 1.0
    np.testing.assert_allclose(scaled * scale, values, rtol=1e-6)


def test_her2st_panel_and_targets(her2st):
    slides = [her2st("C2"), her2st("C3")]
    kept = [filter_counts(spots, "x") for spots in slides]
    expected = scanpy_filtered(slides[0])
    assert kept[0].genes == expected.var_names.tolist()
    assert kept[0].spot_id.tolist() == expected.obs_names.tolist()
    sections = [Section("slide", k.genes, k) for k in kept]
    panel = choose_genes("variable:250", sections).genes
    assert len(set(panel)) == 250
    targets = make_targets(slides[0], panel, "C2")
    rows, values = targets.kept, targets.values_KP
    assert values.shape == (len(rows), 250) == (186, 250)  # one spot of C2 has a single count
    scanpy.pp.normalize_total(expected, target_sum=1e4)
    scanpy.pp.log1p(expected)
    np.testing.assert_allclose(values, expected[:, panel].X.toarray(), rtol=2e-5, atol=1e-6)


def constant_spots(genes):
    """Return 30 spots with 90 counts of every gene."""
    counts = sparse.csr_matrix(np.full((30, len(genes)), 90, np.float32))
    return Spots(np.arange(30).astype(str), np.zeros((30, 2)), 30.0, counts, genes)


@pytest.mark.parametrize("prefix", ["", "GRCh38_", "mm10___", "hg38-2024-A_", "GRCh38-"])
def test_mitochondrial_genes_are_dropped_behind_a_genome(prefix):
    genes = [prefix + name for name in ("MT-CO1", "ERBB2", "mt-Nd1", "MTOR")]
    spots = constant_spots(genes)
    assert filter_counts(spots, "s").genes == [genes[1], genes[3]]


def test_mitochondrial_genes_are_dropped_by_ensembl_id():
    genes = ["ENSG00000198804.2", "ENSG00000141736", "ENSMUSG00000064341", "ENSG00000198793"]
    spots = constant_spots(genes)
    assert filter_counts(spots, "s").genes == [genes[1], genes[3]]


def test_names_that_may_hide_mitochondrial_genes_are_told(caplog):
    spots = constant_spots(["ENSDARG00000063905", "ENSDARG00000063908"])
    assert len(filter_counts(spots, "s").genes) == 2
    assert "s: no gene begins with 'MT-', and 2 of 2 names are no symbols" in caplog.text


def test_a_gene_behind_a_genome_is_named_as_close():
    with pytest.raises(ValueError, match=r"ERBB2 \(close: GRCh38_ERBB2"):
        gene_columns(["GRCh38_ERBB2", "mm10_Krt8"], ["ERBB2"], "s")
