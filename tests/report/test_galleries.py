"""Galleries hold the first and the last cells of a ranking, in its order."""

from dataclasses import replace

import numpy as np
import pytest

from scellst_ray.report import galleries
from scellst_ray.report.cells import read_cells
from scellst_ray.report.galleries import (
    COLUMNS,
    GAP_PX,
    NUM_SHOWN,
    SIDE_PX,
    Ranking,
    galleries_of,
    probabilities_of,
    rank_genes,
    rank_types,
)
from scellst_ray.runs.reading import open_run
from tests.support.crop_runs import PX, numbers_of, write_crop_run
from tests.support.exported_runs import add_slide, make_run
from tests.support.pages import decode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose slide c has 300 cells."""
    folder = tmp_path_factory.mktemp("galleries")
    run = make_run(folder, head=True)
    add_slide(run.folder, "c", 300, embedding=False, hidden=True)
    return run.uri


@pytest.fixture
def run(folder):
    return open_run(folder)


def numbers_in(sheet):
    """Return the numbers that the crops of a sheet show; white places have no crop."""
    pixels, step = decode(sheet.picture.uri), SIDE_PX + GAP_PX
    tops, lefts = range(0, pixels.shape[0], step), range(0, pixels.shape[1], step)
    crops = [pixels[top : top + SIDE_PX, left : left + SIDE_PX] for top in tops for left in lefts]
    filled = [crop for crop in crops if crop.min() < 128]
    where = np.arange(PX) * SIDE_PX // PX
    return numbers_of(np.stack(filled)[:, where][:, :, where]).tolist()


def with_values(run, slide_id, gene):
    values = run.expression_numpy([gene], slide_id)
    return replace(read_cells(run, slide_id), values_NG=values)


@pytest.mark.parametrize(
    ("count", "shown"), [(300, NUM_SHOWN), (20, 20), (130, NUM_SHOWN), (1, 1), (101, NUM_SHOWN)]
)
def test_the_hundred_cells_with_most_and_least_of_a_gene(run, count, shown):
    write_crop_run(run.uri, {"c": count})
    cells = with_values(run, "c", "CD3E")
    (row,) = galleries_of(run, "c", cells, rank_genes(cells, ["CD3E"]), [])
    order = np.argsort(-cells.values_NG[:count, 0], kind="stable")
    assert numbers_in(row.maps[0]) == order[:shown].tolist()
    assert numbers_in(row.maps[1]) == order[::-1][:shown].tolist()
    assert row.maps[0].title == f"{shown} highest CD3E, of {count} cells with crops"
    assert row.maps[0].picture.width == min(count, COLUMNS) * (SIDE_PX + GAP_PX) - GAP_PX


def test_a_page_holds_galleries_of_some_genes(run):
    names = [f"g{n}" for n in range(30)]
    cells = replace(read_cells(run, "c"), values_NG=np.zeros((300, 30), np.float32))
    assert [ranking.name for ranking in rank_genes(cells, names)] == names[: galleries.MAX_GENES]


def test_the_first_row_groups_of_a_large_slide(run, monkeypatch):
    monkeypatch.setattr(galleries, "MAX_GROUPS", 1)
    write_crop_run(run.uri, {"c": 200})
    cells = with_values(run, "c", "EPCAM")
    (row,) = galleries_of(run, "c", cells, rank_genes(cells, ["EPCAM"]), [])
    assert row.maps[0].title == "100 highest EPCAM, of 128 cells with crops, drawn from 200"
    assert max(numbers_in(row.maps[0])) < 128


def test_cells_of_each_type_without_probabilities(run):
    write_crop_run(run.uri, {"c": 300})
    cells, names = read_cells(run, "c"), run.cells("c")["nucleus_type"].to_pylist()
    rankings = rank_types(cells, probabilities_of(run, "c"))
    rows = galleries_of(run, "c", cells, rankings, [])
    assert [row.name for row in rows] == cells.types
    for row in rows:
        (sheet,) = row.maps
        assert {names[number] for number in numbers_in(sheet)} == {row.name}


def test_the_surest_and_the_least_sure_cells_of_each_type(run):
    write_crop_run(run.uri, {"c": 300})
    cells = read_cells(run, "c")
    sure_N = np.random.default_rng(0).permutation(300) / 300
    for code, row in enumerate(galleries_of(run, "c", cells, rank_types(cells, sure_N), [])):
        of_type = np.flatnonzero(cells.codes_N == code)
        order = of_type[np.argsort(-sure_N[of_type])]
        assert row.maps[0].title.split(", ")[0] == f"{min(100, len(of_type))} surest {row.name}"
        assert numbers_in(row.maps[0]) == order[:NUM_SHOWN].tolist()
        assert numbers_in(row.maps[1]) == order[::-1][:NUM_SHOWN].tolist()


def test_cells_without_a_value_have_no_place(run):
    write_crop_run(run.uri, {"c": 30})
    cells = read_cells(run, "c")
    values_N = np.where(np.arange(300) % 2, np.arange(300.0), np.nan)
    (row,) = galleries_of(run, "c", cells, [Ranking("x", ("most", "least"), values_N)], [])
    assert numbers_in(row.maps[0]) == [*range(29, 0, -2)]
    nothing = Ranking("y", ("most", "least"), np.full(300, np.nan))
    assert galleries_of(run, "c", cells, [nothing], []) == []


def test_what_is_missing_is_said(tmp_path):
    run, notes = make_run(tmp_path, head=True), []
    cells = read_cells(run, "a")
    assert galleries_of(run, "a", cells, [], notes) == []
    assert "`scellst-ray predict` command again with --crops 1000000" in notes[0]
    write_crop_run(run.uri, {"b": 5})
    assert galleries_of(run, "a", cells, [], notes) == []
    assert notes[1] == "The run has no crops of this slide."
