"""A slide's view: each part is there, and a part that is damaged costs the others nothing."""

import numpy as np
import pytest

from scellst_ray.report.slide import Asked, view_slide
from scellst_ray.runs.reading import open_run
from scellst_ray.slides import reader
from tests.report.test_evaluation import EVALUATION
from tests.support.crop_runs import write_crop_run
from tests.support.pages import decode
from tests.support.reported_runs import make_reported_run
from tests.support.scored_runs import random_scores, write_scores

GENES = ("ERBB2", "CD3E")


@pytest.fixture
def run(tmp_path):
    return make_reported_run(tmp_path)


def test_all_parts_without_reading_the_slide(run, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "Slide", None)
    (tmp_path / "a.png").unlink()
    view = view_slide(run, "a", Asked(GENES, {}, EVALUATION))
    assert view.problems == []
    assert [one.title for one in view.overview] == [
        "H&E",
        "Nuclei: commonest type in each square",
    ]
    assert [row.name for row in view.genes] == list(GENES)
    assert all(len(row.maps) == 2 for row in view.genes)
    assert sum(swatch.count for swatch in view.types) == 30
    values = run.expression_numpy(GENES, "a")
    assert list(view.means.values()) == pytest.approx(values.mean(axis=0).tolist(), rel=1e-6)
    assert view.by_type.rows[0][0] == "all cells"
    assert [drawn.gene for drawn in view.ridges] == list(GENES)
    assert [ridge.name for ridge in view.ridges[0].ridges] == [t.name for t in view.types]
    assert len(view.accuracy) == 2


def test_galleries_of_genes_and_types(run):
    write_crop_run(run.uri, {"a": 30})
    view = view_slide(run, "a", Asked(GENES))
    assert [row.name for row in view.galleries] == [*GENES, *(t.name for t in view.types)]
    assert view.galleries[0].maps[0].title == "30 highest ERBB2, of 30 cells with crops"
    assert view.notes == []


def test_types_from_expression(run):
    write_crop_run(run.uri, {"a": 30})
    scored = write_scores(run, random_scores(run, ["T cell", "tumour"]))
    view = view_slide(scored, "a", Asked(GENES))
    assert view.problems == []
    assert {swatch.name for swatch in view.scored.types} == {"T cell", "tumour"}
    assert sum(view.pairs.values()) == 30
    assert [drawn.gene for drawn in view.scored.ridges] == list(GENES)
    names = [f"score of {swatch.name}" for swatch in view.scored.types]
    assert [row.name for row in view.galleries] == [*GENES, *names]
    assert "markers of m.csv" in view.scored.about


def test_a_run_of_extract(tmp_path):
    run = make_reported_run(tmp_path, head=False)
    view = view_slide(run, "a", Asked())
    assert view.genes == []
    assert view.problems == []
    assert view.overview[-1].title == "Outlines, where cells are densest"
    assert decode(view.overview[-1].picture.uri).std() > 0


@pytest.mark.parametrize(
    ("name", "begin", "left"),
    [
        ("thumbnails/a.jpg", "picture of the slide", {"types", "genes", "by_type"}),
        ("expression/a.parquet", "expression", {"overview", "types"}),
        ("cells/a.parquet", "cells", {"overview"}),
        ("scores/a.parquet", "scores", {"overview", "types", "genes", "by_type"}),
        ("scores/scores.json", "scores", {"overview", "types", "genes", "by_type"}),
    ],
)
def test_a_damaged_file_costs_its_part_alone(run, tmp_path, name, begin, left):
    write_scores(run, random_scores(run, ["T cell", "tumour"]))
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[:-9])
    view = view_slide(open_run(run.uri), "a", Asked(GENES))
    assert len(view.problems) == 1
    assert view.problems[0].startswith(f"{begin}: ")
    assert path.name in view.problems[0]
    assert all(getattr(view, part) for part in left)


def test_runs_without_thumbnails_say_so(run, tmp_path):
    (tmp_path / "run/thumbnails/a.jpg").unlink()
    view = view_slide(run, "a", Asked(GENES))
    assert "keeps no picture of this slide" in view.notes[0]
    assert view.problems == []
    assert view.small is None


def test_spots_that_cannot_be_read_are_a_line(run):
    rows = {"a": {"slide_id": "a", "spots": "/nowhere/x.h5ad"}}
    view = view_slide(run, "a", Asked(GENES, rows))
    (problem,) = view.problems
    assert problem.startswith("spots: ")
    assert "/nowhere/x.h5ad" in problem
    assert len(view.genes) == 2


@pytest.mark.parametrize("count", [1, 29, 30])
def test_cells_without_finite_expression_count_in_no_mean(run, monkeypatch, count):
    values = run.expression_numpy(GENES, "a")
    values[:count] = np.nan
    monkeypatch.setattr(type(run), "expression_numpy", lambda *_: values)
    view = view_slide(run, "a", Asked(GENES))
    assert f"is not finite, and counts in no mean: {count}." in view.notes[0]
    assert view.problems == []
    if count < 30:
        expected = values[count:].mean(axis=0, dtype=float).tolist()
        assert list(view.means.values()) == pytest.approx(expected, rel=1e-6)
    else:
        assert view.by_type.rows[0] == ["all cells", "-", "-"]
        assert view.ridges == []
