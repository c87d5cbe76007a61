"""Cell types from expression: the SCORES of a slide's cells, as its page shows them.

Shape letters: N cells, T types.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scellst_ray.export.colours import colours_of, rgb_of
from scellst_ray.report.cells import NUM_TYPES, OTHERS, SlideCells
from scellst_ray.report.distributions import count_values
from scellst_ray.report.galleries import MAX_TYPES, Ranking
from scellst_ray.report.maps import Squares, limits_of, mean_map
from scellst_ray.report.pictures import indexed
from scellst_ray.report.ridges import draw_ridges
from scellst_ray.report.views import Map, Row, ScoredView, Swatch, Table
from scellst_ray.report.words import describe_scores, scale_of
from scellst_ray.runs.reading import Run
from scellst_ray.runs.scores import ScoresInfo, read_scores, read_scores_info

NOT_SCORED = "not scored"
Pairs = Counter[tuple[str, str]]


@dataclass(frozen=True)
class Scored:
    """The scores of a slide's cells.

    Attributes:
        types: The types, the one that is best in most cells first.
        best_N: Number of the best type of each cell, int64 [N]; -1: the cell has no scores.
        scores_NT: Scores, float32 [N, T]; NaN: the cell has none.
        about: How they were computed, in words.
    """

    types: list[str]
    best_N: NDArray[np.int64]
    scores_NT: NDArray[np.float32]
    about: str


def read_scored(
    run: Run, slide_id: str, cells: SlideCells, info: ScoresInfo | None
) -> Scored | None:
    """Return the scores of a slide's cells; None if the run has none of this slide.

    Args:
        run: The run.
        slide_id: The slide.
        cells: Its cells.
        info: Content of `scores.json`, if it was read before.

    Raises:
        ValueError: they are damaged, or not those of the slide's cells.
        FileNotFoundError: the table is absent.
    """
    info = read_scores_info(run.uri) if info is None else info
    table = None if info is None else read_scores(run, slide_id, None, info)
    if info is None or table is None:
        return None
    if not np.array_equal(table["cell_id"].to_numpy(), cells.cell_id_N):
        message = f"SCORES of slide {slide_id!r} hold other cells; run `scellst-ray annotate` again"
        raise ValueError(message)
    best = table["best_type"].to_pylist()
    counts = Counter(best)
    chosen = sorted(info["types"], key=lambda each: -counts[each["name"]])
    place = {each["name"]: number for number, each in enumerate(chosen)}
    best_N = np.array([place.get(name, -1) for name in best], np.int64)
    scores = [table[each["column"]].to_numpy().astype(np.float32) for each in chosen]
    return Scored(list(place), best_N, np.column_stack(scores), describe_scores(info))


def rank_scores(scored: Scored) -> list[Ranking]:
    """Return the ranking of cells by the score of each of the commonest types."""
    return [
        Ranking(
            f"score of {name}",
            (f"highest scores of {name}", f"lowest scores of {name}"),
            scored.scores_NT[:, number],
        )
        for number, name in enumerate(scored.types[:MAX_TYPES])
    ]


def pairs_of(cells: SlideCells, scored: Scored) -> Pairs:
    """Return the number of cells by nucleus type and best type."""
    names = [*scored.types, NOT_SCORED]
    # Numbers of -1 stand for the last name.
    both = np.column_stack([cells.codes_N, scored.best_N % len(names)])
    unique, counts = np.unique(both, axis=0, return_counts=True)
    return Counter(
        {
            (cells.types[code], names[best]): count
            for (code, best), count in zip(unique.tolist(), counts.tolist(), strict=True)
        }
    )


def agreement_table(pairs: Mapping[tuple[str, str], int]) -> Table:
    """Return how many cells of each nucleus type have which best type."""
    nuclei, best = (Counter[str](), Counter[str]())
    for (nucleus, name), count in pairs.items():
        nuclei[nucleus] += count
        best[name] += count
    rows_of = sorted(nuclei, key=lambda name: (name == OTHERS, -nuclei[name], name))
    columns = sorted(best, key=lambda name: (name == NOT_SCORED, -best[name], name))
    shown, rest = columns[:NUM_TYPES], columns[NUM_TYPES:]
    rows = []
    for name in [*rows_of, "all cells"]:
        total = nuclei.total() if name == "all cells" else nuclei[name]
        counts = [
            best[column] if name == "all cells" else pairs.get((name, column), 0)
            for column in columns
        ]
        counts = [*counts[: len(shown)], *([sum(counts[len(shown) :])] if rest else [])]
        cells = [f"{count:,} ({100 * count / total:.0f} %)" for count in counts]
        rows.append([name, f"{total:,}", *cells])
    others = [f"{len(rest)} others"] if rest else []
    strength = _cramers_v(pairs)
    about = (
        "Cells of each nucleus type by the type of highest score. Cramer's V: "
        f"{'not known' if strength is None else f'{strength:.2f}'} (0: the two say nothing about "
        "each other; 1: one follows from the other)."
    )
    return Table(["nucleus type", "cells", *shown, *others], rows, about)


def _cramers_v(pairs: Mapping[tuple[str, str], int]) -> float | None:
    """Return Cramer's V of scored cells; None where one of both types does not vary."""
    known = {pair: count for pair, count in pairs.items() if pair[1] != NOT_SCORED}
    nuclei, best = ({pair[side] for pair in known} for side in (0, 1))
    smaller = min(len(nuclei), len(best)) - 1
    if smaller < 1:
        return None
    table = np.array([[known.get((a, b), 0) for b in sorted(best)] for a in sorted(nuclei)], float)
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    chi2 = float((np.square(table - expected) / expected).sum())
    return float(np.sqrt(chi2 / table.sum() / smaller))


