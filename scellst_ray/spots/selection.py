"""Choose the genes a head learns: a rule such as hvg:250, applied to training slides only.

Every rule returns the panel, an ordered list of genes, and the details of the choice, which are
stored with the head. A head is the trained model from cells to expression.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from scellst_ray.spots.panel import gene_columns, log_normalise, read_panel
from scellst_ray.spots.spatial import morans_i, neighbour_graph, spatially_variable
from scellst_ray.spots.table import Spots, check_whole_counts
from scellst_ray.spots.variable import SPAN, highly_variable, most_variable

NUMBERED = ("hvg", "svg", "variable")
# Names of the column of genes in tables of markers; the first that is present counts.
MARKER_COLUMNS = ("gene", "genes", "gene_name", "gene_symbol", "symbol", "marker", "markers")

# Columns of the chosen candidates, scores of all candidates, further details.
Choice = tuple[NDArray[np.int64], dict[str, NDArray[np.float64]], dict[str, Any]]


@dataclass(frozen=True)
class Section:
    """The data of one training slide that the choice of genes needs.

    Attributes:
        slide_id: Name of the slide.
        genes: All genes measured on the slide.
        spots: Spots with cells and genes that pass the filters (see filter_counts).
    """

    slide_id: str
    genes: list[str]
    spots: Spots


@dataclass(frozen=True)
class Panel:
    """An ordered gene panel.

    Attributes:
        genes: P unique gene names.
        info: Details of the choice, as JSON: `rule`, `method`, `num_genes`, `training_slides` and,
            depending on the rule, `scores` (per chosen gene, in order), `num_candidates` and more.
    """

    genes: list[str]
    info: dict[str, Any]


def parse_rule(genes: str) -> tuple[str, str]:
    """Split a rule into kind and argument: ('hvg', '250'), ('list', 'A,B') or ('file', uri).

    Raises:
        ValueError: The kind is hvg, svg or variable without a positive number, or markers without
            a file.
    """
    kind, _, rest = genes.partition(":")
    kind, rest = kind.strip(), rest.strip()
    if kind in NUMBERED and not (rest.isdecimal() and int(rest) > 0):
        message = (
            f"genes is {genes!r}; give {kind}:N with N at least 1, markers:FILE, a "
            "comma-separated list or a file"
        )
        raise ValueError(message)
    if kind == "markers" and not rest:
        message = f"genes is {genes!r}; name the file of marker genes: markers:FILE"
        raise ValueError(message)
    if kind in (*NUMBERED, "markers"):
        return kind, rest
    return ("list", genes) if "," in genes else ("file", genes)


def explicit_panel(genes: str) -> Panel | None:
    """Return the panel of a list or a file, which needs no slides; None for other rules.

    Raises:
        ValueError: The rule or its file is not valid (see parse_rule and read_panel).
    """
    kind, rest = parse_rule(genes)
    if kind not in ("list", "file"):
        return None
    names = read_panel([name.strip() for name in rest.split(",")] if kind == "list" else rest)
    return Panel(names, {"rule": genes, "method": f"given as a {kind}", "num_genes": len(names)})


def choose_genes(genes: str, sections: Sequence[Section]) -> Panel:
    """Return the panel that a rule gives on the training slides.

    Candidates are the genes that pass the filters on every slide, ordered by name. So the order of
    slides, or of genes in files, does not matter. (The published list of spatially variable genes
    holds the first n genes of the genome, because its scores were lost.)

    Args:
        genes: Rule, one of:
            `hvg:N`: N highly variable genes by scanpy's seurat_v3, one batch per slide;
            `svg:N`: N spatially variable genes by Moran's I, geometric mean over slides;
            `variable:N`: N genes with the largest variance of log counts;
            `markers:FILE`: genes of the file that every slide measures;
            a comma-separated list of genes, or a file of genes.
        sections: Training slides only.

    Raises:
        ValueError: The rule is not valid or cannot be applied, or the slides share no gene.
    """
    explicit = explicit_panel(genes)
    if explicit is not None:
        return explicit
    kind, rest = parse_rule(genes)
    common: dict[str, Any] = {"rule": genes, "training_slides": [s.slide_id for s in sections]}
    if kind == "markers":
        return _markers(rest, sections, common)
    num_genes = int(rest)
    candidates = shared_genes([s.spots.genes for s in sections], sections, num_genes)
    by_kind = {"hvg": _by_seurat_v3, "svg": _by_morans_i, "variable": _by_variance}
    columns, scores, extra = by_kind[kind](sections, candidates, num_genes)
    info = common | extra
    info |= {"num_genes": num_genes, "num_candidates": len(candidates)}
    info["scores"] = {name: _as_json(values[columns]) for name, values in scores.items()}
    return Panel([candidates[column] for column in columns], info)


def shared_genes(
    genes: Sequence[Sequence[str]], sections: Sequence[Section], num_genes: int
) -> list[str]:
    """Return the genes that all slides have, ordered by name.

    Args:
        genes: Gene names per slide.
        sections: The slides, named in errors.
        num_genes: Minimum number of shared genes.

    Raises:
        ValueError: The slides share no gene, or fewer than num_genes.
    """
    shared = sorted(set(genes[0]).intersection(*genes[1:])) if genes else []
    if not shared:
        examples = "; ".join(
            f"{section.slide_id} has {len(names)}, such as {sorted(names)[:3]}"
            for section, names in list(zip(sections, genes, strict=True))[:4]
        )
        message = (
            f"no gene is shared by all {len(genes)} training slides ({examples}). Use one naming "
            "(symbols or Ensembl ids) and one species, or leave out the slides that differ."
        )
        raise ValueError(message)
    if num_genes > len(shared):
        message = (
            f"{num_genes} genes asked for, but {len(shared)} genes pass the filters on every one "
            f"of {len(genes)} training slides. Ask for 1 to {len(shared)}, lower the thresholds, "
            "or leave out the shallowest slide."
        )
        raise ValueError(message)
    return shared


def _by_seurat_v3(sections: Sequence[Section], candidates: list[str], num_genes: int) -> Choice:
    """Choose highly variable genes by scanpy's seurat_v3, one batch per slide."""
    names = [f"slide {section.slide_id}" for section in sections]
    for section, name in zip(sections, names, strict=True):
        check_whole_counts(section.spots, name, "choosing genes by hvg (seurat_v3)")
    counts = [s.spots.counts[:, gene_columns(s.spots.genes, candidates, "")] for s in sections]
    columns, scores = highly_variable(counts, names, num_genes)
    return columns, scores, {"method": f"seurat_v3, one batch a slide, loess span {SPAN}"}


