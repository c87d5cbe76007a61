"""Counts and genes of AnnData files as portals and instruments write them."""

import logging

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scellst_ray.spots.h5ad_counts import raw_counts

COUNTS = np.array([[1, 0, 2], [0, 5, 0]], np.float32)
IDS = ["ENSG00000141736", "ENSG00000171345.14", "ENSG00000198804"]
SYMBOLS = ["ERBB2", "KRT19", "MT-CO1"]


def make(index=IDS, counts=COUNTS, **columns):
    adata = anndata.AnnData(sparse.csr_matrix(counts))
    adata.var = pd.DataFrame(columns, index=list(index))
    return adata


def read(tmp_path, adata):
    adata.write_h5ad(tmp_path / "s.h5ad")
    with h5py.File(tmp_path / "s.h5ad", "r") as file:
        return raw_counts(file, 2, "s")


@pytest.mark.parametrize(
    "column", ["feature_name", "gene_symbols", "gene_name", "SYMBOL", "hgnc_symbol"]
)
@pytest.mark.parametrize("kind", [list, pd.Categorical])
def test_symbols_of_a_column_replace_ensembl_ids(tmp_path, column, kind):
    counts, genes = read(tmp_path, make(**{column: kind(SYMBOLS)}))
    assert genes == SYMBOLS
    np.testing.assert_array_equal(counts.toarray(), COUNTS)


def test_raw_counts_of_cellxgene(tmp_path):
    adata = make(feature_name=SYMBOLS)
    adata.raw = adata.copy()
    adata = adata[:, IDS[1:]].copy()
    adata.X = adata.X.log1p()
    counts, genes = read(tmp_path, adata)
    assert genes == SYMBOLS
    np.testing.assert_array_equal(counts.toarray(), COUNTS)


def test_symbols_of_var_name_the_genes_of_raw(tmp_path):
    adata = make()
    adata.raw = adata.copy()
    adata.X = adata.X.log1p()
    adata.var["feature_name"] = SYMBOLS[::-1]
    assert read(tmp_path, adata)[1] == SYMBOLS[::-1]


def test_names_that_are_symbols_stay(tmp_path):
    assert read(tmp_path, make(SYMBOLS, feature_name=["x", "y", "z"]))[1] == SYMBOLS


def test_a_gene_without_symbol_keeps_its_id(tmp_path):
    assert read(tmp_path, make(gene_symbols=["ERBB2", None, ""]))[1] == ["ERBB2", *IDS[1:]]


@pytest.mark.parametrize("columns", [{}, {"feature_name": IDS}, {"gene_symbols": [1, 2, 3]}])
def test_ids_without_symbols_are_told(tmp_path, columns, caplog):
    caplog.set_level(logging.WARNING)
    assert read(tmp_path, make(**columns))[1] == IDS
    assert "no column of var names symbols" in caplog.text


@pytest.mark.parametrize(
    ("index", "columns"),
    [
        (["ERBB2", "CD3", "KRT19"], {"feature_types": ["Gene Expression", "Antibody Capture"]}),
        (["ERBB2", "NegControlProbe_00042", "KRT19"], {}),
        (["ERBB2", "BLANK_0006", "KRT19"], {"feature_type": ["gene", "blank"]}),
        ([IDS[0], "BLANK_0001", IDS[1]], {"gene_symbols": ["ERBB2", "odd"]}),
    ],
)
def test_features_that_are_no_genes_are_left_out(tmp_path, index, columns):
    last = {"gene_symbols": "KRT19"}
    whole = {name: [*values, last.get(name, values[0])] for name, values in columns.items()}
    counts, genes = read(tmp_path, make(index, **whole))
    assert genes == ["ERBB2", "KRT19"]
    np.testing.assert_array_equal(counts.toarray(), COUNTS[:, [0, 2]])


def test_the_layer_with_whole_numbers_is_named(tmp_path):
    adata = make(counts=np.log1p(COUNTS))
    adata.layers["umi"] = sparse.csr_matrix(COUNTS)
    adata.layers["scaled"] = COUNTS / 3
    with pytest.raises(ValueError, match=r"X holds 0\.69.*layers\['umi'\] hold whole numbers: sa"):
        read(tmp_path, adata)


def test_negative_values_are_no_counts(tmp_path):
    with pytest.raises(ValueError, match="s: no raw counts: X holds -1"):
        read(tmp_path, make(counts=-COUNTS))


@pytest.mark.parametrize("part", ["X", "layers/counts", "raw/X"])
def test_an_index_outside_is_refused_before_anything_is_computed(tmp_path, part):
    adata = make()
    adata.layers["counts"] = sparse.csr_matrix(COUNTS)
    adata.raw = adata.copy()
    adata.write_h5ad(tmp_path / "s.h5ad")
    with h5py.File(tmp_path / "s.h5ad", "r+") as file:
        file[part]["indices"][1] = 3
        if part != "layers/counts":
            del file["layers/counts"]
        if part == "raw/X":
            file["X/data"][0] = 0.5
        with pytest.raises(ValueError, match="not a sound sparse matrix: 1 indices lie outside"):
            raw_counts(file, 2, "s")
