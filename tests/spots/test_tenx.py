import gzip

import fsspec
import h5py
import numpy as np
import pytest
from scipy import io as scipy_io
from scipy import sparse

from scellst_ray.spots.files import read_bytes
from scellst_ray.spots.tenx import find_file, read_matrix, read_strings

LOCAL = fsspec.filesystem("file")
BARCODES = ["AAAC-1", "AAAG-1"]
SYMBOLS = ["EPCAM", "CD3E", "CD3"]
KINDS = ["Gene Expression", "Gene Expression", "Antibody Capture"]
COUNTS_BG = np.array([[1, 0, 9], [0, 5, 9]])


def write_mex(folder, columns):
    """Write a plain MEX folder whose features have these columns."""
    folder.mkdir()
    scipy_io.mmwrite(folder / "matrix.mtx", sparse.coo_matrix(COUNTS_BG.T))
    (folder / "barcodes.tsv").write_text("".join(f"{name}\n" for name in BARCODES))
    rows = ["\t".join(row) for row in zip(*columns, strict=True)]
    (folder / "features.tsv").write_text("\n".join(rows))
    return str(folder)


def write_h5(path, kinds=KINDS):
    """Write an HDF5 matrix as Space Ranger does."""
    matrix = sparse.csc_matrix(COUNTS_BG.T)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = np.array(matrix.shape)
        group["barcodes"] = np.array(BARCODES, "S")
        group["features/name"] = np.array(SYMBOLS, "S")
        if kinds:
            group["features/feature_type"] = np.array(kinds, "S")
    return str(path)


def test_both_formats_give_barcodes_by_genes_without_antibodies(tmp_path):
    ids = ["E0", "E1", "E2"]
    mex = write_mex(tmp_path / "mex", [ids, SYMBOLS, KINDS])
    for path in (mex, write_h5(tmp_path / "matrix.h5")):
        counts, barcodes, genes = read_matrix(LOCAL, path)
        assert counts.toarray().tolist() == [[1, 0], [0, 5]]
        assert (barcodes, genes) == (BARCODES, SYMBOLS[:2])


@pytest.mark.parametrize("columns", [[SYMBOLS], [["E0", "E1", "E2"], SYMBOLS]])
def test_features_without_types_are_all_genes(tmp_path, columns):
    untyped = write_h5(tmp_path / "matrix.h5", kinds=None)
    for path in (write_mex(tmp_path / "mex", columns), untyped):
        counts, _, genes = read_matrix(LOCAL, path)
        assert counts.toarray().tolist() == COUNTS_BG.tolist()
        assert genes == SYMBOLS


def test_a_matrix_without_genes_is_refused(tmp_path):
    path = write_h5(tmp_path / "matrix.h5", ["Antibody Capture"] * 3)
    with pytest.raises(ValueError, match=r"no feature of type 'Gene Expression' among 3; .*Anti"):
        read_matrix(LOCAL, path)


def test_files_of_another_size_are_refused(tmp_path):
    folder = write_mex(tmp_path / "mex", [SYMBOLS[:2]])
    with pytest.raises(ValueError, match="3 features x 2 barcodes, but the folder lists 2 feat"):
        read_matrix(LOCAL, folder)


def test_the_first_name_that_exists_is_found_and_a_prefix_is_allowed(tmp_path):
    names = ["a.h5", "a"]
    with pytest.raises(ValueError, match=r"one of \['a.h5', 'a'\], but the folder holds \[\]"):
        find_file(LOCAL, str(tmp_path), names)
    (tmp_path / "set_a.h5").touch()
    assert find_file(LOCAL, f"{tmp_path}/", names) == f"{tmp_path}/set_a.h5"
    (tmp_path / "other_a.h5").touch()
    with pytest.raises(ValueError, match=r"holds \['other_a.h5', 'set_a.h5'\]"):
        find_file(LOCAL, str(tmp_path), names)
    (tmp_path / "a").touch()
    assert find_file(LOCAL, str(tmp_path), names) == f"{tmp_path}/a"
    (tmp_path / "a.h5").touch()
    assert find_file(LOCAL, str(tmp_path), names) == f"{tmp_path}/a.h5"
    with pytest.raises(ValueError, match="the folder does not exist"):
        find_file(LOCAL, str(tmp_path / "none"), names)


def test_gzipped_files_are_decompressed_and_cut_ones_are_refused(tmp_path):
    packed = gzip.compress(b"text")
    (tmp_path / "a.gz").write_bytes(packed)
    assert read_bytes(LOCAL, str(tmp_path / "a.gz")) == b"text"
    (tmp_path / "a.gz").write_bytes(packed[:-6])
    with pytest.raises(ValueError, match=r"a\.gz: cannot be read .* copy it again"):
        read_bytes(LOCAL, str(tmp_path / "a.gz"))


