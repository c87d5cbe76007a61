"""Two runs side by side, as tables: one slide, and all slides that both have."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from scellst_ray.report.compared import Counts, PairOfMeans, SlideBeside
from scellst_ray.report.views import Table
from scellst_ray.report.words import as_text

HERE, THERE = "this run", "other run"
OF_MAPS = "Pearson's r over squares of 100 um with at least 3 cells in both runs"


def slide_beside(found: SlideBeside) -> list[Table]:
    """Return what two runs say of a slide."""
    a, b = found.num_cells
    tables = [Table(["", HERE, THERE], [["cells", f"{a:,}", f"{b:,}"]])]
    tables.append(_shares("nucleus type", found.types))
    if any(r is not None for r in found.profiles.values()):
        rows = [[name, as_text(r)] for name, r in found.profiles.items()]
        about = (
            "Profiles of nucleus types: Pearson's r over the genes of both runs between how the "
            "mean of a type differs from that of all cells."
        )
        tables.append(Table(["nucleus type", "r"], rows, about))
    if found.genes:
        about = f"Genes: mean over cells, and {OF_MAPS}."
        tables.append(Table(["gene", HERE, THERE, "r"], _means(found.genes), about))
    if found.best:
        tables.append(_shares("best type", found.best))
        about = f"Scores: mean over cells, and {OF_MAPS}."
        tables.append(Table(["score of", HERE, THERE, "r"], _means(found.scores), about))
    return tables


def cohort_beside(slides: Mapping[str, SlideBeside]) -> list[Table]:
    """Return what two runs say of the slides that both have, by slide_id."""
    found = list(slides.values())
    genes = _names([each.genes for each in found])
    names = [_mean_r(each.genes.values()) for each in found]
    rows = []
    for (slide_id, each), over_genes in zip(slides.items(), names, strict=True):
        a, b = each.num_cells
        profiles = [r for r in each.profiles.values() if r is not None]
        over_types = as_text(float(np.mean(profiles))) if profiles else "-"
        more = [_mean_r(each.scores.values())] if any(each.best for each in found) else []
        ratio = as_text(b / a) if a else "-"
        rows.append([slide_id, f"{a:,}", f"{b:,}", ratio, over_genes, over_types, *more])
    headings = ["slide", f"cells, {HERE}", f"cells, {THERE}", "ratio", "r of genes", "r of types"]
    if any(each.best for each in found):
        headings.append("r of scores")
    about = (
        f"Slides. r of genes and of scores: {OF_MAPS}, mean over the shown genes and over types. "
        "r of types: Pearson's r over genes between how the mean of a nucleus type differs from "
        "that of all cells, mean over types."
    )
    tables = [Table(headings, rows, about)]
    tables.append(_shares("nucleus type", _sums([each.types for each in found])))
    if genes:
        about = "Genes: mean over all cells, and median over slides of r."
        pooled = {gene: _pooled(found, gene) for gene in genes}
        tables.append(Table(["gene", HERE, THERE, "r"], _means(pooled), about))
    if best := _sums([each.best for each in found]):
        tables.append(_shares("best type", best))
    return tables


def _shares(what: str, counts: Mapping[str, Counts]) -> Table:
    """Return the number and share of cells of each type in both runs."""
    totals = [sum(pair[side] for pair in counts.values()) for side in (0, 1)]
    rows = [
        [
            name,
            *(
                f"{count:,} ({100 * count / max(1, total):.1f} %)" if count else "-"
                for count, total in zip(pair, totals, strict=True)
            ),
        ]
        for name, pair in counts.items()
    ]
    return Table([what, HERE, THERE], rows)


def _means(pairs: Mapping[str, PairOfMeans]) -> list[list[str]]:
    """Return rows of means and r. Scaled scores have a mean of 0, but for rounding."""
    return [
        [name, *(as_text(round(mean, 6) + 0.0) for mean in pair.means), as_text(pair.r)]
        for name, pair in pairs.items()
    ]


def _names(parts: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the keys of all parts, in the order they come in."""
    return list(dict.fromkeys(name for part in parts for name in part))


def _sums(parts: Sequence[Mapping[str, Counts]]) -> dict[str, Counts]:
    """Return the sums of counts by name, the most frequent first."""
    sums = {
        name: (
            sum(part.get(name, (0, 0))[0] for part in parts),
            sum(part.get(name, (0, 0))[1] for part in parts),
        )
        for name in _names(parts)
    }
    order = sorted(sums, key=lambda name: (-sum(sums[name]), name))
    return {name: sums[name] for name in order}


def _pooled(slides: Sequence[SlideBeside], gene: str) -> PairOfMeans:
    """Return the means of a gene over the cells of all slides, and the median of r."""
    having = [each for each in slides if gene in each.genes]
    one, other = (_pooled_mean(having, gene, side) for side in (0, 1))
    known = [r for each in having if (r := each.genes[gene].r) is not None]
    return PairOfMeans((one, other), float(np.median(known)) if known else None)


def _pooled_mean(slides: Sequence[SlideBeside], gene: str, side: int) -> float:
    """Return the mean of a gene over the cells of the slides where it is known; else NaN."""
    found = [(each.genes[gene].means[side], each.num_cells[side]) for each in slides]
    known = [(mean, count) for mean, count in found if math.isfinite(mean)]
    total = sum(count for _, count in known)
    return sum(mean * count for mean, count in known) / total if total else math.nan


def _mean_r(pairs: Iterable[PairOfMeans]) -> str:
    """Return the mean of r where it is known, as text."""
    known = [pair.r for pair in pairs if pair.r is not None]
    return as_text(float(np.mean(known))) if known else "-"
