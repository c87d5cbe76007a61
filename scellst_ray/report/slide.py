"""The page of one slide: what a run holds of it, as pictures and words. No slide is read.

Shape letters: N cells, G genes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scellst_ray.core.text import one_line
from scellst_ray.export.colours import colours_of, rgb_of
from scellst_ray.report.beside import Side
from scellst_ray.report.beside_page import view_beside
from scellst_ray.report.cells import SlideCells, read_cells
from scellst_ray.report.distributions import count_values
from scellst_ray.report.evaluation import slide_tables
from scellst_ray.report.galleries import (
    galleries_of,
    probabilities_of,
    rank_genes,
    rank_types,
)
from scellst_ray.report.maps import MAP_PX, Squares, limits_of, mean_map, squares_over
from scellst_ray.report.near import WINDOW_UM, Window, draw_outlines, highest_place, read_outlines
from scellst_ray.report.pictures import indexed, levels, photograph
from scellst_ray.report.ridges import draw_ridges
from scellst_ray.report.scored import pairs_of, rank_scores, read_scored, view_scored
from scellst_ray.report.spots import spot_rows
from scellst_ray.report.views import Map, Row, SlideView, Swatch, Table
from scellst_ray.report.words import (
    as_text,
    describe_shift,
    scale_bar,
    scale_of,
    slide_facts,
    unit_of,
    versions_of,
)
from scellst_ray.runs.reading import Run
from scellst_ray.runs.scores import ScoresInfo
from scellst_ray.runs.thumbnails import read_thumbnail
from scellst_ray.storage.credentials import redact

# Longer sides of the slide's picture: in the cohort, beside a gene, and at the head of the page.
TINY_PX, SMALL_PX, SLIDE_PX = 72, MAP_PX, 700
NEAR_BAR = (100 * 50 / WINDOW_UM, "50 um")


@dataclass(frozen=True)
class Asked:
    """What a report shall show.

    Attributes:
        genes: The genes.
        spots_rows: Rows of the manifest that name spots, by slide_id.
        evaluation: Content of the file of `evaluate expression`; None without one.
        scores: Content of the run's `scores.json`; None without one.
        beside: Another run of the slides, to be shown beside this one.
    """

    genes: tuple[str, ...] = ()
    spots_rows: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    scores: ScoresInfo | None = None
    beside: Run | None = None


def view_slide(run: Run, slide_id: str, asked: Asked) -> SlideView:
    """Return what the page of a slide shows.

    A part that cannot be read becomes a line in `problems`, and costs the others nothing.
    """
    record = run.records[slide_id]
    view = SlideView(slide_id, facts=slide_facts(run, record), versions=versions_of(run, record))
    view.shift, view.is_beyond = describe_shift(record)
    bar = scale_bar(record)
    with noting(view, "picture of the slide"):
        _show_slide(run, view, bar)
    cells = None
    with noting(view, "cells"):
        cells = read_cells(run, slide_id)
    if cells is None or not len(cells.cell_id_N):
        return view
    squares = squares_over(cells.xy0_N2, cells.size0)
    _show_types(view, cells, squares, bar)
    if asked.genes:
        view.unit = unit_of(run)
        with noting(view, "expression"):
            values_NG = run.expression_numpy(asked.genes, slide_id)
            cells = replace(cells, values_NG=values_NG)
    shown = asked.genes if cells.values_NG.shape[1] else ()
    _show_means(view, cells, shown)
    _show_genes(run, view, cells, squares, shown, bar)
    if not shown:
        with noting(view, "outlines"):
            view.overview.append(_types_from_near(run, slide_id, cells, squares, view.types))
    scored = None
    with noting(view, "scores"):
        scored = read_scored(run, slide_id, cells, asked.scores)
    if scored is not None:
        view.scored = view_scored(slide_id, cells, squares, scored, shown, bar)
        view.pairs = pairs_of(cells, scored)
    if asked.beside is not None:
        with noting(view, "the other run"):
            side = Side(run, cells, scored)
            view.beside, view.compared = view_beside(side, asked.beside, slide_id, shown)
    if shown and slide_id in asked.spots_rows:
        with noting(view, "spots"):
            unit = unit_of(run, short=True)
            view.spots = spot_rows(cells, squares, list(shown), asked.spots_rows[slide_id], unit)
    with noting(view, "crops"):
        rankings = rank_genes(cells, list(shown))
        if scored is None:
            rankings += rank_types(cells, probabilities_of(run, slide_id))
        else:
            rankings += rank_scores(scored)
        view.galleries = galleries_of(run, slide_id, cells, rankings, view.notes)
    view.accuracy = slide_tables(asked.evaluation, slide_id, list(shown))
    return view


@contextmanager
def noting(view: SlideView, what: str) -> Iterator[None]:
    """Note what keeps a part of the page from being shown."""
    try:
        yield
    except (ValueError, OSError, pa.ArrowException) as error:
        view.problems.append(f"{what}: {one_line(redact(str(error)))}")


def _show_slide(run: Run, view: SlideView, bar: tuple[float, str] | None) -> None:
    thumbnail = read_thumbnail(run.folder, run.records[view.slide_id])
    if thumbnail is None:
        view.notes.append(
            "The run keeps no picture of this slide: an earlier release began it. To get one, "
            "predict into a new folder."
        )
        return
    picture = photograph(thumbnail.image, f"H&E of slide {view.slide_id}", SLIDE_PX)
    view.tiny = photograph(thumbnail.image, f"slide {view.slide_id}", TINY_PX)
    view.small = photograph(thumbnail.image, f"H&E of slide {view.slide_id}", SMALL_PX)
    view.overview.append(Map(picture, "H&E", bar=bar))


def _show_types(
    view: SlideView, cells: SlideCells, squares: Squares, bar: tuple[float, str] | None
) -> None:
    colours = colours_of(cells.types)
    counts = np.bincount(cells.codes_N, minlength=len(cells.types)).tolist()
    total = sum(counts)
    view.types = [
        Swatch(name, colours[name], count, 100 * count / total)
        for name, count in zip(cells.types, counts, strict=True)
    ]
    alt = f"map of {len(cells.types)} nucleus types on slide {view.slide_id}"
    codes_RC = squares.commonest(cells.codes_N, len(cells.types))
    palette = [rgb_of(colours[name]) for name in cells.types]
    picture = indexed(squares.drawn(codes_RC), alt, palette)
    view.overview.append(Map(picture, "Nuclei: commonest type in each square", bar=bar))


def _show_means(view: SlideView, cells: SlideCells, genes: tuple[str, ...]) -> None:
    """Show mean and distribution of each gene, in the cells of each type."""
    if not genes:
        return
    known_N = np.isfinite(cells.values_NG).all(axis=1)
    if not known_N.all():
        count = int((~known_N).sum())
        view.notes.append(
            f"Cells whose expression is not finite, and counts in no mean: {count:,}."
        )
    values_NG, codes_N = cells.values_NG[known_N], cells.codes_N[known_N]
    means_G = _mean(values_NG)
    view.means = dict(zip(genes, means_G.tolist(), strict=True))
    rows = [["all cells", *map(as_text, means_G.tolist())]]
    for code, name in enumerate(cells.types):
        rows.append([name, *map(as_text, _mean(values_NG[codes_N == code]).tolist())])
    view.by_type = Table(["nucleus type", *genes], rows, "Mean of the cells of each type.")
    view.distributions = count_values(genes, cells.values_NG, cells.types, cells.codes_N)
    view.ridges = draw_ridges(view.distributions, {t.name: t.colour for t in view.types})


def _mean(values_NG: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean of each gene, [G]; NaN without cells."""
    if not len(values_NG):
        return np.full(values_NG.shape[1], np.nan)
    return np.asarray(values_NG.mean(axis=0, dtype=np.float64))


