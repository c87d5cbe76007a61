"""The page of a cohort: all slides of a run, those without results with the reason."""

import math
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from scellst_ray.export.colours import colours_of
from scellst_ray.report.beside_page import run_name, view_cohort_beside
from scellst_ray.report.compared import SlideBeside
from scellst_ray.report.differential import differential_table
from scellst_ray.report.distributions import Distributions, add_up
from scellst_ray.report.evaluation import cohort_tables
from scellst_ray.report.pictures import Picture
from scellst_ray.report.render import page_link
from scellst_ray.report.ridges import draw_ridges
from scellst_ray.report.scored import Pairs, agreement_table
from scellst_ray.report.views import (
    BesideView,
    CohortView,
    Ridges,
    SlideLine,
    SlideView,
    Swatch,
    Table,
)
from scellst_ray.report.words import as_text, describe_scores, names_in_short, unit_of, versions_of
from scellst_ray.runs.domain_shift import domain_warnings
from scellst_ray.runs.reading import Run
from scellst_ray.runs.records import SlideRecord
from scellst_ray.runs.scores import ScoresInfo
from scellst_ray.runs.summary import why_empty
from scellst_ray.storage.credentials import redact

# Above this number of slides the page has no small pictures: it would be too large.
MAX_PICTURES = 500


@dataclass(frozen=True)
class SlideOutline:
    """What the page of a cohort needs of a slide.

    Attributes:
        tiny: The slide; None without a thumbnail.
        types: The nucleus types.
        means: Mean expression of each shown gene.
        problems: What could not be read.
        distributions: Distributions of the shown genes; None without them.
        pairs: Number of cells by nucleus type and best type.
        compared: What this run and another one say of the slide; None if that is not known.
    """

    tiny: Picture | None = None
    types: list[Swatch] = field(default_factory=list)
    means: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    distributions: Distributions | None = None
    pairs: dict[tuple[str, str], int] = field(default_factory=dict)
    compared: SlideBeside | None = None


def outline_of(view: SlideView) -> SlideOutline:
    """Return what the page of a cohort needs of a slide's page."""
    return SlideOutline(**{each.name: getattr(view, each.name) for each in fields(SlideOutline)})


def has_page(record: SlideRecord) -> bool:
    """Return whether a slide has cells to show."""
    return record["status"] in ("done", "partial") and bool(record["num_cells"])


def view_cohort(
    run: Run,
    slide_ids: list[str],
    outlines: dict[str, SlideOutline],
    genes: tuple[list[str], str],
    evaluation: dict[str, Any] | None,
    scores: ScoresInfo | None = None,
    beside: Run | None = None,
) -> CohortView:
    """Return what the page of a cohort shows.

    Args:
        run: The run.
        slide_ids: The slides to list.
        outlines: Those of the slides that have a page.
        genes: The shown genes, and how they were chosen.
        evaluation: Content of the file of `evaluate expression`; None without one.
        scores: Content of the run's `scores.json`; None without one.
        beside: Another run of the slides; None without one.
    """
    records = {s: run.records[s] for s in slide_ids if s in run.records}
    scale = _ranges(outlines, genes[0])
    is_imported = run.info.get("identity", {}).get("segmenter") == "imported"
    lines = [_line(s, records.get(s), outlines.get(s), scale) for s in slide_ids]
    if len(lines) > MAX_PICTURES:
        lines = [SlideLine(**{**vars(line), "tiny": None}) for line in lines]
    empty = [
        (s, why_empty(r["num_tiles"], is_imported=is_imported))
        for s, r in records.items()
        if r["status"] == "empty"
    ]
    failed = [
        (s, _why_failed(r)) for s, r in records.items() if r["status"] in ("failed", "partial")
    ]
    notes = []
    if outlines and not any(outline.tiny for outline in outlines.values()):
        notes.append("The run keeps no pictures of its slides: an earlier release began it.")
    differential, problem = differential_table(run, scores)
    notes += [problem] if problem else []
    return CohortView(
        name=run_name(run),
        facts=_facts(run, slide_ids, records),
        genes=genes[0],
        how_chosen=genes[1],
        unit=unit_of(run) if genes[0] else "",
        lines=lines,
        empty=empty,
        failed=failed,
        shifts=_shifts(records),
        accuracy=cohort_tables(evaluation),
        notes=notes,
        versions=[*versions_of(run), *_releases(records)],
        ridges=_ridges(outlines),
        scored=describe_scores(scores),
        differential=differential,
        agreement=_agreement(outlines),
        beside=None if beside is None else _beside(run, beside, slide_ids, outlines),
    )


def _beside(
    run: Run, other: Run, slide_ids: list[str], outlines: dict[str, SlideOutline]
) -> BesideView:
    found = {s: outlines[s].compared for s in slide_ids if s in outlines}
    known = {slide_id: each for slide_id, each in found.items() if each is not None}
    return view_cohort_beside(run, other, slide_ids, known)


