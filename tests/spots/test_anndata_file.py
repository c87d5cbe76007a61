"""Elements of AnnData files, as anndata writes them and damaged."""

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scellst_ray.spots.anndata_file import (
    read_column,
    read_index,
    read_matrix_part,
    read_pairs,
    read_text_column,
)

COUNTS = np.array([[1, 0, 2], [0, 5, 0]], np.float32)


@pytest.fixture
def file(tmp_path):
    adata = anndata.AnnData(sparse.csr_matrix(COUNTS))
    adata.obs_names, adata.var_names = ["s1", "s2"], ["A", "B", "C"]
    adata.layers["csc"] = sparse.csc_matrix(COUNTS)
    adata.layers["dense"] = COUNTS.astype(np.int64)
    adata.layers["half"] = COUNTS.astype(np.float16)
    adata.obs["kind"] = pd.Categorical(["x", None])
    adata.obs["number"] = pd.array([1, None], dtype="Int64")
    adata.obs["flag"] = pd.array([True, None], dtype="boolean")
    adata.obs["text"] = ["a", "b"]
    adata.obsm["spatial"] = np.array([[1.0, 2.0], [3.0, 4.0]])
    adata.obsm["frame"] = pd.DataFrame({"x": [1.0, 3.0], "y": [2.0, 4.0]}, index=["s1", "s2"])
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as opened:
        yield opened


def test_matrices_in_every_encoding(file):
    for key in ("X", "layers/csc", "layers/dense", "layers/half"):
        found = read_matrix_part(file[key], (2, 3), key)
        np.testing.assert_array_equal(found.toarray(), COUNTS)
    with pytest.raises(ValueError, match=r"X has shape \(2, 3\), but names for \(2, 4\)"):
        read_matrix_part(file["X"], (2, 4), "X")
    with pytest.raises(ValueError, match=r"d has shape \(2, 3\) of int64, expected numbers of sh"):
        read_matrix_part(file["layers/dense"], (3, 2), "d")


@pytest.mark.parametrize("key", ["X", "layers/csc"])
def test_every_matrix_is_checked_in_full(file, key):
    file[key]["indices"][0] = 7
    with pytest.raises(ValueError, match=r"not a sound sparse matrix: 1 indices lie outside, .* 7"):
        read_matrix_part(file[key], (2, 3), key)


@pytest.mark.parametrize("change", ["no data", "no shape", "odd shape", "odd encoding", "group"])
def test_matrices_that_lack_something_are_refused(file, change):
    part = file["X"]
    if change == "no data":
        del part["data"]
    elif change == "no shape":
        del part.attrs["shape"]
    elif change == "odd shape":
        part.attrs["shape"] = "many"
    elif change == "odd encoding":
        part.attrs["encoding-type"] = "awkward"
    else:
        del part["indptr"]
        part.create_group("indptr")
    with pytest.raises(ValueError, match=r"X.* (is absent|has shape|is stored as|is a group)"):
        read_matrix_part(part, (2, 3), "X")


def test_columns_of_every_kind(file):
    obs = file["obs"]
    assert read_index(obs, "obs") == ["s1", "s2"]
    assert read_column(obs["kind"], "k").tolist() == ["x", "nan"]
    assert str(read_column(obs["number"], "n").tolist()) == "[1.0, nan]"
    assert str(read_column(obs["flag"], "f").tolist()) == "[1.0, nan]"
    assert read_column(obs["text"], "t").tolist() == ["a", "b"]
    assert read_text_column(obs, "text", "obs") == ["a", "b"]
    assert read_text_column(obs, "kind", "obs") == ["x", "nan"]
    assert read_text_column(obs, "number", "obs") is None
    assert read_text_column(obs, "none", "obs") is None


def test_categories_in_the_place_of_anndata_0_7(file):
    file["obs/__categories/old"] = ["x", "y"]
    file["obs/old"] = np.array([1, 0], np.int8)
    file["obs/old"].attrs["categories"] = file["obs/__categories/old"].ref
    assert read_column(file["obs/old"], "old").tolist() == ["y", "x"]


def test_damaged_columns_are_refused(file):
    file["obs/kind/codes"][0] = 5
    with pytest.raises(ValueError, match=r"k: codes of int8 .* do not fit"):
        read_column(file["obs/kind"], "k")
    del file["obs/number/mask"]
    with pytest.raises(ValueError, match=r"n is a group of \['values'\], expected a column"):
        read_column(file["obs/number"], "n")
    with pytest.raises(ValueError, match="expected a list"):
        read_column(file["layers/dense"], "d")
    file["obs"].attrs["_index"] = "none"
    with pytest.raises(ValueError, match="obs has no index"):
        read_index(file["obs"], "obs")
    with pytest.raises(ValueError, match="obs has no index"):
        read_index(None, "obs")


def test_positions_as_array_or_frame(file):
    expected = [[1.0, 2.0], [3.0, 4.0]]
    assert read_pairs(file["obsm/spatial"], "p").tolist() == expected
    assert read_pairs(file["obsm/frame"], "p").tolist() == expected
    with pytest.raises(ValueError, match="expected two columns"):
        read_pairs(file["X"], "p")
    file["words"] = ["a", "b"]
    with pytest.raises(ValueError, match="expected numbers: positions"):
        read_pairs(file["words"], "p")
