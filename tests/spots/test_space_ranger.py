import gzip
import json
from pathlib import Path

import fsspec
import h5py
import numpy as np
import polars as pl
import pytest
from scipy import io as scipy_io
from scipy import sparse

from scellst_ray.spots.space_ranger import read_space_ranger
from tests.support.lattices import hexagons
from tests.support.paths import SHARED

REAL = SHARED / "data" / "visium_squidpy" / "spaceranger_layout_section1" / "outs"
BARCODES = ["AAAC-1", "AAAG-1", "AAAT-1"]
GENES = ["EPCAM", "TBCE", "TBCE", "CD3"]
KINDS = ["Gene Expression"] * 3 + ["Antibody Capture"]
COUNTS_BG = np.array([[1, 0, 2, 9], [0, 5, 0, 9], [7, 0, 0, 9]])
# barcode, in_tissue, array_row, array_col, y, x: the section is wide (x to 900) and low (y to 50).
POSITIONS = [
    ("AAAT-1", 1, 0, 2, 30, 900),
    ("AAAC-1", 1, 0, 0, 10, 100),
    ("AAAG-1", 0, 0, 1, 50, 500),
]
HEADER = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres\n"


def write_text(path: Path, text: str, *, zipped: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if zipped:
        Path(f"{path}.gz").write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def write_positions(outs: Path, *, header: bool) -> None:
    lines = "".join(",".join(map(str, row)) + "\n" for row in POSITIONS)
    name = "tissue_positions.csv" if header else "tissue_positions_list.csv"
    write_text(outs / "spatial" / name, HEADER * header + lines, zipped=False)


def write_mex(outs: Path, *, zipped: bool, old: bool = False, kind: str = "filtered") -> None:
    folder = outs / f"{kind}_feature_bc_matrix"
    folder.mkdir(parents=True, exist_ok=True)
    scipy_io.mmwrite(folder / "matrix.mtx", sparse.coo_matrix(COUNTS_BG.T))
    text = (folder / "matrix.mtx").read_text()
    (folder / "matrix.mtx").unlink()
    write_text(folder / "matrix.mtx", text, zipped=zipped)
    write_text(folder / "barcodes.tsv", "\n".join(BARCODES) + "\n", zipped=zipped)
    rows = [f"ENSG{i}\t{gene}" + ("" if old else f"\t{KINDS[i]}") for i, gene in enumerate(GENES)]
    write_text(folder / ("genes.tsv" if old else "features.tsv"), "\n".join(rows), zipped=zipped)


def write_h5(outs: Path, kind: str = "filtered") -> None:
    matrix = sparse.csc_matrix(COUNTS_BG.T.astype(np.int32))
    outs.mkdir(parents=True, exist_ok=True)
    with h5py.File(outs / f"{kind}_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = (
            matrix.data,
            matrix.indices.astype(np.int64),
            matrix.indptr.astype(np.int64),
        )
        group["shape"] = np.array(matrix.shape, np.int32)
        group["barcodes"] = np.array(BARCODES, "S")
        group["features/name"] = np.array(GENES, "S")
        group["features/id"] = np.array([f"ENSG{i}" for i in range(4)], "S")
        group["features/feature_type"] = np.array(KINDS, "S")


def check_expected(spots) -> None:
    assert spots.spot_id.tolist() == ["AAAC-1", "AAAT-1"]  # the third is off the tissue
    assert spots.xy0.tolist() == [[100, 10], [900, 30]]  # x from the column, y from the row
    assert spots.counts.toarray().tolist() == [[1, 0, 2], [7, 0, 0]]  # antibodies are no genes
    assert spots.genes == ["EPCAM", "TBCE", "TBCE-1"]
    assert spots.radius0 == 27.5 / 0.5


@pytest.mark.parametrize("header", [True, False], ids=["header", "list"])
@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "plain"])
def test_mex_in_every_layout(tmp_path, header, zipped):
    write_positions(tmp_path, header=header)
    write_mex(tmp_path, zipped=zipped)
    check_expected(read_space_ranger(str(tmp_path), 0.5))


