"""Markers of cell types: read from a file that people or programs write, and found in a panel.

CSV and its variants, Excel (`.xlsx`), JSON and YAML. A table has one column of genes for each type,
or the columns `type` and `gene` (also as scanpy's `rank_genes_groups_df` names them).
"""

import datetime
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from scellst_ray import storage
from scellst_ray.core.extras import install_line
from scellst_ray.slides.text_tables import present, read_text_table

# Names of columns of a long table, in small letters.
TYPE_COLUMNS = ("type", "cell_type", "celltype", "cell type", "cluster", "group", "set")
GENE_COLUMNS = ("gene", "genes", "marker", "markers", "symbol", "gene_symbol", "names")
EXCEL = (".xlsx", ".xlsm")
OLD_EXCEL = (".xls", ".ods", ".xlsb", ".numbers")
# SEPT2 and MARCH1 as Excel saves them.
DATE = re.compile(r"\d{1,2}-(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)", re.IGNORECASE)
SHOWN = 10
Sets = dict[str, list[str]]


@dataclass(frozen=True)
class PanelSets:
    """Markers as far as they are in a panel.

    Attributes:
        present: Markers of each type that are in the panel, at least one.
        missing: Those of each type that are not.
    """

    present: Sets
    missing: Sets

    def lines(self) -> list[str]:
        """Return a line for each type of which markers are missing."""
        return [
            f"type {name!r}: {len(self.present[name])} of {len(self.present[name]) + len(lost)} "
            f"markers are in the panel; it lacks {_some(lost)}"
            for name, lost in self.missing.items()
            if lost
        ]


def read_markers(uri: str) -> Sets:
    """Return the markers of each type, each once, in the order of the file.

    Args:
        uri: Local path or fsspec URI.

    Raises:
        ValueError: the file cannot be read as markers. The message names it.
        ModuleNotFoundError: the package that reads Excel is absent.
    """
    try:
        sets = _read(uri)
        _check(sets)
    except FileNotFoundError as error:
        message = f"{uri}: no such file of markers"
        raise ValueError(message) from error
    except ValueError as error:
        message = f"{uri}: {error}"
        raise ValueError(message) from error
    return {name: list(dict.fromkeys(genes)) for name, genes in sets.items()}


def find_in_panel(sets: Mapping[str, Sequence[str]], panel: Sequence[str], uri: str) -> PanelSets:
    """Return which markers a panel has.

    Args:
        sets: Markers of each type.
        panel: Genes of the run.
        uri: Where the markers come from, for the message.

    Raises:
        ValueError: a type has no marker in the panel.
    """
    there = set(panel)
    found = PanelSets(
        {name: [g for g in genes if g in there] for name, genes in sets.items()},
        {name: [g for g in genes if g not in there] for name, genes in sets.items()},
    )
    without = [name for name, genes in found.present.items() if not genes]
    if without:
        named = found.missing[without[0]]
        upper = {gene.upper(): gene for gene in panel}
        near = [upper[g.upper()] for g in named if g.upper() in upper] or [
            match for gene in named[:SHOWN] for match in get_close_matches(gene, panel, 1, 0.8)
        ]
        hint = f"; did you mean {_some(near[:3])}?" if near else ""
        others = f" (nor of {len(without) - 1} other type(s))" if len(without) > 1 else ""
        message = (
            f"{uri}: none of the {len(named)} markers of type {without[0]!r}{others} is in the "
            f"run's panel of {len(panel)} genes: {_some(named)}{hint}; leave such types out, or "
            "predict with a head that was trained on their markers"
        )
        raise ValueError(message)
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN))


def _read(uri: str) -> Sets:
    suffix = Path(uri).suffix.lower()
    if suffix in OLD_EXCEL:
        message = f"is a {suffix} workbook; save it as .xlsx or CSV (UTF-8)"
        raise ValueError(message)
    if suffix in EXCEL:
        return _sets_of_table(*_read_excel(uri))
    content = storage.read_bytes(uri)
    if suffix in (".json", ".yaml", ".yml"):
        return _read_mapping(content, is_json=suffix == ".json")
    table = read_text_table(content)
    return _sets_of_table(table.columns, [[row[c] for c in table.columns] for row in table.rows])


