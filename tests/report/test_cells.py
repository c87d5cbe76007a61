import numpy as np
import pytest

from scellst_ray.report.cells import NUM_TYPES, OTHERS, read_cells
from scellst_ray.runs.reading import open_run
from tests.support.exported_runs import HEIGHT0, MPP, WIDTH0, add_slide, make_run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, head=True)


def test_cells_and_types_the_most_frequent_first(run):
    cells = read_cells(run, "b")
    table = run.cells("b")
    names = table["nucleus_type"].to_pylist()
    assert [cells.types[code] for code in cells.codes_N] == names
    counts = [names.count(name) for name in cells.types]
    assert counts == sorted(counts, reverse=True)
    assert cells.xy0_N2[:, 0].tolist() == table["x0"].to_pylist()
    assert (cells.size0, cells.mpp) == ((WIDTH0, HEIGHT0), MPP)


def test_rare_types_are_one(run, monkeypatch):
    names = [f"type {n % 30}" for n in range(90)]

    class Rng:
        def choice(self, *_):
            return np.array(names)

        uniform = np.random.default_rng(0).uniform

    monkeypatch.setattr(np.random, "default_rng", lambda *_: Rng())
    add_slide(run.folder, "c", 90, embedding=False, hidden=True)
    cells = read_cells(open_run(run.uri), "c")
    assert len(cells.types) == NUM_TYPES + 1
    assert cells.types[-1] == OTHERS
    assert (cells.codes_N == NUM_TYPES).sum() == 3 * (30 - NUM_TYPES)


def test_a_slide_without_cells(run):
    add_slide(run.folder, "e", 0, embedding=False, hidden=True)
    cells = read_cells(open_run(run.uri), "e")
    assert len(cells.cell_id_N) == 0
    assert cells.types == []


def test_a_record_without_a_size(run):
    for name in ("width0", "height0", "mpp"):
        run.records["a"].pop(name)
    cells = read_cells(run, "a")
    assert (cells.xy0_N2 < cells.size0).all()
