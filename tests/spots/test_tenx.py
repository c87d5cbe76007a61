import gzip

import fsspec
import h5py
import numpy as np
import pytest
from scipy import io as scipy_io
from scipy import sparse

from scellst_ray.spots.tenx import find_file, read_bytes, read_matrix, read_strings

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