def _by_morans_i(sections: Sequence[Section], candidates: list[str], num_genes: int) -> Choice:
    """Choose spatially variable genes by Moran's I, with details of each slide's graph."""
    scores, graphs = [], {}
    for section in sections:
        graph = neighbour_graph(section.spots.xy0, f"slide {section.slide_id}")
        scores.append(morans_i(graph.weights, _log_counts(section, candidates)))
        graphs[section.slide_id] = {
            "kind": graph.kind,
            "pitch0": graph.pitch0,
            "mean_neighbours": graph.weights.nnz / len(section.spots),
        }
    columns, score_columns = spatially_variable(np.stack(scores), num_genes)
    extra: dict[str, Any] = {
        "method": "Moran's I of log-normalised counts, row-normalised weights, geometric mean over "
        "slides (a negative score counts as 0)",
        "graphs": graphs,
        "num_chosen_not_spatial": int((score_columns["geometric_mean"][columns] <= 0).sum()),
    }
    return columns, score_columns, extra


def _by_variance(sections: Sequence[Section], candidates: list[str], num_genes: int) -> Choice:
    """Choose the genes whose log-normalised counts vary most."""
    log_counts = [_log_counts(section, candidates) for section in sections]
    columns, scores = most_variable(log_counts, num_genes)
    return columns, scores, {"method": "variance of log-normalised counts, mean over slides"}


def _log_counts(section: Section, candidates: list[str]) -> NDArray[np.float32]:
    """Return log-normalised counts of the candidates, float32 [S, G].

    The library size of a spot counts all genes that pass the filters.
    """
    library_S = np.asarray(section.spots.counts.sum(axis=1, dtype=np.float64)).ravel()
    columns = gene_columns(section.spots.genes, candidates, f"slide {section.slide_id}")
    return log_normalise(section.spots.counts[:, columns], library_S)


def _markers(uri: str, sections: Sequence[Section], common: dict[str, Any]) -> Panel:
    """Return the panel of the file's genes that every slide measures, in the order of the file."""
    markers = read_markers(uri)
    everywhere = set(shared_genes([s.genes for s in sections], sections, 0))
    kept = [gene for gene in markers if gene in everywhere]
    if not kept:
        examples = sorted(everywhere)[:5]
        message = (
            f"{uri}: none of its {len(markers)} markers, such as {markers[:5]}, is measured on "
            f"every training slide (measured genes: {examples} ...). Use the naming of the counts."
        )
        raise ValueError(message)
    absent = [gene for gene in markers if gene not in everywhere]
    info = {"method": "markers that every training slide measures", "num_genes": len(kept)}
    return Panel(kept, common | info | {"not_measured": absent})


def read_markers(uri: str) -> list[str]:
    """Read marker genes from a text file with one gene per line, or from a CSV or TSV.

    Args:
        uri: Path or fsspec address. A .csv or .tsv needs a header with one of MARKER_COLUMNS, in
            any case, or a single column. Further columns, such as the cell type, are ignored. A
            gene that marks two types is returned once.

    Raises:
        ValueError: The file does not exist or names no gene.
    """
    if not re.search(r"\.(csv|tsv)(\.gz)?$", uri):
        return read_panel(uri)
    try:
        with fsspec.open(uri, "rb", compression="infer") as file:
            content = bytes(file.read())
        separator = "," if ".csv" in uri.rsplit("/", 1)[-1] else "\t"
        table = pl.read_csv(io.BytesIO(content), separator=separator, infer_schema=False)
    except (FileNotFoundError, pl.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        message = (
            f"{uri}: not a table of marker genes ({reason}); expected a CSV or TSV with a column "
            f"named {MARKER_COLUMNS[0]}"
        )
        raise ValueError(message) from error
    by_name = {column.strip().lower(): column for column in table.columns}
    named = [by_name[name] for name in MARKER_COLUMNS if name in by_name]
    if not named and table.width == 1:
        named = table.columns
    names = [str(name).strip() for name in table[named[0]].drop_nulls()] if named else []
    unique = list(dict.fromkeys(name for name in names if name))
    if not unique:
        message = (
            f"{uri}: columns {table.columns} name no gene; expected one of "
            f"{list(MARKER_COLUMNS)} with one gene per row."
        )
        raise ValueError(message)
    return unique


def _as_json(values: NDArray[np.float64]) -> list[float | None]:
    """Return numbers for JSON: NaN and infinity become null."""
    return [float(value) if np.isfinite(value) else None for value in values]
