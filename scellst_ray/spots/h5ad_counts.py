"""Find the raw counts of an AnnData file and name their genes. S: spots; G: genes."""

import logging
from collections.abc import Iterator

import h5py
import numpy as np
from scipy import sparse

from scellst_ray.spots.anndata_file import read_index, read_matrix_part, read_text_column
from scellst_ray.spots.features import select_genes
from scellst_ray.spots.gene_names import is_ensembl, mostly_ensembl
from scellst_ray.spots.hdf5 import find_part, names_in
from scellst_ray.spots.matrices import first_not_count

logger = logging.getLogger(__name__)

# Columns of var that may name symbols or types, in lower case and in order of preference.
SYMBOLS = (
    *("feature_name", "gene_symbol", "gene_symbols", "symbol", "symbols", "gene_name"),
    *("gene_names", "hgnc_symbol", "mgi_symbol", "gene_short_name", "external_gene_name"),
    *("genesymbol", "genename", "gene", "genes", "name", "feature_names", "features"),
)
TYPES = ("feature_types", "feature_type", "feature_class", "codeword_category", "feature_biotype")


def raw_counts(file: h5py.File, num_spots: int, uri: str) -> tuple[sparse.csr_matrix, list[str]]:
    """Return the first matrix of whole numbers, float32 [S, G], and the symbols of its genes.

    Args:
        file: The open file.
        num_spots: Number of names in obs.
        uri: Name of the file in errors.

    Raises:
        ValueError: A matrix is damaged, or none holds whole numbers; the message says what each
            place holds, and which other layer holds whole numbers.
    """
    reasons = []
    for name, key, var_key in _places(file, uri):
        source = f"{uri}: {name}"
        var = find_part(file, var_key, uri)
        genes = read_index(var, f"{uri}: {var_key}")
        part = find_part(file, key, uri)
        counts = read_matrix_part(part, (num_spots, len(genes)), source)
        wrong = first_not_count(counts.data)
        if wrong is None:
            logger.info("%s: raw counts in %s", uri, name)
            return _genes_of(file, var, genes, counts.astype(np.float32), uri)
        reasons.append(f"{name} holds {wrong:g}")
    reason = "; ".join(reasons) or "the file has neither X nor layers['counts'] nor raw"
    layers = _other_layers(file, num_spots, uri)
    remedy = "save the counts before normalising"
    if layers:
        remedy = f"{' and '.join(layers)} hold whole numbers: save them as layers['counts']"
    message = (
        f"{uri}: no raw counts: {reason}. Expected whole numbers of 0 or above in "
        f"layers['counts'], X or raw: {remedy}."
    )
    raise ValueError(message)


def _places(file: h5py.File, uri: str) -> Iterator[tuple[str, str, str]]:
    """Yield the matrices that may hold counts as (name, key in the file, key of their genes)."""
    for name, key, var in (
        ("layers['counts']", "layers/counts", "var"),
        ("X", "X", "var"),
        ("raw.X", "raw/X", "raw/var"),
    ):
        part = find_part(file, key, uri)
        # An AnnData without X stores an empty data set.
        is_empty = isinstance(part, h5py.Dataset) and part.shape in (None, ())
        if part is not None and not is_empty and find_part(file, var, uri) is not None:
            yield name, key, var


def _other_layers(file: h5py.File, num_spots: int, uri: str) -> list[str]:
    """Return names of layers that hold whole numbers and are not looked at."""
    layers = find_part(file, "layers", uri)
    genes = read_index(find_part(file, "var", uri), f"{uri}: var")
    found = []
    for name in names_in(layers, uri):
        if name == "counts":
            continue
        source = f"{uri}: layers[{name!r}]"
        part = find_part(file, f"layers/{name}", uri)
        try:
            counts = read_matrix_part(part, (num_spots, len(genes)), source)
        except ValueError as error:
            logger.info("%s", error)
            continue
        if first_not_count(counts.data) is None and counts.nnz:
            found.append(f"layers[{name!r}]")
    return found


def _genes_of(
    file: h5py.File, var: h5py.Group, names: list[str], counts: sparse.csr_matrix, uri: str
) -> tuple[sparse.csr_matrix, list[str]]:
    """Return the columns that are genes, and their symbols."""
    whole = find_part(file, "var", uri)
    symbols = _symbols(var, whole, names, uri)
    types = _column_of(var, whole, names, TYPES, uri)
    columns = select_genes(symbols, types, uri)
    # A control may be named in the index only.
    columns = columns[np.isin(columns, select_genes(names, None, uri))]
    return counts[:, columns], [symbols[column] for column in columns]


def _symbols(var: h5py.Group, whole: h5py.Group | None, names: list[str], uri: str) -> list[str]:
    """Return symbols of genes that are named by ids, if a column holds them; else the names."""
    num_ids = sum(is_ensembl(name) or name.isdecimal() for name in names)
    if 2 * num_ids <= len(names):
        return names
    symbols = _column_of(var, whole, names, SYMBOLS, uri)
    if symbols is None:
        text = (
            "%s: genes are named by ids, such as %s, and no column of var names symbols, such as "
            "var['feature_name']: slides named by symbols will share no gene with it"
        )
        logger.warning(text, uri, names[:2])
        return names
    pairs = zip(names, symbols, strict=True)
    return [
        name if symbol.lower() in ("", "nan", "none", "na", "<na>") else symbol
        for name, symbol in pairs
    ]


def _column_of(
    var: h5py.Group,
    whole: h5py.Group | None,
    names: list[str],
    wanted: tuple[str, ...],
    uri: str,
) -> list[str] | None:
    """Return the first column of text with a wanted name, of var or, by index, of the whole var.

    A column of symbols that are ids themselves, or all alike, is passed over.
    """
    for frame in (var, whole):
        stored = {name.lower(): name for name in names_in(frame, uri)}
        for key in (stored[name] for name in wanted if name in stored):
            values = read_text_column(frame, key, f"{uri}: var")
            if values is None:
                continue
            index = read_index(frame, f"{uri}: var")
            if len(values) != len(index):
                message = (
                    f"{uri}: var[{key!r}] has {len(values)} entries for {len(index)} features."
                )
                raise ValueError(message)
            if wanted is SYMBOLS and mostly_ensembl(values):
                continue
            value_of = dict(zip(index, values, strict=True))
            return values if index == names else [value_of.get(name, "") for name in names]
    return None
