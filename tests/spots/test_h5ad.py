"""Spots from AnnData files: places of counts, missing parts, contradictions."""

import logging
from pathlib import Path

import anndata
import fsspec
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scellst_ray.spots.h5ad import read_h5ad
from scellst_ray.spots.read import read_spots
from tests.support.paths import SHARED

REAL = SHARED / "data" / "visium_squidpy" / "test_data.h5ad"
COUNTS = np.array([[1, 0, 2], [0, 5, 0], [7, 0, 0], [3, 3, 3]])
XY0 = np.array([[100.0, 10.0], [500.0, 50.0], [900.0, 30.0], [901.5, 31.0]])


def make(counts=COUNTS, **changes):
    adata = anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)))
    adata.obs_names = ["AAAC-1", "AAAG-1", "AAAT-1", "AACC-1"]
    adata.var_names = ["EPCAM", "TBCE", "CD3E"]
    adata.obsm["spatial"] = XY0
    factors = {"spot_diameter_fullres": 120.0, "tissue_hires_scalef": 0.1}
    adata.uns["spatial"] = {"ST": {"scalefactors": factors, "images": {}}}
    for name, value in changes.items():
        setattr(adata, name, value)
    return adata


def written(tmp_path, adata, name="s.h5ad"):
    adata.write_h5ad(tmp_path / name)
    return str(tmp_path / name)


@pytest.mark.parametrize("place", ["X", "dense X", "csc X", "counts", "raw"])
def test_counts_are_found_wherever_they_are(tmp_path, place):
    adata = make()
    if place == "dense X":
        adata.X = COUNTS.astype(np.int64)
    elif place == "csc X":
        adata.X = sparse.csc_matrix(adata.X)
    elif place == "counts":
        adata.layers["counts"] = adata.X.copy()
        adata.X = sparse.csr_matrix(np.log1p(COUNTS))
    elif place == "raw":
        adata.raw = adata.copy()
        adata = adata[:, ["EPCAM", "CD3E"]].copy()
        adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray()))
    spots = read_h5ad(written(tmp_path, adata), 0.5)
    assert spots.genes == ["EPCAM", "TBCE", "CD3E"]
    np.testing.assert_array_equal(spots.counts.toarray(), COUNTS)
    assert spots.counts.dtype == np.float32
    assert spots.spot_id.tolist() == ["AAAC-1", "AAAG-1", "AAAT-1", "AACC-1"]
    np.testing.assert_array_equal(spots.xy0, XY0)
    assert spots.radius0 == 60.0  # spot_diameter_fullres is in level-0 px


def test_layer_of_counts_comes_before_whole_numbers_in_x(tmp_path):
    adata = make()
    adata.layers["counts"] = sparse.csr_matrix(COUNTS * 2)
    np.testing.assert_array_equal(
        read_h5ad(written(tmp_path, adata), 0.5).counts.toarray(), COUNTS * 2
    )


def test_no_raw_counts_names_every_place_and_what_it_holds(tmp_path):
    adata = make(COUNTS / 4)
    adata.layers["counts"] = sparse.csr_matrix(-COUNTS)
    path = written(tmp_path, adata)
    with pytest.raises(
        ValueError, match=r"no raw counts: layers\['counts'\] holds -1; X holds"
    ) as e:
        read_h5ad(path, 0.5)
    assert "0.25" in str(e.value)
    assert "save the counts before normalising" in str(e.value)


@pytest.mark.parametrize(
    "marks",
    [
        [1, 0, 1, 1],
        [True, False, True, True],
        pd.Categorical(["1", "0", "1", "1"]),
        ["True", "False", "True", "True"],
    ],
)
def test_spots_off_the_tissue_are_left_out(tmp_path, marks):
    adata = make()
    adata.obs["in_tissue"] = marks
    spots = read_h5ad(written(tmp_path, adata), 0.5)
    assert spots.spot_id.tolist() == ["AAAC-1", "AAAT-1", "AACC-1"]
    np.testing.assert_array_equal(spots.counts.toarray(), COUNTS[[0, 2, 3]])


def test_diameter_of_the_manifest_wins_and_65_um_are_visiums_55(tmp_path):
    adata = make()
    path = written(tmp_path, adata)
    assert read_h5ad(path, 0.5, 80.0).radius0 == 80.0
    adata.uns["spatial"]["ST"]["scalefactors"]["spot_diameter_fullres"] = 65.3 / 0.5
    path = written(tmp_path, adata, "visium.h5ad")
    assert read_h5ad(path, 0.5).radius0 == 27.5 / 0.5
    assert read_h5ad(path, 0.5, 65.0).radius0 == 65.0


def test_file_and_row_of_a_manifest(tmp_path):
    path = written(tmp_path, make())
    row = {"slide_id": "A", "spots": path, "mpp": "0.5", "spot_diameter_um": "80"}
    assert read_spots(row).radius0 == 80.0
    assert read_spots(row | {"spot_diameter_um": None}).radius0 == 60.0


def test_any_fsspec_address(tmp_path):
    path = written(tmp_path, make())
    fsspec.filesystem("memory").put(path, "/h5ad/s.h5ad")
    try:
        assert len(read_h5ad("memory://h5ad/s.h5ad", 0.5)) == 4
    finally:
        fsspec.filesystem("memory").rm("/h5ad", recursive=True)


