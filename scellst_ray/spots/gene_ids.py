"""Ensembl ids of genes, from the files that hold the counts of spots."""

from collections.abc import Iterable, Mapping, Sequence

import fsspec
import h5py

from scellst_ray.spots.anndata_file import read_index, read_text_column
from scellst_ray.spots.gene_names import bare_name, is_ensembl
from scellst_ray.spots.h5ad_counts import SYMBOLS
from scellst_ray.spots.hdf5 import find_part, names_in, open_hdf5
from scellst_ray.spots.space_ranger import MATRICES
from scellst_ray.spots.tenx import find_file, read_features
from scellst_ray.storage.node_cache import hold

# Columns of var that may hold ids, in lower case.
IDS = ("gene_ids", "gene_id", "ensembl_id", "ensembl_ids", "ensembl", "feature_id", "id")


def gene_ids(genes: Sequence[str], spots_uris: Iterable[str]) -> list[str | None]:
    """Return the Ensembl id of each gene; None where no file states it.

    Where a symbol has several ids, it is the first, to which the readers of spots give the plain
    symbol. Files are read until all ids are known; older ST arrays hold none.

    Args:
        genes: The genes.
        spots_uris: What manifests name as `spots`; these were read before.
    """
    found = {gene: bare_name(gene) for gene in genes if is_ensembl(gene)}
    for uri in spots_uris:
        if len(found) == len(genes):
            break
        for symbol, name in _ids_in(uri).items():
            if symbol in genes:
                found.setdefault(symbol, name)
    return [found.get(gene) for gene in genes]


def _ids_in(uri: str) -> Mapping[str, str]:
    """Return ids by symbol; none if the file holds none."""
    if uri.endswith(".h5ad"):
        with hold(uri) as held, open_hdf5(str(held.path), uri) as file:
            pairs = _pairs_in_var(find_part(file, "var", uri), uri)
    elif uri.endswith((".tsv", ".tsv.gz", ".txt", ".txt.gz")):
        return {}
    else:
        fs, root = fsspec.core.url_to_fs(uri)
        pairs = read_features(fs, find_file(fs, root, MATRICES))
    by_symbol: dict[str, str] = {}
    for name, symbol in pairs:
        if is_ensembl(name):
            by_symbol.setdefault(symbol, bare_name(name))
    return by_symbol


def _pairs_in_var(var: h5py.Group, uri: str) -> list[tuple[str, str]]:
    """Return pairs of id and symbol: one is the index of var, the other one a column."""
    index = read_index(var, f"{uri}: var")
    stored = {name.lower(): name for name in names_in(var, uri)}
    for key in (stored[name] for name in (*IDS, *SYMBOLS) if name in stored):
        values = read_text_column(var, key, f"{uri}: var")
        if values is None or len(values) != len(index):
            continue
        if key.lower() in IDS:
            return list(zip(values, index, strict=True))
        if any(is_ensembl(name) for name in index):
            return list(zip(index, values, strict=True))
    return []
