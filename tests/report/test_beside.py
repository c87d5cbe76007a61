"""What two runs say of a slide: counts, means, and how alike maps and profiles are."""

from dataclasses import replace

import numpy as np
import pytest

from scellst_ray.report.beside import MIN_CELLS, SQUARE_UM, compare, pearson, read_side
from scellst_ray.report.scored import NOT_SCORED
from tests.support.exported_runs import GENES, make_run
from tests.support.paired_runs import make_other_run
from tests.support.scored_runs import random_scores, write_scores

TYPES = ["T cell", "tumour"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beside")
    return make_run(folder, head=True), make_other_run(folder, {"a": 400, "b": 35})


def compared(one, other, slide_id="a", genes=GENES):
    sides = [read_side(run, slide_id, genes) for run in (one, other)]
    return compare(slide_id, *sides, genes)


def test_counts_and_means(runs):
    one, other = runs
    found = compared(one, other)
    assert found.num_cells == (30, 400)
    for name, pair in found.types.items():
        names = [run.cells("a")["nucleus_type"].to_pylist() for run in runs]
        assert pair == tuple(each.count(name) for each in names)
    for gene in GENES:
        means = [run.expression_numpy([gene], "a").mean(dtype=float) for run in runs]
        assert found.genes[gene].means == pytest.approx(tuple(means), rel=1e-6)
    assert found.best == {}
    assert set(found.profiles) == set(found.types)


@pytest.mark.parametrize(("shift", "factor", "r"), [(0, 1, 1), (5, 2, 1), (9, -1, -1)])
def test_maps_that_are_alike(runs, shift, factor, r):
    _, other = runs
    side = read_side(other, "a", GENES)
    changed = replace(side.cells, values_NG=side.cells.values_NG * factor + shift)
    found = compare("a", side, replace(side, cells=changed), GENES)
    for pair in found.genes.values():
        assert pair.r == pytest.approx(r, abs=1e-5)
    assert [r for r in found.profiles.values() if r is not None] == pytest.approx([1, 1, 1])


def test_r_is_over_squares_that_both_fill(runs):
    sides = [read_side(run, "a", GENES) for run in runs]
    found = compare("a", *sides, GENES)
    step = SQUARE_UM / 0.5
    squares = []
    for side in sides:
        rows = {}
        places = (side.cells.xy0_N2 // step).astype(int).tolist()
        for place, value in zip(places, side.cells.values_NG[:, 1].tolist(), strict=True):
            rows.setdefault(tuple(place), []).append(value)
        squares.append({p: np.mean(v) for p, v in rows.items() if len(v) >= MIN_CELLS})
    both = sorted(set(squares[0]) & set(squares[1]))
    assert len(both) >= 3
    expected = np.corrcoef([[each[place] for place in both] for each in squares])[0, 1]
    assert found.genes[GENES[1]].r == pytest.approx(expected, abs=1e-5)


def test_scores(tmp_path):
    one, other = make_run(tmp_path, head=True), make_other_run(tmp_path, {"a": 90})
    first, second = random_scores(one, TYPES), random_scores(other, [*TYPES, "B cell"])
    first["a"]["T cell"][:2] = np.nan
    found = compared(write_scores(one, first), write_scores(other, second))
    assert sum(pair[0] for pair in found.best.values()) == 30
    assert sum(pair[1] for pair in found.best.values()) == 90
    assert found.best[NOT_SCORED] == (2, 0)
    assert found.best["B cell"][0] == 0
    assert set(found.scores) == set(TYPES)
    assert found.scores["tumour"].means[1] == pytest.approx(second["a"]["tumour"].mean(), rel=1e-5)


def test_slides_of_other_sizes_are_other_files(runs):
    one, other = runs
    other.records["b"]["width0"] += 1
    with pytest.raises(ValueError, match=r"slide 'b' has another size in .*other"):
        compared(one, other, "b")
    other.records["b"].pop("width0")
    assert compared(one, other, "b").num_cells == (40, 35)


def test_without_expression_or_profiles(runs, tmp_path):
    extracted = make_other_run(tmp_path, {"a": 20}, genes=None)
    found = compared(runs[0], extracted, genes=[])
    assert found.num_cells == (30, 20)
    assert (found.genes, found.profiles) == ({}, {})


def test_pearson_that_is_not_known():
    values = np.arange(5.0)
    assert pearson(values, 2 * values) == pytest.approx(1)
    assert pearson(values, np.ones(5)) is None
    assert pearson(values[:2], values[:2]) is None
    assert pearson(np.array([0, 1, 2, np.nan, 3]), 3 * values) == pytest.approx(0.983, abs=1e-3)
    assert pearson(np.full(5, np.nan), values) is None
