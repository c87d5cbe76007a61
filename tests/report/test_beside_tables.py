"""Tables of two runs: values of a slide, and over the cells of all slides."""

import pytest

from scellst_ray.report.beside_tables import cohort_beside, slide_beside
from scellst_ray.report.compared import PairOfMeans, SlideBeside

A = SlideBeside(
    (100, 50),
    {"immune": (60, 10), "tumour": (40, 40)},
    {"CD3E": PairOfMeans((1.0, 2.0), 0.5)},
    {"immune": 0.8, "tumour": None},
    {"T": (100, 20), "B": (0, 30)},
    {"T": PairOfMeans((0.1, -2e-9), 0.9)},
)
B = SlideBeside((300, 150), {"immune": (300, 0), "dead": (0, 150)}, A.genes)


def tables_of(found):
    return {table.headings[0]: table for table in found}


def test_a_slide():
    tables = tables_of(slide_beside(A))
    assert tables[""].rows == [["cells", "100", "50"]]
    assert tables["gene"].rows == [["CD3E", "1", "2", "0.5"]]
    assert tables["best type"].rows[1] == ["B", "-", "30 (60.0 %)"]
    assert tables["score of"].rows == [["T", "0.1", "0", "0.9"]]
    assert [table.headings[0] for table in slide_beside(B)] == ["", "nucleus type", "gene"]


def test_a_cohort_counts_all_cells():
    tables = tables_of(cohort_beside({"a": A, "b": B}))
    assert tables["slide"].rows == [
        ["a", "100", "50", "0.5", "0.5", "0.8", "0.9"],
        ["b", "300", "150", "0.5", "0.5", "-", "-"],
    ]
    assert tables["nucleus type"].rows == [
        ["immune", "360 (90.0 %)", "10 (5.0 %)"],
        ["dead", "-", "150 (75.0 %)"],
        ["tumour", "40 (10.0 %)", "40 (20.0 %)"],
    ]
    assert tables["gene"].rows == [["CD3E", "1", "2", "0.5"]]
    assert "r of scores" not in tables_of(cohort_beside({"b": B}))["slide"].headings


@pytest.mark.parametrize(
    ("rs", "median"), [((0.1, 0.9), "0.5"), ((None, 0.7), "0.7"), ((None,), "-")]
)
def test_means_over_slides_weigh_cells(rs, median):
    slides = {
        str(n): SlideBeside((10 ** (n + 1), 5), {}, {"G": PairOfMeans((float(n), 1.0), r)})
        for n, r in enumerate(rs)
    }
    (row,) = tables_of(cohort_beside(slides))["gene"].rows
    expected = 100 / 110 if len(rs) == 2 else 0.0
    assert float(row[1]) == pytest.approx(expected, abs=1e-3)
    assert row[2:] == ["1", median]


def test_slides_of_unknown_means_do_not_count():
    nan = float("nan")
    slides = {
        "a": SlideBeside((10, 5), {}, {"G": PairOfMeans((nan, 1.0), None)}),
        "b": SlideBeside((30, 5), {}, {"G": PairOfMeans((2.0, nan), None)}),
    }
    assert tables_of(cohort_beside(slides))["gene"].rows == [["G", "2", "1", "-"]]
    assert tables_of(cohort_beside({"b": slides["b"]}))["gene"].rows == [["G", "2", "-", "-"]]
