"""Pages are whole HTML, hold their pictures, and take every value as text."""

import pytest

from scellst_ray.report.cohort import SlideOutline, view_cohort
from scellst_ray.report.render import page_link, page_name, render_cohort, render_slide
from scellst_ray.report.slide import Asked, view_slide
from scellst_ray.report.views import BesideView, Ridge, Ridges, Row, SlideView, Swatch, Table
from tests.report.test_cohort import view as cohort_of
from tests.support.pages import check_page
from tests.support.reported_runs import ODD, make_reported_run


@pytest.fixture
def run(tmp_path):
    return make_reported_run(tmp_path)


def test_the_page_of_a_slide(run):
    page = check_page(render_slide(view_slide(run, "a", Asked(("CD3E", "ERBB2"))), "run"))
    assert page.links == ["../index.html"]
    assert "Predicted expression" in page.text
    assert len(page.pictures()) == 6
    assert "H&E of slide a" in page.pictures()
    assert "Distributions by nucleus type" in page.text
    assert page.source.count("<svg") == 2 * 3


def test_the_page_of_a_cohort(run):
    page = check_page(render_cohort(cohort_of(run)))
    assert page.links == ["slides/a.html", "slides/b.html", "slides/p.html"]
    for title in ("Distributions by nucleus type", "Slides without cells", "Failures", "Versions"):
        assert title in page.text
    assert f"/data/{ODD}.svs: no such file" in page.text


def test_markup_in_names_is_text(run):
    odd = SlideView(ODD, facts=[(ODD, ODD)], shift=ODD, notes=[ODD], problems=[ODD])
    odd.types = [Swatch(ODD, "#000000", 1, 100.0)]
    odd.by_type = Table([ODD], [[ODD]], ODD)
    odd.genes = [Row(ODD, [], ODD)]
    odd.beside = BesideView(ODD, [ODD], [odd.by_type], odd.genes)
    odd.ridges = [Ridges(ODD, ODD, ODD, [Ridge(ODD, "#000000", "0,0 1,1", 0.0, ODD, ODD)])]
    page = check_page(render_slide(odd, ODD))
    assert "<b>" not in page.source
    assert page.text.count("<b>") >= 10
    outlines = {"a": SlideOutline(types=odd.types, problems=[ODD])}
    source = render_cohort(view_cohort(run, ["a", ODD], outlines, ([ODD], ODD), None))
    assert "<b>" not in source
    check_page(source)


def test_links_to_names_with_signs():
    assert page_name("a+b") == "slides/a+b.html"
    assert page_link("a+b") == "slides/a%2Bb.html"


def test_a_view_without_anything_is_a_page(run):
    check_page(render_slide(SlideView("a"), "run"))
    check_page(render_cohort(view_cohort(run, [], {}, ([], ""), None)))
