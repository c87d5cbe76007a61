"""Ensembl ids of genes from the files in which spots come."""

import gzip

import anndata
import h5py
import numpy as np
import pytest

from scellst_ray.spots.gene_ids import gene_ids

IDS = ["ENSG00000198851", "ENSG00000284770", "ENSG00000285053", "ENSG00000141736.13"]
SYMBOLS = ["CD3E", "TBCE", "TBCE", "ERBB2"]
GENES = ["ERBB2", "TBCE", "TBCE-1", "absent", "CD3E", "ENSMUSG00000032093"]
EXPECTED = [IDS[3], IDS[1], None, None, IDS[0], "ENSMUSG00000032093"]


def write_mex(folder, *, name="features.tsv.gz", columns=3):
    path = folder / "filtered_feature_bc_matrix" / name
    path.parent.mkdir()
    rows = zip(IDS, SYMBOLS, ["Gene Expression"] * 4, strict=True)
    text = "".join("\t".join(row[:columns]) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    return str(folder)


def write_h5(folder, keys=("id", "name")):
    with h5py.File(folder / "raw_feature_bc_matrix.h5", "w") as file:
        features = file.create_group("matrix/features")
        for key, values in zip(keys, (IDS, SYMBOLS), strict=False):
            features[key] = np.array(values, "S")
    return str(folder)


def write_h5ad(folder, index, **columns):
    adata = anndata.AnnData(np.ones((2, 4), np.float32))
    adata.var_names = index
    for name, values in columns.items():
        adata.var[name] = values
    adata.write_h5ad(folder / "s.h5ad")
    return str(folder / "s.h5ad")


@pytest.mark.parametrize(
    "write",
    [
        write_mex,
        lambda folder: write_mex(folder, name="genes.tsv", columns=2),
        write_h5,
        lambda folder: write_h5ad(folder, ["CD3E", "TBCE", "TBCE-1", "ERBB2"], gene_ids=IDS),
        lambda folder: write_h5ad(folder, IDS, feature_name=SYMBOLS),
    ],
)
def test_ids_of_each_format(tmp_path, write):
    found = gene_ids(GENES, [write(tmp_path)])
    # AnnData names the second gene of a symbol itself.
    assert [None if g == "TBCE-1" else i for g, i in zip(GENES, found, strict=True)] == EXPECTED


def test_files_without_ids(tmp_path):
    (tmp_path / "mex").mkdir()
    for uri in (
        write_mex(tmp_path / "mex", columns=1),
        write_h5(tmp_path, keys=("id",)),
        write_h5ad(tmp_path, SYMBOLS),
        "absent/st.tsv.gz",
    ):
        assert gene_ids(["CD3E"], [uri]) == [None]


def test_later_files_fill_the_gaps_and_are_left_alone_when_all_is_known(tmp_path):
    first = write_h5ad(tmp_path, ["CD3E", "B", "C", "D"], gene_ids=IDS)
    (tmp_path / "mex").mkdir()
    second = write_mex(tmp_path / "mex")
    uris = [first, second, "s3://never/read"]
    assert gene_ids(["CD3E", "ERBB2"], uris) == [IDS[0], IDS[3]]
