"""Xenium cells on the H&E image: units, matrices, ids in any order."""

import gzip
import json

import fsspec
import h5py
import numpy as np
import polars as pl
import pytest
from scipy import sparse

from scellst_ray.spots.xenium import read_affine, read_xenium, select_genes, transform

CELLS = ["aaaa-1", "bbbb-1", "cccc-1"]
XY_UM = np.array([[100.0, 10.0], [250.5, 20.0], [400.0, 300.0]])
COUNTS = np.array([[1, 0, 2, 9], [0, 5, 0, 9], [7, 0, 0, 9]])
# H&E px to morphology px: turned by about 90 degrees, scaled by 1.29, shifted.
ALIGNMENT = np.array([[0.011, 1.2896, 808.0], [-1.2896, 0.011, 7309.0], [0, 0, 1.0]])


def write_outs(outs, *, cells="parquet", order=(2, 0, 1), ids=CELLS):
    outs.mkdir(parents=True, exist_ok=True)
    table = pl.DataFrame(
        {
            "cell_id": [ids[i] for i in order],
            "x_centroid": XY_UM[list(order), 0],
            "y_centroid": XY_UM[list(order), 1],
            "transcript_counts": [1, 2, 3],
        }
    )
    if cells == "parquet":
        table.write_parquet(outs / "cells.parquet")
    elif cells == "binary":
        table.with_columns(pl.col("cell_id").cast(pl.Binary)).write_parquet(outs / "cells.parquet")
    else:
        (outs / "cells.csv.gz").write_bytes(gzip.compress(table.write_csv().encode()))
    matrix = sparse.csc_matrix(COUNTS.T.astype(np.int32))
    with h5py.File(outs / "cell_feature_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = (
            matrix.data,
            matrix.indices.astype(np.int64),
            matrix.indptr.astype(np.int64),
        )
        group["shape"] = np.array(matrix.shape, np.int32)
        group["barcodes"] = np.array([str(name) for name in ids], "S")
        group["features/name"] = np.array(["EPCAM", "CD3E", "CD3E", "NegControlProbe_1"], "S")
        group["features/id"] = np.array(list("abcd"), "S")
        kinds = ["Gene Expression"] * 3 + ["Negative Control Probe"]
        group["features/feature_type"] = np.array(kinds, "S")
    return outs


@pytest.mark.parametrize("cells", ["parquet", "csv", "binary"])
def test_cells_counts_and_pixels(tmp_path, cells):
    found = read_xenium(str(write_outs(tmp_path / "outs", cells=cells)), mpp=0.5)
    assert found.cell_id.tolist() == CELLS
    np.testing.assert_allclose(found.xy0, XY_UM / 0.5)
    np.testing.assert_array_equal(found.counts.toarray(), COUNTS[:, :3])
    assert found.genes == ["EPCAM", "CD3E", "CD3E-1"]
    assert len(found) == 3


def test_ids_of_older_runs_are_numbers(tmp_path):
    found = read_xenium(str(write_outs(tmp_path, ids=[1, 2, 3])), mpp=1.0)
    assert found.cell_id.tolist() == ["1", "2", "3"]
    np.testing.assert_array_equal(found.xy0, XY_UM)


@pytest.mark.parametrize("morphology_mpp", [None, 0.425])
def test_alignment_matrix_of_xenium_explorer(tmp_path, morphology_mpp):
    outs = write_outs(tmp_path / "outs")
    if morphology_mpp:
        (outs / "experiment.xenium").write_text(json.dumps({"pixel_size": morphology_mpp}))
    np.savetxt(tmp_path / "a.csv", ALIGNMENT, delimiter=",")
    found = read_xenium(str(outs), alignment_uri=str(tmp_path / "a.csv"))
    # Back from H&E px to um, by the way 10x describes.
    x, y = found.xy0.T
    back = np.column_stack([0.011 * x + 1.2896 * y + 808, -1.2896 * x + 0.011 * y + 7309])
    np.testing.assert_allclose(back * (morphology_mpp or 0.2125), XY_UM, rtol=1e-9)


def test_any_fsspec_address(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(write_outs(tmp_path)), "/xenium/outs", recursive=True)
    try:
        assert len(read_xenium("memory://xenium/outs", mpp=0.5)) == 3
    finally:
        memory.rm("/xenium", recursive=True)


def test_select_genes(tmp_path):
    cells = read_xenium(str(write_outs(tmp_path)), mpp=0.5)
    chosen, shared = select_genes(cells, ["CD3E", "NONE", "EPCAM"])
    assert shared == chosen.genes == ["CD3E", "EPCAM"]
    np.testing.assert_array_equal(chosen.counts.toarray(), COUNTS[:, [1, 0]])
    with pytest.raises(ValueError, match=r"none of 1 genes, such as .*is among the 3"):
        select_genes(cells, ["epcam"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,0,0\n0,1,0\n", "not an invertible affine map"),
        ("1,0,0\n0,1,0\n0,1,1\n", "last row is 0, 0, 1"),
        ("1,0,0\n2,0,0\n0,0,1\n", "not an invertible affine map"),
        ("1,0,nan\n0,1,0\n0,0,1\n", "not an invertible affine map"),
        ("a,b,c\n", "not a matrix"),
    ],
)
def test_matrices_that_are_none(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_affine(str(tmp_path / "a.csv"))


def test_transform():
    matrix = np.array([[2.0, 0, 5], [0, 3, -1], [0, 0, 1]])
    np.testing.assert_array_equal(transform(matrix, np.array([[1.0, 2.0]])), [[7.0, 5.0]])


def test_what_does_not_fit_is_refused(tmp_path):
    outs = write_outs(tmp_path / "outs")
    with pytest.raises(ValueError, match=r"give exactly one"):
        read_xenium(str(outs))
    with pytest.raises(ValueError, match=r"give exactly one"):
        read_xenium(str(outs), 0.5, "a.csv")
    (outs / "experiment.xenium").write_text("{}")
    np.savetxt(tmp_path / "a.csv", ALIGNMENT, delimiter=",")
    expected = r"experiment\.xenium: not JSON with a number `pixel_size`"
    with pytest.raises(ValueError, match=expected):
        read_xenium(str(outs), alignment_uri=str(tmp_path / "a.csv"))
    table = pl.read_parquet(outs / "cells.parquet")
    table[:2].write_parquet(outs / "cells.parquet")
    with pytest.raises(ValueError, match=r"1 of 3 cells of the matrix, such as \['bbbb-1'\]"):
        read_xenium(str(outs), 0.5)
    table.drop("x_centroid").write_parquet(outs / "cells.parquet")
    with pytest.raises(ValueError, match=r"\['x_centroid'\] are missing"):
        read_xenium(str(outs), 0.5)
    (outs / "cells.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not a table of cells"):
        read_xenium(str(outs), 0.5)
    (outs / "cells.parquet").unlink()
    with pytest.raises(ValueError, match=r"expected one of \['cells\.parquet'"):
        read_xenium(str(outs), 0.5)