def _read_excel(uri: str) -> tuple[list[str], list[list[Any]]]:
    """Return the header and the rows of the first sheet that holds something."""
    if find_spec("openpyxl") is None:
        message = f"openpyxl reads {uri} and is not installed: {install_line('openpyxl')}"
        raise ModuleNotFoundError(message, name="openpyxl")
    from zipfile import BadZipFile  # noqa: PLC0415 - only for Excel

    import openpyxl  # noqa: PLC0415 - an extra
    from openpyxl.utils.exceptions import InvalidFileException  # noqa: PLC0415

    path = storage.local_copy(uri)
    try:
        book = openpyxl.load_workbook(path, data_only=True)
    except (BadZipFile, InvalidFileException, KeyError, OSError) as error:
        message = f"is no readable Excel workbook ({error}); save it again, or as CSV (UTF-8)"
        raise ValueError(message) from error
    for sheet in book.worksheets:
        rows = [[present(cell) for cell in row] for row in sheet.iter_rows(values_only=True)]
        rows = [row for row in rows if any(cell is not None for cell in row)]
        if rows:
            return _named_columns(rows[0], rows[1:])
    message = "it is empty; expected a column of genes for each type"
    raise ValueError(message)


def _named_columns(header: list[Any], rows: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
    """Return the columns that have names; those that number the rows have none."""
    for column, name in enumerate(header):
        cells = [row[column] for row in rows]
        if name is None and any(isinstance(cell, str) for cell in cells):
            message = f"column {column + 1} has no name; name its type in the first row"
            raise ValueError(message)
    kept = [column for column, name in enumerate(header) if name is not None]
    return [str(header[c]).strip() for c in kept], [[row[c] for c in kept] for row in rows]


def _sets_of_table(columns: list[str], rows: list[list[Any]]) -> Sets:
    twice = [name for name, times in Counter(columns).items() if times > 1]
    if twice:
        message = f"column(s) {', '.join(twice[:5])} occur twice; give each type one column"
        raise ValueError(message)
    names = {name.lower(): place for place, name in enumerate(columns)}
    type_at = next((names[name] for name in TYPE_COLUMNS if name in names), None)
    gene_at = next((names[name] for name in GENE_COLUMNS if name in names), None)
    if type_at is None and gene_at is None:
        return {
            name: [row[place] for row in rows if row[place] is not None]
            for place, name in enumerate(columns)
        }
    if type_at is None or gene_at is None:
        has, lacks = ("gene", "type") if type_at is None else ("type", "gene")
        message = (
            f"has a column of the name {has} and none of the name {lacks}; expected the columns "
            f"type and gene, or one column of genes for each type; it has {_some(columns)}"
        )
        raise ValueError(message)
    sets: Sets = {}
    for number, row in enumerate(rows, start=1):
        if row[type_at] is None or row[gene_at] is None:
            message = f"row {number} lacks its {'type' if row[type_at] is None else 'gene'}"
            raise ValueError(message)
        sets.setdefault(str(row[type_at]), []).append(row[gene_at])
    return sets


def _read_mapping(content: bytes, *, is_json: bool) -> Sets:
    """Return the markers of a JSON or YAML document: types, each with a list of genes."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
        if twice:
            message = f"type {twice[0]!r} occurs twice; name each type once"
            raise ValueError(message)
        return dict(pairs)

    try:
        if is_json:
            found = json.loads(content, object_pairs_hook=unique)
        else:
            found = yaml.load(content, _UniqueLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        message = f"cannot be read: {' '.join(str(error).split())[:200]}"
        raise ValueError(message) from error
    is_sets = isinstance(found, dict) and all(isinstance(genes, list) for genes in found.values())
    if not is_sets:
        message = "expected types, each with a list of genes, such as T: [CD3E, CD2]"
        raise ValueError(message)
    return {str(name): genes for name, genes in found.items()}


class _UniqueLoader(yaml.SafeLoader):
    """YAML in which a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - yaml's
        keys = [key.value for key, _ in node.value]
        twice = [key for key, times in Counter(map(str, keys)).items() if times > 1]
        if twice:
            message = f"type {twice[0]!r} occurs twice; name each type once"
            raise ValueError(message)
        return super().construct_mapping(node, deep)


def _check(sets: Mapping[str, Sequence[Any]]) -> None:
    """Refuse markers that are none.

    Raises:
        ValueError: there is no type, a type has no name or no gene, or a gene is no text.
    """
    if not sets:
        message = "it names no types; expected a column of genes for each type"
        raise ValueError(message)
    for name, genes in sets.items():
        if not name.strip():
            message = "a type has no name"
            raise ValueError(message)
        if not genes:
            message = f"type {name!r} names no gene; name its markers, or leave it out"
            raise ValueError(message)
        for gene in genes:
            if isinstance(gene, datetime.date) or DATE.fullmatch(str(gene)):
                message = (
                    f"type {name!r}: a marker is the date {gene}; Excel makes dates of genes such "
                    "as MARCH1 and SEPT2: format the cells as text and type the gene again"
                )
                raise ValueError(message)
            if not isinstance(gene, str) or not gene.strip():
                message = f"type {name!r}: a marker is {gene!r}; expected the name of a gene"
                raise ValueError(message)
