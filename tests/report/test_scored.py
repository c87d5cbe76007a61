"""Types from expression: which cells are which type, and how that agrees with nucleus types."""

import numpy as np
import pytest

from scellst_ray.report.cells import NUM_TYPES, OTHERS, read_cells
from scellst_ray.report.maps import squares_over
from scellst_ray.report.scored import (
    NOT_SCORED,
    agreement_table,
    pairs_of,
    rank_scores,
    read_scored,
    view_scored,
)
from scellst_ray.runs.reading import open_run
from tests.support.pages import decode
from tests.support.reported_runs import make_reported_run
from tests.support.scored_runs import random_scores, write_scores

TYPES = ["T cell", "B/plasma", "tumour <1>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_reported_run(tmp_path_factory.mktemp("scored")).uri


@pytest.fixture
def run(folder):
    return open_run(folder)


def scored_of(run, scores):
    run = write_scores(run, scores)
    cells = read_cells(run, "a")
    return cells, read_scored(run, "a", cells, None)


def test_best_types_the_commonest_first(run):
    scores = random_scores(run, TYPES)
    _, scored = scored_of(run, scores)
    table = np.column_stack([scores["a"][name] for name in TYPES])
    best = [TYPES[i] for i in table.argmax(axis=1)]
    assert [scored.types[code] for code in scored.best_N] == best
    counts = [best.count(name) for name in scored.types]
    assert counts == sorted(counts, reverse=True)
    for number, name in enumerate(scored.types):
        np.testing.assert_allclose(scored.scores_NT[:, number], scores["a"][name], rtol=1e-6)
    names = [row.name for row in rank_scores(scored)]
    assert names == [f"score of {name}" for name in scored.types]


@pytest.mark.parametrize("types", [TYPES, ["x"], [f"t{n}" for n in range(NUM_TYPES + 5)]])
def test_every_cell_counts_once(run, types):
    scores = random_scores(run, types)
    for name in types:
        scores["a"][name][:4] = np.nan
    cells, scored = scored_of(run, scores)
    pairs = pairs_of(cells, scored)
    nuclei = run.cells("a")["nucleus_type"].to_pylist()
    table = np.column_stack([scores["a"][name] for name in types])
    best = [NOT_SCORED] * 4 + [types[i] for i in table[4:].argmax(axis=1)]
    assert pairs == {pair: [*zip(nuclei, best, strict=True)].count(pair) for pair in pairs}
    assert pairs.total() == 30
    view = view_scored("a", cells, squares_over(cells.xy0_N2, cells.size0), scored, (), None)
    assert sum(swatch.count for swatch in view.types) == 26
    assert len(view.scores.maps) == min(len(types), NUM_TYPES)
    assert [swatch.name for swatch in view.types][NUM_TYPES:] == [OTHERS][: len(view.not_shown)]
    assert decode(view.overview.maps[0].picture.uri).std() > 0


@pytest.mark.parametrize(
    ("pairs", "strength"),
    [
        ({("A", "x"): 5, ("B", "y"): 9}, "1.00"),
        ({("A", "x"): 4, ("A", "y"): 4, ("B", "x"): 6, ("B", "y"): 6}, "0.00"),
        ({("A", "x"): 3, ("A", "y"): 1, ("B", "x"): 1, ("B", "y"): 3}, "0.50"),
        ({("A", "x"): 3, ("A", "y"): 1}, "not known"),
    ],
)
def test_agreement(pairs, strength):
    table = agreement_table(pairs)
    assert f"Cramer's V: {strength} " in table.about
    assert table.rows[-1][:2] == ["all cells", str(sum(pairs.values()))]


def test_agreement_in_numbers():
    table = agreement_table({("A", "x"): 3, ("A", "y"): 1, ("B", "y"): 4, ("B", NOT_SCORED): 2})
    assert table.headings == ["nucleus type", "cells", "y", "x", NOT_SCORED]
    assert table.rows == [
        ["B", "6", "4 (67 %)", "0 (0 %)", "2 (33 %)"],
        ["A", "4", "1 (25 %)", "3 (75 %)", "0 (0 %)"],
        ["all cells", "10", "5 (50 %)", "3 (30 %)", "2 (20 %)"],
    ]


def test_many_types_are_one_column():
    pairs = {("A", f"t{n}"): 100 - n for n in range(NUM_TYPES + 3)}
    table = agreement_table(pairs)
    assert table.headings[-1] == "3 others"
    assert table.rows[0][-1].split()[0] == str(88 + 87 + 86)


def test_runs_and_slides_without_scores(tmp_path):
    other = make_reported_run(tmp_path)
    assert read_scored(other, "a", read_cells(other, "a"), None) is None
    scored = write_scores(other, random_scores(other, TYPES, ("b",)))
    assert read_scored(scored, "a", read_cells(scored, "a"), None) is None
    assert len(read_scored(scored, "b", read_cells(scored, "b"), None).best_N) == 40


def test_damaged_scores_are_named(tmp_path):
    run = make_reported_run(tmp_path)
    run = write_scores(run, random_scores(run, TYPES))
    path = tmp_path / "run/scores/a.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"scores/a\.parquet"):
        read_scored(run, "a", read_cells(run, "a"), None)