@pytest.mark.parametrize("header", [True, False], ids=["header", "list"])
def test_h5(tmp_path, header):
    write_positions(tmp_path, header=header)
    write_h5(tmp_path)
    check_expected(read_space_ranger(f"{tmp_path}/", 0.5))


def test_parquet_positions_of_visium_hd(tmp_path):
    names = HEADER.strip().split(",")
    (tmp_path / "spatial").mkdir()
    table = pl.DataFrame(POSITIONS, schema=names, orient="row")
    table.write_parquet(tmp_path / "spatial/tissue_positions.parquet")
    write_h5(tmp_path)
    check_expected(read_space_ranger(str(tmp_path), 0.5))
    factors = tmp_path / "spatial/scalefactors_json.json"
    factors.write_text('{"bin_size_um": 16.0}')
    with pytest.raises(
        ValueError, match=r"bins of 16\.0 um .*Set spot_diameter_um to 16\.0 or less"
    ):
        read_space_ranger(str(tmp_path), 0.5)
    assert read_space_ranger(str(tmp_path), 0.5, 16.0).radius0 == 16.0
    factors.write_text("{")
    with pytest.raises(ValueError, match=r"scalefactors_json\.json: not a JSON object"):
        read_space_ranger(str(tmp_path), 0.5)
    (tmp_path / "spatial/tissue_positions.parquet").write_bytes(b"PAR1")
    factors.unlink()
    with pytest.raises(ValueError, match=r"tissue_positions\.parquet: not a Parquet file"):
        read_space_ranger(str(tmp_path), 0.5)


@pytest.mark.parametrize("kind", ["h5", "mex"])
def test_downloads_have_the_data_sets_name_before_the_matrix(tmp_path, kind):
    write_positions(tmp_path, header=True)
    if kind == "h5":
        write_h5(tmp_path)
        path = tmp_path / "filtered_feature_bc_matrix.h5"
    else:
        write_mex(tmp_path, zipped=True)
        path = tmp_path / "filtered_feature_bc_matrix"
    path.rename(tmp_path / f"V1_Human_Lymph_Node_{path.name}")
    check_expected(read_space_ranger(str(tmp_path), 0.5))


def test_header_columns_are_read_by_name_whatever_their_order(tmp_path):
    names = HEADER.strip().split(",")
    order = [3, 5, 0, 4, 2, 1]
    lines = [names, *[list(map(str, row)) for row in POSITIONS]]
    text = "\n".join(",".join(line[i] for i in order) for line in lines)
    write_text(tmp_path / "spatial/tissue_positions.csv", text, zipped=False)
    write_h5(tmp_path)
    check_expected(read_space_ranger(str(tmp_path), 0.5))


def test_genes_tsv_without_feature_types_keeps_every_feature(tmp_path):
    write_positions(tmp_path, header=True)
    write_mex(tmp_path, zipped=False, old=True, kind="raw")
    spots = read_space_ranger(str(tmp_path), 0.5)
    assert spots.genes == ["EPCAM", "TBCE", "TBCE-1", "CD3"]
    assert spots.counts.toarray().tolist() == [[1, 0, 2, 9], [7, 0, 0, 9]]


def test_any_fsspec_address(tmp_path):
    write_positions(tmp_path, header=True)
    write_mex(tmp_path, zipped=True)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/visium/outs", recursive=True)
    try:
        check_expected(read_space_ranger("memory://visium/outs", 0.5))
    finally:
        memory.rm("/visium", recursive=True)


def test_missing_parts_list_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match="the folder does not exist"):
        read_space_ranger(str(tmp_path / "absent"), 0.5)
    write_positions(tmp_path, header=True)
    expected = r"filtered_feature_bc_matrix\.h5.*the folder holds \['spatial'\]"
    with pytest.raises(ValueError, match=expected):
        read_space_ranger(str(tmp_path), 0.5)
    write_mex(tmp_path, zipped=True)
    (tmp_path / "spatial/tissue_positions.csv").unlink()
    with pytest.raises(ValueError, match=r"tissue_positions_list\.csv"):
        read_space_ranger(str(tmp_path), 0.5)
    (tmp_path / "filtered_feature_bc_matrix/features.tsv.gz").unlink()
    write_positions(tmp_path, header=True)
    with pytest.raises(ValueError, match=r"features\.tsv\.gz.*barcodes\.tsv\.gz"):
        read_space_ranger(str(tmp_path), 0.5)


