import anndata
import numpy as np
import pytest
from scipy import sparse

from scellst_ray.spots import read
from scellst_ray.spots.read import read_spots
from scellst_ray.spots.table import Spots
from tests.support.lattices import hexagons


@pytest.fixture
def calls(monkeypatch):
    seen = []
    spots = Spots(np.array(["a"]), np.zeros((1, 2)), 1.0, sparse.csr_matrix([[1.0]]), ["A"])

    def stand_in(name):
        def reader(*given):
            seen.append((name, *given))
            return spots

        return reader

    for name in ("read_space_ranger", "read_h5ad", "read_st_array"):
        monkeypatch.setattr(read, name, stand_in(name.removeprefix("read_")))
    return seen


@pytest.mark.parametrize(
    ("row", "mpp", "call"),
    [
        ({"spots": "s3://b/outs", "mpp": 0.5}, None, ("space_ranger", "s3://b/outs", 0.5, 55.0)),
        ({"spots": "outs", "mpp": 0.5}, 0.25, ("space_ranger", "outs", 0.25, 55.0)),
        (
            {"spots": "outs", "mpp": "0.5", "spot_diameter_um": 65, "spot_positions": float("nan")},
            None,
            ("space_ranger", "outs", 0.5, 65.0),
        ),
        (
            {"spots": "c.tsv.gz", "spot_positions": "p.tsv", "mpp": 0.5, "spot_diameter_um": None},
            None,
            ("st_array", "c.tsv.gz", "p.tsv", 0.5, 100.0),
        ),
        ({"spots": "s.h5ad", "mpp": 0.5}, None, ("h5ad", "s.h5ad", 0.5, None, None)),
        (
            {"spots": "s.h5ad", "mpp": 0.5, "spot_diameter_um": "65"},
            None,
            ("h5ad", "s.h5ad", 0.5, 65.0, None),
        ),
    ],
)
def test_dispatch_on_manifest_columns(calls, row, mpp, call):
    read_spots(row, mpp)
    assert calls == [call]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"spots": None, "mpp": 0.5}, "slide A: the manifest's `spots` is empty"),
        ({"spots": float("nan"), "mpp": 0.5}, "`spots` is empty"),
        ({"spots": "outs", "mpp": float("nan")}, "`mpp`"),
        ({"spots": "outs", "mpp": "half"}, "`mpp` is 'half', expected a number"),
        ({"spots": "c.tsv", "mpp": 0.5}, "`spot_positions`"),
    ],
)
def test_rows_that_lack_something_are_refused(row, words):
    with pytest.raises(ValueError, match=words):
        read_spots({"slide_id": "A"} | row)


def write_section(path, pitch0=200.0):
    row, column, xy0 = hexagons(pitch0, rows=5, columns=6)
    adata = anndata.AnnData(np.ones((30, 2), np.float32))
    adata.obs["array_row"], adata.obs["array_col"] = row, column
    adata.obsm["spatial"] = xy0
    factors = {"spot_diameter_fullres": 0.65 * pitch0}
    adata.uns["spatial"] = {"lib": {"scalefactors": factors}}
    adata.write_h5ad(path)
    return {"slide_id": "A", "spots": str(path)}


def test_a_resolution_that_contradicts_the_spots_is_refused(tmp_path):
    row = write_section(tmp_path / "s.h5ad")
    assert len(read_spots(row, 0.5)) == 30
    assert len(read_spots(row, 0.54)) == 30
    for mpp in (1.0, 0.25, 0.44):
        with pytest.raises(
            ValueError, match=rf"slide A: .*s\.h5ad: {mpp:g} um/px .* 0\.5 um/px by"
        ):
            read_spots(row, mpp)


@pytest.mark.parametrize("word", ["yes", "TRUE", 1, True, "1.0"])
def test_the_manifest_may_confirm_a_resolution(tmp_path, word, caplog):
    row = write_section(tmp_path / "s.h5ad")
    assert len(read_spots(row | {"mpp_confirmed": word}, 1.0)) == 30
    assert "1 um/px in use, but 0.5 um/px by" in caplog.text
    for other in ("no", "", None, False, 0):
        with pytest.raises(ValueError, match="um/px in use"):
            read_spots(row | {"mpp_confirmed": other}, 1.0)


def test_a_folder_named_like_a_file_is_refused(tmp_path):
    (tmp_path / "a.h5ad").mkdir()
    row = {"slide_id": "A", "spots": str(tmp_path / "a.h5ad")}
    with pytest.raises(ValueError, match=r"a\.h5ad: is a folder, expected an \.h5ad file"):
        read_spots(row, 0.5)
    write_section(tmp_path / "a.h5ad" / "b.h5ad")
    with pytest.raises(ValueError, match=r"Give this as `spots`: .*/a\.h5ad/b\.h5ad"):
        read_spots(row, 0.5)


def test_tables_of_a_matrix_are_no_counts_table(tmp_path):
    folder = tmp_path / "outs/filtered_feature_bc_matrix"
    folder.mkdir(parents=True)
    (tmp_path / "outs/spatial").mkdir()
    (tmp_path / "outs/spatial/tissue_positions.csv").touch()
    for name in ("barcodes.tsv.gz", "features.tsv"):
        (folder / name).touch()
        with pytest.raises(ValueError, match=f"Give that folder as `spots`: {tmp_path}/outs"):
            read_spots({"spots": str(folder / name)}, 0.5)


@pytest.mark.parametrize("number", ["-1", "0", "inf"])
def test_numbers_that_are_not_positive_are_refused(number):
    with pytest.raises(ValueError, match="expected a positive number"):
        read_spots({"spots": "outs", "spot_diameter_um": number}, 0.5)
