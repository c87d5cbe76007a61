"""Pages show two runs side by side, and tell what only one of both has."""

import pytest

from scellst_ray.report.beside import Side, read_side
from scellst_ray.report.beside_page import run_name, view_beside, view_cohort_beside
from scellst_ray.report.cells import read_cells
from tests.support.exported_runs import GENES, make_run
from tests.support.pages import decode
from tests.support.paired_runs import make_other_run
from tests.support.reported_runs import make_reported_run
from tests.support.scored_runs import random_scores, write_scores


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, head=True)


def beside(run, other, slide_id="a", genes=GENES):
    return view_beside(read_side(run, slide_id, genes), other, slide_id, genes)


def test_genes_in_both(run, tmp_path):
    view, found = beside(run, make_other_run(tmp_path, {"a": 200}))
    assert view.name == "other"
    assert view.notes == []
    assert [row.name for row in view.maps] == GENES
    assert all(decode(m.picture.uri).std() > 0 for row in view.maps for m in row.maps)
    assert found.num_cells == (30, 200)
    assert view.tables[0].rows == [["cells", "30", "200"]]


@pytest.mark.parametrize(
    ("slides", "failed", "why"),
    [
        ({"b": 5}, (), "has not this slide"),
        ({}, ("a",), "failed in the other run"),
        ({"a": 0}, (), "found no cells"),
    ],
)
def test_a_slide_that_one_run_lacks_is_told(run, tmp_path, slides, failed, why):
    other = make_other_run(tmp_path, slides, failed=failed)
    view, found = beside(run, other)
    assert found is None
    assert why in view.notes[0]
    whole = view_cohort_beside(run, other, ["a", "b"], {})
    assert f"a (the {'slide' if failed else 'other run'} " in whole.notes[0]
    assert whole.notes[-1] == "No slide has cells in both runs."


def test_genes_that_one_run_lacks_are_told(run, tmp_path):
    other = make_other_run(tmp_path, {"a": 50, "z": 5}, genes=["CD3E", "KRT8"])
    view, found = beside(run, other)
    assert view.notes == ["The other run lacks EPCAM, ERBB2."]
    assert list(found.genes) == ["CD3E"]
    notes = view_cohort_beside(run, other, ["a", "b"], {"a": found}).notes
    assert notes == [
        "Slides of this run alone: b (the other run has not this slide, or has not finished it).",
        "Slides of the other run alone: z.",
        "Genes of this run alone, 2 of its 3: EPCAM, ERBB2.",
        "Genes of the other run alone, 1 of its 2: KRT8.",
    ]


def test_a_run_without_expression(run, tmp_path):
    other = make_other_run(tmp_path, {"a": 50}, genes=None)
    view, found = beside(run, other)
    assert view.notes == ["The other run lacks EPCAM, CD3E, ERBB2."]
    assert view.maps == []
    assert "No expression: the other run." in view_cohort_beside(run, other, ["a"], {}).notes
    reverse, _ = view_beside(Side(other, read_cells(other, "a"), None), run, "a", [])
    assert reverse.notes == []
    assert found.genes == {}


def test_scores_of_one_run_alone(run, tmp_path):
    other = make_other_run(tmp_path, {"a": 50})
    scored = write_scores(run, random_scores(run, ["x", "y"]))
    view, found = beside(scored, other)
    assert view.notes == ["Best types are not compared: the other run has no scores of the slide."]
    assert found.best == {}


def test_names(run):
    assert run_name(run) == "run"


def test_slides_without_cells_are_not_of_this_run_alone(tmp_path):
    run = make_reported_run(tmp_path)
    notes = view_cohort_beside(run, make_other_run(tmp_path, {"a": 5}), [*"abefp", "w"], {}).notes
    missing = "the other run has not this slide, or has not finished it"
    assert notes[0] == f"Slides of this run alone: b ({missing}), p ({missing})."