def test_swapped_pixel_columns_are_logged(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    adata = make()
    adata.obs["pxl_col_in_fullres"], adata.obs["pxl_row_in_fullres"] = XY0.T
    read_h5ad(written(tmp_path, adata), 0.5)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    adata.obs["pxl_row_in_fullres"], adata.obs["pxl_col_in_fullres"] = XY0.T
    read_h5ad(written(tmp_path, adata), 0.5)
    assert "is (row, column)" in caplog.text
    adata.obs["pxl_row_in_fullres"] = 0.0
    read_h5ad(written(tmp_path, adata), 0.5)
    assert "differs from" in caplog.text


def without(adata, *path):
    """Remove an entry of the file by its keys."""
    part = adata
    for key in path[:-1]:
        part = getattr(part, key) if isinstance(part, anndata.AnnData) else part[key]
    del part[path[-1]]
    return adata


@pytest.mark.parametrize(
    ("adata", "words"),
    [
        (without(make(), "obsm", "spatial"), r"obsm holds \[\], not 'spatial'"),
        (make(obsm={"spatial": np.zeros((4, 3))}), r"shape \(4, 3\), expected \(4, 2\)"),
        (make(obsm={"spatial": np.full((4, 2), np.nan)}), "AAAC-1 lies at"),
        (without(make(), "uns", "spatial"), r"no spot diameter: .*Set spot_diameter_um"),
        (without(make(), "uns", "spatial", "ST", "scalefactors"), "no spot diameter"),
        (make(uns={"spatial": {"a": {}, "b": {}}}), r"holds 2 sections, such as \['a', 'b'\]"),
        (make(np.zeros((4, 3))), "no counts at all"),
        (make(obs=pd.DataFrame({"in_tissue": [0] * 4}, index=list("abcd"))), "none of 4 spots"),
    ],
)
def test_files_that_lack_something_are_refused(tmp_path, adata, words):
    path = written(tmp_path, adata)
    with pytest.raises(ValueError, match=words) as caught:
        read_h5ad(path, 0.5)
    assert path in str(caught.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.h5ad: no such file"):
        read_h5ad(str(tmp_path / "none.h5ad"), 0.5)
    path = written(tmp_path, make())
    Path(path).write_bytes(Path(path).read_bytes()[:700])
    with pytest.raises(ValueError, match="not a readable HDF5 file"):
        read_h5ad(path, 0.5)
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["obsm/spatial"] = XY0
        file["obs"] = np.zeros(4, [("index", "S4")])
    with pytest.raises(ValueError, match=r"obs has no index\. Write the file again"):
        read_h5ad(str(tmp_path / "old.h5ad"), 0.5)


def test_real_visium_file_without_counts():
    if not REAL.exists():
        pytest.skip("real Visium file ../shared/data/visium_squidpy is absent")
    with pytest.raises(ValueError, match=r"no raw counts: X holds \d\.\d+"):
        read_h5ad(str(REAL), 0.73)


def pooled(tmp_path, diameter0=110.0, columns=6):
    """Write squares with sides of 200 px; return the file."""
    y, x = (axis.ravel() * 200.0 for axis in np.mgrid[:5, :columns])
    adata = anndata.AnnData(np.ones((len(x), 3), np.float32))
    adata.var_names = ["EPCAM", "TBCE", "CD3E"]
    adata.obsm["spatial"] = np.column_stack([x, y])
    factors = {"spot_diameter_fullres": diameter0}
    adata.uns["spatial"] = {"ST": {"scalefactors": factors}}
    return written(tmp_path, adata)


def test_squares_over_which_counts_were_pooled_become_discs_of_their_area(tmp_path):
    path = pooled(tmp_path)
    row = {"slide_id": "A", "spots": path, "st_technology": "Xenium"}
    assert read_spots(row, 0.5).radius0 == pytest.approx(112.84, abs=0.01)
    assert read_spots(row | {"st_technology": "Visium HD"}, 0.04).radius0 == pytest.approx(
        112.84, abs=0.01
    )
    assert read_spots(row | {"spot_diameter_um": 80}, 0.5).radius0 == 80
    touching = pooled(tmp_path, 200.0)
    assert read_h5ad(touching, 0.5).radius0 == pytest.approx(112.84, abs=0.01)


def test_squares_of_unknown_origin_are_told_and_st_arrays_are_not(tmp_path, caplog):
    assert read_h5ad(pooled(tmp_path), 0.5).radius0 == 55
    assert "spots form squares of 100 um" in caplog.text
    caplog.clear()
    assert read_h5ad(pooled(tmp_path, 100.0), 1.0).radius0 == 50
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("damage", ["link", "loop", "group", "text", "giant", "short"])
def test_parts_of_another_kind_give_one_line(tmp_path, damage):
    adata = make()
    adata.obs["in_tissue"] = 1
    path = written(tmp_path, adata)
    with h5py.File(path, "r+") as file:
        if damage == "link":
            del file["obsm/spatial"]
            file["obsm/spatial"] = h5py.ExternalLink("other.h5", "x")
        elif damage == "loop":
            del file["X/data"]
            file["X/data"] = file["X"]
        elif damage == "group":
            del file["obsm/spatial"]
            file.create_group("obsm/spatial")
        elif damage == "text":
            del file["X/data"]
            file["X/data"] = ["a"] * 7
        elif damage == "giant":
            del file["X/indptr"]
            file.create_dataset("X/indptr", (2**40,), np.int64, chunks=(2**20,))
        else:
            del file["obs/in_tissue"]
            file["obs/in_tissue"] = [1, 1]
    with pytest.raises(ValueError, match=r"s\.h5ad: ") as caught:
        read_h5ad(path, 0.5)
    assert len(str(caught.value).splitlines()) == 1


def test_a_mark_that_is_neither_yes_nor_no_is_told(tmp_path, caplog):
    adata = make()
    adata.obs["in_tissue"] = ["1", "maybe", "1", "0"]
    assert len(read_h5ad(written(tmp_path, adata), 0.5)) == 2
    assert "holds 'maybe', which is neither 1 nor 0" in caplog.text
