"""A slide in two runs: what both say of it, such as after other segmenters.

Shape letters: N cells, G genes, Q squares of a grid.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scellst_ray.report.cells import SlideCells, read_cells
from scellst_ray.report.compared import Counts, PairOfMeans, SlideBeside
from scellst_ray.report.scored import NOT_SCORED, Scored, read_scored
from scellst_ray.runs.reading import Run

# Side of a square, and the cells that both runs must have in it.
SQUARE_UM, MIN_CELLS = 100.0, 3


@dataclass(frozen=True)
class Side:
    """What one run holds of a slide.

    Attributes:
        run: The run.
        cells: Its cells, with the expression of the genes.
        scored: Their scores; None without.
    """

    run: Run
    cells: SlideCells
    scored: Scored | None


def read_side(run: Run, slide_id: str, genes: Sequence[str]) -> Side:
    """Read what a run holds of a slide, with the expression of some genes.

    Raises:
        ValueError: a table cannot be used.
        OSError: a table cannot be read.
    """
    cells = read_cells(run, slide_id)
    if genes:
        values_NG = run.expression_numpy(genes, slide_id)
        cells = replace(cells, values_NG=values_NG)
    return Side(run, cells, read_scored(run, slide_id, cells, None))


def compare(slide_id: str, one: Side, other: Side, genes: Sequence[str]) -> SlideBeside:
    """Return what two runs say of a slide.

    Args:
        slide_id: The slide.
        one: It in the run, with the expression of the genes.
        other: It in the other run, with that of the same genes.
        genes: The genes.

    Raises:
        ValueError: the runs are of slides of other sizes.
    """
    sides = (one, other)
    sizes = {_size(side.run, slide_id) for side in sides} - {None}
    if len(sizes) > 1:
        message = f"slide {slide_id!r} has another size in {other.run.uri}: it is another file"
        raise ValueError(message)
    squares = _squares(one.cells, other.cells)
    found_genes = {
        gene: _pair(squares, one.cells.values_NG[:, n], other.cells.values_NG[:, n])
        for n, gene in enumerate(genes)
    }
    types = _counts([(side.cells.types, side.cells.codes_N) for side in sides])
    best: dict[str, Counts] = {}
    scores = {}
    if one.scored is not None and other.scored is not None:
        pair = (one.scored, other.scored)
        # Numbers of -1 stand for the last name.
        best = _counts([([*scored.types, NOT_SCORED], scored.best_N) for scored in pair])
        for number, name in enumerate(one.scored.types):
            if name in other.scored.types:
                column = other.scored.scores_NT[:, other.scored.types.index(name)]
                scores[name] = _pair(squares, one.scored.scores_NT[:, number], column)
    num_cells = (len(one.cells.cell_id_N), len(other.cells.cell_id_N))
    profiles = _profiles(slide_id, one.run, other.run)
    return SlideBeside(num_cells, types, found_genes, profiles, best, scores)


def _size(run: Run, slide_id: str) -> tuple[int, int] | None:
    """Return width and height of a slide, level-0 px; None from earlier releases."""
    record = run.records[slide_id]
    width0, height0 = record.get("width0"), record.get("height0")
    return (width0, height0) if width0 and height0 else None


def _counts(parts: Sequence[tuple[Sequence[str], NDArray[np.int64]]]) -> dict[str, Counts]:
    """Return how often each name occurs in both runs, from names and numbers of names."""
    one, other = (
        Counter(dict(zip(names, np.bincount(codes_N % len(names)).tolist(), strict=False)))
        for names, codes_N in parts
    )
    order = sorted(one | other, key=lambda name: (-one[name] - other[name], name))
    return {name: (one[name], other[name]) for name in order}


Squares = tuple[NDArray[np.int64], NDArray[np.int64], int]


def _squares(one: SlideCells, other: SlideCells) -> Squares:
    """Return the number of each cell's square, of both runs, and the number of squares."""
    side0 = SQUARE_UM / one.mpp
    width = int(max(one.size0[0], other.size0[0]) / side0) + 1
    height = int(max(one.size0[1], other.size0[1]) / side0) + 1
    numbers = []
    for cells in (one, other):
        column_N, row_N = (cells.xy0_N2 / side0).astype(np.int64).clip(min=0).T
        numbers.append(row_N.clip(max=height - 1) * width + column_N.clip(max=width - 1))
    return numbers[0], numbers[1], width * height


def _pair(
    squares: Squares, one_N: NDArray[np.floating], other_N: NDArray[np.floating]
) -> PairOfMeans:
    """Return the means of a value in two runs, and Pearson's r over squares."""
    means, in_squares = [], []
    for numbers_N, values_N in ((squares[0], one_N), (squares[1], other_N)):
        known_N = np.isfinite(values_N)
        counts_Q = np.bincount(numbers_N[known_N], minlength=squares[2])
        sums_Q = np.bincount(numbers_N[known_N], values_N[known_N], squares[2])
        in_squares.append(np.where(counts_Q >= MIN_CELLS, sums_Q / np.maximum(counts_Q, 1), np.nan))
        means.append(float(values_N[known_N].mean(dtype=float)) if known_N.any() else float("nan"))
    both_Q = np.isfinite(in_squares[0]) & np.isfinite(in_squares[1])
    return PairOfMeans((means[0], means[1]), pearson(*(values[both_Q] for values in in_squares)))


def pearson(a: NDArray[np.floating], b: NDArray[np.floating]) -> float | None:
    """Return Pearson's r; None for fewer than 3 finite pairs, or where one side does not vary."""
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _profiles(slide_id: str, one: Run, other: Run) -> dict[str, float | None]:
    """Return Pearson's r between the profiles of each type of both runs; none without PROFILES."""
    found = [_means_by_type(run, slide_id) for run in (one, other)]
    if not all(found):
        return {}
    genes = [gene for gene in found[0][None] if gene in found[1][None]]
    profiles = {}
    for name in found[0]:
        if name is not None and name in found[1]:
            differences = [
                np.array([by_type[name][gene] - by_type[None][gene] for gene in genes])
                for by_type in found
            ]
            # Of a type that is all of a slide, nothing is left.
            is_whole = any(np.abs(values).max(initial=0) < 1e-6 for values in differences)
            profiles[name] = None if is_whole else pearson(*differences)
    return profiles


def _means_by_type(run: Run, slide_id: str) -> dict[str | None, Mapping[str, float]]:
    """Return the mean of each gene by type; None stands for all cells."""
    if "PROFILES" not in run.records[slide_id].get("files", {}):
        return {}
    frame = run.profiles([slide_id])
    found: dict[str | None, dict[str, float]] = {}
    for name, gene, mean in frame.select("nucleus_type", "gene", "mean").iter_rows():
        found.setdefault(name, {})[gene] = mean
    return dict(found)