def _agreement(outlines: dict[str, SlideOutline]) -> Table | None:
    """Return the cells of all slides by nucleus type and best type."""
    pairs: Pairs = Counter()
    for outline in outlines.values():
        pairs.update(outline.pairs)
    return agreement_table(pairs) if pairs else None


def _ridges(outlines: dict[str, SlideOutline]) -> list[Ridges]:
    """Return the distributions of the shown genes over the cells of all slides."""
    found = add_up([o.distributions for o in outlines.values() if o.distributions is not None])
    return draw_ridges(found, colours_of([] if found is None else found.by_type))


def _facts(
    run: Run, slide_ids: list[str], records: dict[str, SlideRecord]
) -> list[tuple[str, str]]:
    states = Counter(record["status"] for record in records.values())
    counts = [f"{states[s]:,} {s}" for s in ("done", "partial", "empty", "failed") if states[s]]
    if pending := len(slide_ids) - len(records):
        counts.append(f"{pending:,} not finished")
    cells = sum(record["num_cells"] for record in records.values())
    return [
        ("slides", f"{len(slide_ids):,}: {', '.join(counts) or 'none'}"),
        ("cells", f"{cells:,}"),
        ("expression", f"{len(run.genes):,} genes" if run.has_expression else "none (extract)"),
    ]


def _releases(records: dict[str, SlideRecord]) -> list[tuple[str, str]]:
    counts = Counter(str(record.get("scellst_ray", "unknown")) for record in records.values())
    return [(f"slides by scellst_ray {name}", f"{n:,}") for name, n in sorted(counts.items())]


def _why_failed(record: SlideRecord) -> str:
    """Return what is known of a slide's first failure."""
    reason = f"{record.get('stage')}: {record.get('error_type')}: {record.get('error')}"
    if record["status"] == "partial":
        count = f"{record['num_failed_tiles']:,} of {record['num_tiles']:,} tiles failed; the first"
        reason = f"{count}: {reason}"
    return redact(reason)


def _shifts(records: dict[str, SlideRecord]) -> list[str]:
    """Return sentences on domain shift over all slides."""
    scores = [r["domain_shift"] for r in records.values() if "domain_shift" in r]
    if not scores:
        return []
    beyond = sum(bool(shift["beyond"]) for shift in scores)
    is_known = any(shift["limit"] is not None for shift in scores)
    values = sorted(shift["score"] for shift in scores)
    first = (
        f"Domain shift: scores reach from {values[0]:.2f} to {values[-1]:.2f}; a cell like those "
        "of the training has about 1. "
    )
    first += (
        f"{beyond:,} of {len(scores):,} slides lie beyond the head's limit."
        if is_known
        else "The head states no limit, so whether a slide is far is not known."
    )
    lines = [line for line in domain_warnings(records) if line.startswith("warning: ")]
    return [first, *(line.removeprefix("warning: ") for line in lines)]


def _ranges(outlines: dict[str, SlideOutline], genes: list[str]) -> dict[str, tuple[float, float]]:
    """Return the lowest and highest mean of each gene."""
    found = {}
    for gene in genes:
        values = [o.means.get(gene, math.nan) for o in outlines.values()]
        values = [value for value in values if math.isfinite(value)]
        found[gene] = (min(values, default=0.0), max(values, default=0.0))
    return found


def _line(
    slide_id: str,
    record: SlideRecord | None,
    outline: SlideOutline | None,
    scale: dict[str, tuple[float, float]],
) -> SlideLine:
    outline = outline or SlideOutline()
    means = []
    for gene, (low, high) in scale.items():
        value = outline.means.get(gene, math.nan)
        depth = (value - low) / (high - low) if math.isfinite(value) and high > low else 0.0
        means.append((as_text(value), round(depth, 3)))
    shift = None if record is None else record.get("domain_shift")
    return SlideLine(
        slide_id=slide_id,
        status=record["status"] if record is not None else "not finished",
        href=page_link(slide_id) if record is not None and has_page(record) else "",
        num_cells=record["num_cells"] if record is not None else 0,
        shift=f"{shift['score']:.2f}" if shift else "-",
        is_beyond=bool(shift and shift["beyond"]),
        tiny=outline.tiny,
        types=outline.types,
        means=means,
        problems=outline.problems,
    )


def say_problems(outlines: dict[str, SlideOutline]) -> str | None:
    """Return a message about the slides of which something could not be read; None if all could."""
    bad = [slide_id for slide_id, outline in outlines.items() if outline.problems]
    if not bad:
        return None
    return (
        f"the pages of {len(bad)} slide(s) lack a part: {names_in_short(bad)}; the first: "
        f"{outlines[bad[0]].problems[0]}"
    )