def view_scored(
    slide_id: str,
    cells: SlideCells,
    squares: Squares,
    scored: Scored,
    genes: tuple[str, ...],
    bar: tuple[float, str] | None,
) -> ScoredView:
    """Return maps, counts and agreement of the types of a slide's cells.

    Args:
        slide_id: The slide.
        cells: Its cells, with the expression of the genes.
        squares: Squares over the slide.
        scored: Their scores.
        genes: The genes.
        bar: Scale bar.
    """
    shown, rest = scored.types[:NUM_TYPES], scored.types[NUM_TYPES:]
    names = [*shown, *([OTHERS] if rest else [])]
    best_N = np.minimum(scored.best_N, len(names) - 1)
    colours = colours_of(names)
    counts = np.bincount(best_N[best_N >= 0], minlength=len(names)).tolist()
    total = max(1, sum(counts))
    swatches = [
        Swatch(name, colours[name], count, 100 * count / total)
        for name, count in zip(names, counts, strict=True)
    ]
    alt = f"map of the best of {len(scored.types)} types on slide {slide_id}"
    codes_RC = squares.commonest(best_N, len(names))
    palette = [rgb_of(colours[name]) for name in names]
    title = "commonest best type in each square"
    whole = Map(indexed(squares.drawn(codes_RC), alt, palette), title, bar=bar)
    maps = []
    for number, name in enumerate(shown):
        means_RC = squares.means(scored.scores_NT[:, number])
        limits = limits_of(means_RC)
        picture = mean_map(squares, means_RC, limits, f"map of the score of {name} on {slide_id}")
        maps.append(Map(picture, name, scale_of(limits, "score")))
    found = count_values(genes, cells.values_NG, names, best_N)
    return ScoredView(
        types=swatches,
        overview=Row("Best types", [whole]),
        scores=Row("Scores", maps, "Mean of the cells of each square."),
        agreement=agreement_table(pairs_of(cells, scored)),
        ridges=draw_ridges(found, colours),
        not_shown=rest,
        about=scored.about,
    )
