from dataclasses import replace

import numpy as np
import pytest

from scellst_ray.report.cells import read_cells
from scellst_ray.report.galleries import NUM_SHOWN, galleries_of
from tests.support.crop_runs import numbers_of, write_crop_run
from tests.support.exported_runs import make_run
from tests.support.pages import decode


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, head=True)


def numbers_in(sheet):
    pixels = decode(sheet.picture.uri)
    return numbers_of(np.stack(np.split(pixels, pixels.shape[1] // 72, axis=1)))


def test_the_cells_with_most_and_least_of_a_gene(run):
    write_crop_run(run.uri, {"a": 20})
    values = run.expression_numpy(["CD3E"], "a")
    cells = replace(read_cells(run, "a"), values_NG=values)
    (row,) = galleries_of(run, "a", cells, ["CD3E"], [])
    order = np.argsort(-values[:20, 0])
    assert numbers_in(row.maps[0]).tolist() == order[:NUM_SHOWN].tolist()
    assert numbers_in(row.maps[1]).tolist() == order[::-1][:NUM_SHOWN].tolist()
    assert row.maps[0].title == "highest CD3E, of 20 cells with crops"


def test_without_genes_cells_of_each_type(run):
    write_crop_run(run.uri, {"a": 30})
    cells, names = read_cells(run, "a"), run.cells("a")["nucleus_type"].to_pylist()
    rows = galleries_of(run, "a", cells, [], [])
    assert [row.name for row in rows] == cells.types
    for row in rows:
        assert {names[number] for number in numbers_in(row.maps[0])} == {row.name}


def test_what_is_missing_is_said(run):
    notes = []
    cells = read_cells(run, "a")
    assert galleries_of(run, "a", cells, [], notes) == []
    assert "no crops" in notes[0]
    write_crop_run(run.uri, {"b": 5})
    assert galleries_of(run, "a", cells, [], notes) == []
    assert notes[1] == "The run has no crops of this slide."