@pytest.mark.parametrize(
    "damage", ["cut h5", "not spaceranger h5", "cut mtx", "cut gz", "other barcodes"]
)
def test_damaged_matrices_are_refused(tmp_path, damage):
    write_positions(tmp_path, header=True)
    folder = tmp_path / "filtered_feature_bc_matrix"
    path = tmp_path / "filtered_feature_bc_matrix.h5"
    if damage == "cut h5":
        write_h5(tmp_path)
        path.write_bytes(path.read_bytes()[:900])
    elif damage == "not spaceranger h5":
        with h5py.File(path, "w") as file:
            file["X"] = np.zeros(3)
    elif damage == "cut mtx":
        write_mex(tmp_path, zipped=False)
        text = (folder / "matrix.mtx").read_text().splitlines()
        (folder / "matrix.mtx").write_text("\n".join(text[:-2]))
    elif damage == "cut gz":
        write_mex(tmp_path, zipped=True)
        path = folder / "matrix.mtx.gz"
        path.write_bytes(path.read_bytes()[:-12])
    else:
        write_mex(tmp_path, zipped=False)
        (folder / "barcodes.tsv").write_text("AAAC-1\n")
    with pytest.raises(ValueError, match=r"feature_bc_matrix.*(Copy it again|expected|must come)"):
        read_space_ranger(str(tmp_path), 0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("AAAC-1,1,0,0,10\n", "expected|missing"),
        ("AAAC-1,1,0,0,ten,100\n", "not a number"),
        ("", "not a table"),
        ("AAAC-1,0,0,0,10,100\n", "none of 1 spots has in_tissue"),
    ],
)
def test_unusable_positions_are_refused(tmp_path, text, words):
    write_h5(tmp_path)
    write_text(tmp_path / "spatial/tissue_positions_list.csv", text, zipped=False)
    with pytest.raises(ValueError, match=words) as caught:
        read_space_ranger(str(tmp_path), 0.5)
    assert "tissue_positions_list.csv" in str(caught.value)


def test_real_folder():
    if not REAL.exists():
        pytest.skip("real Space Ranger folder ../shared/data/visium_squidpy is absent")
    spots = read_space_ranger(str(REAL), 0.73)
    lines = [
        line.split(",")
        for line in (REAL / "spatial/tissue_positions_list.csv").read_text().splitlines()
    ]
    place = {line[0]: (float(line[5]), float(line[4])) for line in lines if line[1] == "1"}
    barcodes = (REAL / "raw_feature_bc_matrix/barcodes.tsv").read_text().split()
    assert spots.spot_id.tolist() == [name for name in barcodes if name in place]
    assert [tuple(xy) for xy in spots.xy0.tolist()] == [place[name] for name in spots.spot_id]
    assert spots.counts.shape[1] == 50


