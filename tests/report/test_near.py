import numpy as np
import pytest

from scellst_ray.report.near import (
    MIN_CELLS,
    WINDOW_PX,
    WINDOW_UM,
    Window,
    draw_outlines,
    highest_place,
    read_outlines,
)
from scellst_ray.report.pictures import BLANK_RGB, FRAME_RGB, value_colours
from tests.support.exported_runs import make_run
from tests.support.pages import decode

MPP = 0.5


def test_the_window_holds_the_cells_with_most():
    rng = np.random.default_rng(0)
    xy0 = rng.uniform(0, 8000, (4000, 2))
    near = np.hypot(*(xy0 - (5000, 3000)).T) < 300
    window = highest_place(xy0, near.astype(float), MPP)
    assert window.side0 == WINDOW_UM / MPP
    assert near[window.holds(xy0)].mean() == 1
    assert len(window.holds(xy0)) >= MIN_CELLS


def test_a_single_cell_of_high_value_is_no_place():
    xy0 = np.concatenate([np.random.default_rng(0).uniform(0, 900, (200, 2)), [[50_000.0, 9.0]]])
    values = np.concatenate([np.ones(200), [100.0]])
    assert len(highest_place(xy0, values, MPP).holds(xy0)) >= MIN_CELLS


@pytest.mark.parametrize("count", [1, 3])
def test_few_cells_have_a_place_too(count):
    xy0 = np.arange(2.0 * count).reshape(count, 2)
    assert len(highest_place(xy0, np.ones(count), MPP).holds(xy0)) == count


def test_outlines_of_some_rows_are_those_of_the_table(tmp_path, monkeypatch):
    from scellst_ray.runs import compaction

    monkeypatch.setattr(compaction, "ROW_GROUP", 7)
    run = make_run(tmp_path, head=True)
    rows = np.array([0, 6, 7, 21, 39])
    found = read_outlines(run, "b", rows)
    cells = run.cells("b", ["x0", "y0"])
    for row, outline in zip(rows.tolist(), found, strict=True):
        assert outline.min(axis=0) == pytest.approx(
            [cells["x0"][row].as_py(), cells["y0"][row].as_py()]
        )
        assert np.ptp(outline, axis=0) == pytest.approx([5, 5], abs=0.01)


def test_outlines_are_drawn_in_the_window():
    box = np.array([[100.0, 100], [140, 100], [140, 140], [100, 140], [100, 100]])
    window = Window(50.0, 50.0, 400.0)
    pixels = decode(draw_outlines([box], np.array([9], np.uint8), window, "x").uri)
    scale = WINDOW_PX / 400
    assert pixels.shape == (WINDOW_PX, WINDOW_PX, 3)
    assert pixels[round(70 * scale), round(70 * scale)].tolist() == value_colours()[9].tolist()
    assert pixels[round(50 * scale), round(70 * scale)].tolist() == list(FRAME_RGB)
    assert pixels[5, 5].tolist() == list(BLANK_RGB)


def test_a_place_at_the_edge_of_the_tissue_does_not_count():
    xy0 = np.random.default_rng(0).uniform(0, 4000, (8000, 2))
    # Highest where the tissue ends, in a corner that a window would hold by a quarter.
    values = xy0.sum(axis=1)
    window = highest_place(xy0, values, MPP)
    counts = len(window.holds(xy0))
    assert counts > 0.4 * 8000 * (WINDOW_UM / MPP / 4000) ** 2
