import numpy as np
import pytest

from scellst_ray.report import cohort
from scellst_ray.report.cohort import SlideOutline, has_page, outline_of, say_problems, view_cohort
from scellst_ray.report.slide import Asked, view_slide
from scellst_ray.report.words import as_text
from tests.support.reported_runs import make_reported_run
from tests.support.scored_runs import random_scores, write_scores

GENES = (["CD3E"], "chosen")


@pytest.fixture
def run(tmp_path):
    return make_reported_run(tmp_path)


def view(run, slides=("a", "b", "e", "f", "p", "w"), genes=GENES, **more):
    chosen = [s for s in slides if s in run.records and has_page(run.records[s])]
    outlines = {s: outline_of(view_slide(run, s, Asked(tuple(genes[0])))) for s in chosen}
    return view_cohort(run, list(slides), outlines | more, genes, None)


def test_slides_with_and_without_results(run):
    found = view(run)
    lines = {line.slide_id: line for line in found.lines}
    assert [line.status for line in found.lines] == [
        *("done", "done", "empty", "failed", "partial", "not finished"),
    ]
    assert [s for s, line in lines.items() if line.href] == ["a", "b", "p"]
    assert lines["a"].tiny is not None
    assert dict(found.empty) == {"e": "tissue in 1 tiles, but no nuclei"}
    failed = dict(found.failed)
    assert failed["p"].startswith("2 of 3 tiles failed; the first: ")
    assert "no such file" in failed["f"]
    assert dict(found.facts)["slides"] == "6: 2 done, 1 partial, 1 empty, 1 failed, 1 not finished"


def test_the_highest_mean_is_darkest(run):
    depths = [line.means[0][1] for line in view(run).lines if line.href]
    assert min(depths) == 0
    assert max(depths) == 1


def test_distributions_are_those_of_all_cells(run):
    (drawn,) = view(run).ridges
    values = np.concatenate([run.expression_numpy(["CD3E"], s)[:, 0] for s in "abp"])
    assert (drawn.low, drawn.high) == (as_text(values.min()), as_text(values.max()))
    types = {t.name for s in "abp" for t in view_slide(run, s, Asked()).types}
    assert {ridge.name for ridge in drawn.ridges} == types
    assert view(run, genes=([], "")).ridges == []


def test_agreement_of_all_slides(run):
    scored = write_scores(run, random_scores(run, ["T cell", "tumour"], "ab"))
    found = view(scored)
    assert found.agreement.rows[-1][:2] == ["all cells", "70"]
    assert view(run, ("p",)).agreement is None


def test_a_mean_that_is_not_known_has_no_colour(run):
    means = {"b": SlideOutline(means={"CD3E": float("nan")}), "p": SlideOutline()}
    lines = {line.slide_id: line.means[0] for line in view(run, **means).lines}
    assert lines["b"] == lines["p"] == ("-", 0.0)
    assert lines["a"][0] != "-"


def test_one_slide_has_no_scale(run):
    assert view(run, ("a",)).lines[0].means[0][1] == 0


def test_many_slides_have_no_pictures(run, monkeypatch):
    monkeypatch.setattr(cohort, "MAX_PICTURES", 2)
    assert all(line.tiny is None for line in view(run).lines)


@pytest.mark.parametrize(
    ("shifts", "sentence", "lines"),
    [
        ({"a": (1.2, 1.8), "b": (2.5, 1.8)}, "1 of 2 slides lie beyond", 2),
        ({"a": (1.2, 1.8)}, "0 of 1 slides lie beyond", 1),
        ({"a": (1.2, None)}, "The head states no limit", 1),
        ({}, "", 0),
    ],
)
def test_domain_shift_of_the_cohort(run, shifts, sentence, lines):
    for slide_id, record in run.records.items():
        record.pop("domain_shift", None)
        if slide_id in shifts:
            score, limit = shifts[slide_id]
            beyond = None if limit is None else score > limit
            record["domain_shift"] = {"score": score, "limit": limit, "beyond": beyond}
    found = view(run).shifts
    assert len(found) == lines
    assert sentence in " ".join(found)


def test_problems_are_named():
    assert say_problems({"a": SlideOutline()}) is None
    text = say_problems({"a": SlideOutline(), "b": SlideOutline(problems=["cells: cut"])})
    assert text == "the pages of 1 slide(s) lack a part: b; the first: cells: cut"