def _show_genes(
    run: Run,
    view: SlideView,
    cells: SlideCells,
    squares: Squares,
    genes: tuple[str, ...],
    bar: tuple[float, str] | None,
) -> None:
    """Show each gene: means over the slide, and outlines where it is highest."""
    windows = [
        highest_place(cells.xy0_N2, np.nan_to_num(cells.values_NG[:, number]), cells.mpp)
        for number in range(len(genes))
    ]
    rows = [window.holds(cells.xy0_N2) for window in windows]
    outlines: dict[int, NDArray[np.float64]] = {}
    with noting(view, "outlines"):
        every = np.unique(np.concatenate([np.zeros(0, np.int64), *rows]))
        outlines = dict(zip(every.tolist(), read_outlines(run, view.slide_id, every), strict=True))
    for number, (gene, window, rows_N) in enumerate(zip(genes, windows, rows, strict=True)):
        values_N = cells.values_NG[:, number]
        finite = values_N[np.isfinite(values_N)]
        low, high = np.quantile(finite, (0.05, 0.95)).tolist() if len(finite) else (np.nan,) * 2
        about = (
            f"mean {as_text(view.means[gene])}; nine of ten cells from {as_text(low)} to "
            f"{as_text(high)}"
        )
        unit = unit_of(run, short=True)
        whole = _whole_map(view.slide_id, squares, (gene, values_N), unit)
        maps = [replace(whole, bar=bar, window=_marked(window, cells.size0))]
        if outlines:
            limits = limits_of(values_N)
            alt = f"outlines of {len(rows_N)} cells, coloured by predicted {gene}"
            near = [outlines[row] for row in rows_N.tolist()]
            picture = draw_outlines(near, levels(values_N[rows_N], *limits), window, alt)
            title = "each cell, where the mean is highest"
            maps.append(Map(picture, title, scale_of(limits, unit), NEAR_BAR))
        view.genes.append(Row(gene, maps, about))


def _whole_map(
    slide_id: str, squares: Squares, gene: tuple[str, NDArray[np.float32]], unit: str
) -> Map:
    name, values_N = gene
    means_RC = squares.means(values_N)
    limits = limits_of(means_RC)
    alt = f"map of predicted {name} on slide {slide_id}"
    picture = mean_map(squares, means_RC, limits, alt)
    return Map(picture, "mean of the cells of each square", scale_of(limits, unit))


def _types_from_near(
    run: Run, slide_id: str, cells: SlideCells, squares: Squares, types: list[Swatch]
) -> Map:
    """Return outlines coloured by type, where cells are densest."""
    counts_N = np.bincount(squares.of_cell_N)[squares.of_cell_N].astype(float)
    window = highest_place(cells.xy0_N2, counts_N, cells.mpp)
    rows_N = window.holds(cells.xy0_N2)
    outlines = read_outlines(run, slide_id, rows_N)
    alt = f"outlines of {len(rows_N)} cells, coloured by type, on slide {slide_id}"
    palette = [rgb_of(swatch.colour) for swatch in types]
    colours_N = cells.codes_N[rows_N].astype(np.uint8)
    picture = draw_outlines(outlines, colours_N, window, alt, palette)
    return Map(picture, "Outlines, where cells are densest", bar=NEAR_BAR)


def _marked(window: Window, size0: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return a window as percent of the slide's width and height."""
    width0, height0 = size0
    sides = (window.x0 / width0, window.y0 / height0, window.side0 / width0, window.side0 / height0)
    x, y, w, h = (100 * side for side in sides)
    return x, y, min(w, 100 - x), min(h, 100 - y)
