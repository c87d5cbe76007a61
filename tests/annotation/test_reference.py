import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

from scellst_ray.annotation import reference
from scellst_ray.annotation.reference import read_reference, top_markers

GENES = [f"G{n}" for n in range(80)]
TYPES = ["B", "NK", "T"]


def counts(num_cells=150, seed=0):
    """Return counts of cells of three types, each with genes of its own, as AnnData."""
    random = np.random.default_rng(seed)
    types = np.array(TYPES)[random.integers(0, 3, num_cells)]
    mean = random.gamma(1, 1, len(GENES)) * np.ones((num_cells, 1))
    for number, name in enumerate(TYPES):
        mean[types == name, 10 * number : 10 * number + 10] += 2
    x = random.poisson(mean).astype(np.float32)
    return ad.AnnData(x, obs={"cell_type": pd.Categorical(types)}, var=pd.DataFrame(index=GENES))


def logged(adata):
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


def scanpys(adata, number=20):
    sc.tl.rank_genes_groups(adata, "cell_type", method="t-test_overestim_var", use_raw=False)
    frames = [(name, sc.get.rank_genes_groups_df(adata, name)) for name in TYPES]
    return {name: frame["names"].head(number).tolist() for name, frame in frames}


def markers(path, number=20, among=None):
    return top_markers(read_reference(str(path), "cell_type", GENES), number, among)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("is_logged", [True, False])
def test_markers_are_those_of_scanpy(tmp_path, monkeypatch, form, is_logged):
    monkeypatch.setattr(reference, "BLOCK_VALUES", 1_000)  # several blocks
    adata = logged(counts()) if is_logged else counts()
    expected = scanpys(logged(counts()))
    adata.X = form(adata.X)
    adata.write_h5ad(tmp_path / "r.h5ad")
    assert markers(tmp_path / "r.h5ad") == expected


def test_cells_without_a_type_are_compared_with(tmp_path):
    adata = logged(counts())
    adata.obs["cell_type"] = adata.obs["cell_type"].where(np.arange(150) % 5 > 0)
    adata.write_h5ad(tmp_path / "r.h5ad")
    assert markers(tmp_path / "r.h5ad") == scanpys(adata)


def test_markers_among_the_panel(tmp_path):
    logged(counts()).write_h5ad(tmp_path / "r.h5ad")
    among = GENES[::2]
    expected = {n: [g for g in m if g in among] for n, m in scanpys(logged(counts()), 80).items()}
    assert markers(tmp_path / "r.h5ad", 7, among) == {n: m[:7] for n, m in expected.items()}


def test_scaled_values_leave_raw(tmp_path, caplog):
    adata = logged(counts())
    adata.raw = adata.copy()
    sc.pp.scale(adata)
    adata.write_h5ad(tmp_path / "r.h5ad")
    caplog.set_level(logging.INFO)
    assert markers(tmp_path / "r.h5ad") == scanpys(logged(counts()))
    assert "raw/X holds logarithms" in caplog.text


def test_genes_may_be_named_in_a_column(tmp_path):
    adata = logged(counts())
    adata.var["feature_name"] = GENES
    adata.var_names = [f"ENSG{n:011}" for n in range(80)]
    adata.write_h5ad(tmp_path / "r.h5ad")
    assert markers(tmp_path / "r.h5ad") == scanpys(logged(counts()))


def normalised(adata):
    adata.X = adata.X * 123.4
    return adata


def scaled(adata):
    adata.X = adata.X - 5
    return adata


def renamed(adata):
    adata.var_names = [name.lower() for name in adata.var_names]
    return adata


def typed(values):
    def change(adata):
        adata.obs["cell_type"] = values
        return adata

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (normalised, "neither counts nor their logarithm"),
        (scaled, "X holds negative values"),
        (renamed, "none of its 80 genes, such as g0, g1, g2"),
        (typed(["T"] * 150), r"names 1 type\(s\)"),
        (typed(["T"] + ["B"] * 149), "type 'T' .* has a single cell"),
        (typed(np.linspace(0, 1, 150)), "holds numbers, not types"),
        (lambda a: a[:, :0].copy(), "none of its 0 genes"),
    ],
)
def test_a_reference_that_cannot_be_used_is_refused_in_a_line(tmp_path, change, message):
    change(counts()).write_h5ad(tmp_path / "r.h5ad")
    with pytest.raises(ValueError, match=message) as caught:
        markers(tmp_path / "r.h5ad")
    assert str(caught.value).startswith(f"{tmp_path}/r.h5ad")
    assert "\n" not in str(caught.value)


def test_no_reference(tmp_path):
    counts().write_h5ad(tmp_path / "r.h5ad")
    with pytest.raises(ValueError, match="no column 'celltype': did you mean 'cell_type'"):
        read_reference(str(tmp_path / "r.h5ad"), "celltype", GENES)
    with pytest.raises(ValueError, match="no such reference"):
        markers(tmp_path / "absent.h5ad")
    (tmp_path / "text.h5ad").write_text("hello")
    with pytest.raises(ValueError, match="not a readable HDF5 file"):
        markers(tmp_path / "text.h5ad")