def test_tables_are_read_as_strings():
    table = read_strings(b'a,b\n"007",x\n', "t.csv", separator=",", has_header=True)
    assert table.to_dict(as_series=False) == {"a": ["007"], "b": ["x"]}
    table = read_strings(b'x"y\t1\n', "t.tsv", separator="\t")
    assert table.rows() == [('x"y', "1")]
    with pytest.raises(ValueError, match=r"t\.csv: not a table .* Copy it again"):
        read_strings(b"", "t.csv", separator=",")


@pytest.mark.parametrize("kind", ["h5", "mex"])
def test_controls_are_no_genes_whatever_their_type_says(tmp_path, kind):
    names, types = ["EPCAM", "NegControlProbe_00042", "CD3E"], ["Gene Expression"] * 3
    path = str(tmp_path / "m.h5")
    if kind == "mex":
        path = write_mex(tmp_path / "mex", [names, names, types])
    else:
        write_h5(path, types)
        with h5py.File(path, "r+") as file:
            del file["matrix/features/name"]
            file["matrix/features/name"] = np.array(names, "S")
    counts, _, genes = read_matrix(LOCAL, path)
    assert genes == ["EPCAM", "CD3E"]
    assert counts.toarray().tolist() == [[1, 9], [0, 9]]


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("indices", [0, 9, 1, 2], "1 indices lie outside, such as 9 of 3"),
        ("indptr", [0, 3, 2], "indptr goes from 0 to 2, expected 0 to 4"),
        ("indptr", [0, 9, 4], "indptr falls from 9 to 4"),
        ("data", ["1"] * 4, "data holds object"),
        ("data", [1, 2**40, 1, 1], "a count is 1"),
        ("shape", [2, 3], r"shape \[2, 3\], but 3 features, 2 barcodes"),
        ("shape", [2**40, 2], "shape .* but 3 features"),
        ("barcodes", [1, 2], "expected a list of text"),
        ("features/name", ["a", "b"], "but 2 features"),
    ],
)
def test_an_hdf5_matrix_is_checked_in_full(tmp_path, name, values, words):
    path = write_h5(tmp_path / "matrix.h5")
    with h5py.File(path, "r+") as file:
        del file[f"matrix/{name}"]
        file[f"matrix/{name}"] = values
    with pytest.raises(ValueError, match=rf"matrix\.h5: .*{words}"):
        read_matrix(LOCAL, path)


HEADER = "%%MatrixMarket matrix coordinate integer general\n"


@pytest.mark.parametrize(
    "text",
    [
        "%note\n%another\n3 2 4\n1 1 1\n3 1 9\n2 2 5\n3 2 9\n",
        "3 2 4\r\n1 1 1\r\n3 1 9\r\n2 2 5\r\n3 2 9\r\n",
        "3 2 4\n1\t1\t1\n3 1  9\n 2 2 5\n3 2 9 \n\n",
        "3 2 4\n1 1 1.0\n3 1 9e0\n2 2 5\n3 2 9",
    ],
)
def test_a_matrix_market_file_in_every_writing(tmp_path, text):
    folder = write_mex(tmp_path / "mex", [SYMBOLS])
    (tmp_path / "mex/matrix.mtx").write_text(HEADER + text)
    assert read_matrix(LOCAL, folder)[0].toarray().tolist() == COUNTS_BG.tolist()


@pytest.mark.parametrize(
    "text",
    [
        HEADER + "3 2 1\n4 1 1\n",
        HEADER + "3 2 1\n0 1 1\n",
        HEADER + "3 2 1\n-1 1 1\n",
        HEADER + "3 2 2\n1 1 1\n1 2 one\n",
        HEADER + "3 2 2\n1 1 1\n1 2\n",
        HEADER + "3 2 1\n1 1 1\n1 2 1\n",
        HEADER + "3 2 1\n1 1 1 1\n",
        HEADER + "3 2 1000000000000\n1 1 1\n",
        HEADER + "3 2\n1 1 1\n",
        HEADER + "3 2 1\n1 1 5000000000\n",
        HEADER + "3 2 1\n1\x001 1\n",
        HEADER.replace("general", "symmetric") + "3 2 1\n1 1 1\n",
        HEADER.replace("integer", "pattern") + "3 2 1\n1 1\n",
        HEADER.replace("coordinate", "array") + "3 2\n1\n",
        "%",
        "",
    ],
)
def test_a_matrix_market_file_is_checked_in_full(tmp_path, text):
    folder = write_mex(tmp_path / "mex", [SYMBOLS])
    (tmp_path / "mex/matrix.mtx").write_text(text)
    with pytest.raises(ValueError, match=r"matrix\.mtx: ") as caught:
        read_matrix(LOCAL, folder)
    assert len(str(caught.value).splitlines()) == 1