def visium(outs, suffixes=("-1",), marks=None, pitch0=200.0, **factors):
    """Write 30 spots of Visium; the matrix holds a section per suffix, section n counting n."""
    row, column, xy0 = hexagons(pitch0, rows=5, columns=6)
    cores = [f"{i:016d}".translate(str.maketrans("0123456789", "ACGTACGTCA")) for i in range(30)]
    cores = [core[:-2] + "ACGT"[i // 4 % 4] + "ACGT"[i % 4] for i, core in enumerate(cores)]
    cores = ["ACGT"[i // 16] * 4 + core for i, core in enumerate(cores)]
    blocks = [np.full((30, 2), n + 1) for n in range(len(suffixes))]
    matrix = sparse.csc_matrix(np.vstack(blocks).T)
    (outs / "spatial").mkdir(parents=True)
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = np.array(matrix.shape)
        group["barcodes"] = np.array([core + end for end in suffixes for core in cores], "S")
        group["features/name"] = np.array(["EPCAM", "CD3E"], "S")
    table = pl.DataFrame(
        {
            "barcode": [core + "-1" for core in cores],
            "in_tissue": [1] * 30 if marks is None else marks,
            "array_row": row,
            "array_col": column,
            "pxl_row_in_fullres": xy0[:, 1],
            "pxl_col_in_fullres": xy0[:, 0],
        }
    )
    table.write_csv(outs / "spatial/tissue_positions.csv")
    (outs / "spatial/scalefactors_json.json").write_text(json.dumps(factors))
    return str(outs)


@pytest.mark.parametrize("suffixes", [("-1", "-2"), ("-2", "-1"), ("-2",), ("-1-0", "-1-1")])
def test_counts_of_other_sections_are_refused(tmp_path, suffixes):
    with pytest.raises(ValueError, match=r"outs: .*(2 sections|marked otherwise).*30 spots"):
        read_space_ranger(visium(tmp_path / "outs", suffixes), 0.5)


@pytest.mark.parametrize(
    "marks", [[True] * 29 + [False], [1.0] * 29 + [None], ["TRUE"] * 29 + ["FALSE"]]
)
def test_positions_that_pandas_or_r_wrote(tmp_path, marks):
    spots = read_space_ranger(visium(tmp_path / "outs", marks=marks), 0.5)
    assert len(spots) == 29
    assert (spots.counts.toarray() == 1).all()


@pytest.mark.parametrize(
    ("factors", "stated"),
    [
        ({}, [0.5]),
        ({"spot_diameter_fullres": 130.0}, [0.5]),
        ({"spot_diameter_fullres": 110.0}, [0.5]),
        ({"spot_diameter_fullres": 180.0}, []),
        ({"spot_diameter_fullres": "wide"}, [0.5]),
        ({"bin_size_um": 100.0}, []),
        ({"microns_per_pixel": 0.25}, [0.25]),
    ],
)
def test_resolutions_that_follow_from_the_folder(tmp_path, factors, stated):
    spots = read_space_ranger(visium(tmp_path / "outs", **factors), 0.5)
    assert [round(statement.mpp, 6) for statement in spots.stated_mpp] == stated


def test_discs_of_the_area_of_bins_are_allowed_and_small_ones_told(tmp_path, caplog):
    outs = visium(tmp_path / "outs", bin_size_um=8.0)
    assert read_space_ranger(outs, 0.5, 9.02).radius0 == 9.02
    assert not caplog.records
    read_space_ranger(outs, 0.5, 5.0)
    assert "cover 31 % of the bins of 8 um" in caplog.text
    with pytest.raises(ValueError, match=r"Set spot_diameter_um to 8\.0 or less"):
        read_space_ranger(outs, 0.5, 10.0)


@pytest.mark.parametrize("value", ["wide", [8], -1, True])
def test_a_bin_size_that_is_none_is_refused(tmp_path, value):
    outs = visium(tmp_path / "outs", bin_size_um=value)
    with pytest.raises(ValueError, match=r"bin_size_um in spatial/scalefactors_json\.json is"):
        read_space_ranger(outs, 0.5)


def test_the_parent_folder_is_refused_with_the_folder_to_give(tmp_path):
    outs = visium(tmp_path / "outs")
    with pytest.raises(ValueError, match=f"Give this as `spots`: {outs}"):
        read_space_ranger(str(tmp_path), 0.5)


def test_too_few_spots_for_a_lattice_leave_the_diameters(tmp_path):
    write_positions(tmp_path, header=True)
    write_h5(tmp_path)
    factors = {"spot_diameter_fullres": 130.0, "fiducial_diameter_fullres": 210.0}
    (tmp_path / "spatial/scalefactors_json.json").write_text(json.dumps(factors))
    stated = read_space_ranger(str(tmp_path), 0.5).stated_mpp
    assert [statement.mpp for statement in stated] == pytest.approx([0.5, 55 / 130])
    assert read_space_ranger(str(tmp_path), 0.5, 100.0).stated_mpp == ()
