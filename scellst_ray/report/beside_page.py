"""Two runs side by side, as the pages of a slide and of a cohort show them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from scellst_ray.report.beside import Side, compare, read_side
from scellst_ray.report.beside_tables import HERE, THERE, cohort_beside, slide_beside
from scellst_ray.report.compared import SlideBeside
from scellst_ray.report.maps import limits_of, mean_map, squares_over
from scellst_ray.report.views import BesideView, Map, Row
from scellst_ray.report.words import as_text, names_in_short, scale_of, unit_of
from scellst_ray.runs.reading import Run
from scellst_ray.storage.credentials import redact


def run_name(run: Run) -> str:
    """Return the name of a run's folder."""
    return redact(run.uri).rstrip("/").rsplit("/", 1)[-1]


def view_beside(
    one: Side, other: Run, slide_id: str, genes: Sequence[str]
) -> tuple[BesideView, SlideBeside | None]:
    """Return a slide in two runs: what its page shows, and what both say of it.

    Args:
        one: The slide in the run, with the expression of the genes.
        other: The other run.
        slide_id: The slide.
        genes: The genes.

    Raises:
        ValueError: a table of the other run cannot be used, or the slide is another one there.
        OSError: a table cannot be read.
    """
    view = BesideView(run_name(other), [])
    lacking = _why_not(other, slide_id)
    if lacking:
        view.notes.append(f"Nothing to compare: {lacking}.")
        return view, None
    shared = [gene for gene in genes if other.has_expression and gene in other.genes]
    absent = [gene for gene in genes if gene not in shared]
    if absent:
        view.notes.append(f"The other run lacks {', '.join(absent)}.")
    there = read_side(other, slide_id, shared)
    columns = [list(genes).index(gene) for gene in shared]
    here = replace(one, cells=replace(one.cells, values_NG=one.cells.values_NG[:, columns]))
    found = compare(slide_id, here, there, shared)
    if (here.scored is None) != (there.scored is None):
        which = f"the {THERE}" if there.scored is None else HERE
        view.notes.append(f"Best types are not compared: {which} has no scores of the slide.")
    view.tables.extend(slide_beside(found))
    view.maps.extend(_maps(here, there, shared, found))
    return view, found


def _why_not(other: Run, slide_id: str) -> str:
    """Return why a run has no cells of a slide; empty if it has."""
    record = other.records.get(slide_id)
    if record is None:
        return "the other run has not this slide, or has not finished it"
    if record["status"] == "failed":
        return "the slide failed in the other run"
    return "" if record["num_cells"] else "the other run found no cells on this slide"


def _maps(here: Side, there: Side, genes: Sequence[str], found: SlideBeside) -> list[Row]:
    """Return maps of each gene in both runs, each with its own scale."""
    sides = ((HERE, here), (f"the {THERE}", there))
    squares = [squares_over(side.cells.xy0_N2, side.cells.size0) for _, side in sides]
    rows = []
    for number, gene in enumerate(genes):
        maps = []
        for (name, side), over in zip(sides, squares, strict=True):
            means_RC = over.means(side.cells.values_NG[:, number])
            limits = limits_of(means_RC)
            picture = mean_map(over, means_RC, limits, f"{gene} in {name}")
            unit = unit_of(side.run, short=True)
            maps.append(Map(picture, name, scale_of(limits, unit)))
        rows.append(Row(gene, maps, f"Pearson r over squares: {as_text(found.genes[gene].r)}"))
    return rows


def view_cohort_beside(
    run: Run, other: Run, slide_ids: Sequence[str], found: Mapping[str, SlideBeside]
) -> BesideView:
    """Return two runs side by side, over the slides that both have.

    Args:
        run: The run.
        other: The other run.
        slide_ids: The slides of the report.
        found: What both say, by slide_id.
    """
    notes = []
    with_cells = [s for s in slide_ids if s in run.records and run.records[s]["num_cells"]]
    lacking = [f"{s} ({why})" for s in with_cells if (why := _why_not(other, s))]
    if lacking:
        notes.append(f"Slides of this run alone: {names_in_short(lacking)}.")
    foreign = [s for s in sorted(other.records) if s not in run.records]
    if foreign:
        notes.append(f"Slides of the other run alone: {names_in_short(foreign)}.")
    notes += _panels(run, other)
    tables = cohort_beside(found) if found else []
    if not found:
        notes.append("No slide has cells in both runs.")
    return BesideView(run_name(other), notes, tables)


def _panels(run: Run, other: Run) -> list[str]:
    """Return which genes only one run has, in sentences."""
    panels = [each.genes if each.has_expression else [] for each in (run, other)]
    notes = []
    for name, mine, theirs in ((HERE, *panels), (f"the {THERE}", *panels[::-1])):
        alone = np.setdiff1d(mine, theirs).tolist()
        if not mine:
            notes.append(f"No expression: {name}.")
        elif alone:
            count = f"{len(alone):,} of its {len(mine):,}"
            notes.append(f"Genes of {name} alone, {count}: {names_in_short(alone)}.")
    return notes
