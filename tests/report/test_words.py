import pytest

from scellst_ray.report.words import (
    as_text,
    describe_scores,
    describe_shift,
    names_in_short,
    scale_bar,
    slide_facts,
    unit_of,
    versions_of,
)
from tests.support.exported_runs import make_run


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (0.0, "0"),
        (0.12345, "0.123"),
        (1234.5, "1,234"),
        (-3.0, "-3"),
    ],
)
def test_numbers(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize(
    ("shift", "words", "is_beyond"),
    [
        (None, "", False),
        ({"score": 1.2, "limit": None, "beyond": None}, "states no limit", False),
        ({"score": 1.2, "limit": 1.8, "beyond": False}, "look like those", False),
        ({"score": 2.5, "limit": 1.8, "beyond": True}, "look unlike those", True),
    ],
)
def test_domain_shift_in_words(shift, words, is_beyond):
    record = {} if shift is None else {"domain_shift": shift}
    text, found = describe_shift(record)
    assert words in text
    assert found is is_beyond


@pytest.mark.parametrize(
    ("width_um", "text", "share"),
    [(300, "100 um", 33.3), (10_000, "2 mm", 20), (20, "100 um", 100)],
)
def test_a_scale_bar_fits(width_um, text, share):
    found, said = scale_bar({"mpp": 0.5, "width0": width_um * 2})
    assert said == text
    assert found == pytest.approx(share, abs=0.1)


def test_a_slide_of_unknown_size_has_no_scale_bar():
    assert scale_bar({"mpp": None, "width0": 5}) is None
    assert scale_bar({}) is None


def test_facts_of_a_slide(tmp_path):
    run = make_run(tmp_path, head=True)
    facts = dict(slide_facts(run, run.records["a"]))
    assert facts["cells"] == "30"
    assert facts["size"] == "0.3 x 0.2 mm"
    assert facts["file"] == "a.png"
    run.records["a"]["num_failed_tiles"] = 1
    assert dict(slide_facts(run, run.records["a"]))["tiles"] == "1, of which 1 failed"
    versions = dict(versions_of(run, run.records["a"]))
    assert versions["run"] == run.info["digest"]
    assert "scaled log counts" in unit_of(run, short=True)


def test_names_in_short():
    assert names_in_short("abc") == "a, b, c"
    assert names_in_short("abc", 2) == "a, b ..."


def test_scores_in_words():
    assert describe_scores(None) == ""
    types = [{"name": "a", "missing": []}, {"name": "b", "missing": ["X"]}]
    text = describe_scores({"types": types, "formula": "a mean", "source": "markers of m.csv"})
    assert text == (
        "2 types by markers of m.csv. Score: a mean. Of 1 of them the run's panel lacks some "
        "markers."
    )
    assert describe_scores({"types": types[:1], "formula": "f"}) == "1 types by markers. Score: f."
    agreement = {"balanced_accuracy": 0.712, "chance": 0.5, "recall": {"b": 0.9, "a": 0.524}}
    text = describe_scores({"types": types[:1], "formula": "f", "agreement": agreement})
    assert text.endswith("nucleus types is 0.71 (chance 0.50), with recall a 0.52, b 0.90.")
