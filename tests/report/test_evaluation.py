import json

import pytest

from scellst_ray.report.evaluation import cohort_tables, read_evaluation, slide_tables

GENES = [f"g{n}" for n in range(30)]
PCC = [None if n == 3 else n / 100 for n in range(30)]
PART = {
    "spots": 50,
    "genes": 30,
    "models": {
        "ours": {"pcc": {"mean": 0.3, "over_rows": [0.2, 0.4]}, "rmse": {"mean": 1.5}},
        "mean": {"pcc": {"mean": None}, "rmse": {"mean": 2.0}},
    },
    "ours_minus": {},
    "by_gene": {"gene": GENES, "ours": {"pcc": PCC}, "mean": {"pcc": [None] * 30}},
}
EVALUATION = {
    "slides": {"a": {"spots": PART}},
    "all": {"spots": {"ours": {"pcc": 0.3}, "mean": {"rmse": 2.0}}},
}


def test_the_means_of_all_models():
    table = slide_tables(EVALUATION, "a", [])[0]
    assert table.headings == ["model", "PCC", "rMSE"]
    assert table.rows == [["ours", "0.3 [0.2, 0.4]", "1.5"], ["mean", "-", "2"]]
    assert "30 genes" in table.about


def test_genes_the_best_the_worst_and_the_shown():
    table = slide_tables(EVALUATION, "a", ["g15", "g29", "absent"])[1]
    names = [row[0] for row in table.rows]
    assert names[:3] == ["g15", "g29", "g28"]
    assert names[-1] == "g0"
    assert len(names) == 21
    assert table.rows[1] == ["g29", "0.29", "-"]


def test_slides_without_scores():
    assert slide_tables(EVALUATION, "b", []) == []
    assert slide_tables(None, "a", []) == []
    assert cohort_tables(None) == []


def test_the_means_over_slides():
    (table,) = cohort_tables(EVALUATION)
    assert table.rows == [["ours", "0.3", "-"], ["mean", "-", "2"]]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"slides": []}', '{"slides": {"a": 3}}'),
        *('{"slides": {"a": {"spots": 3}}}', '{"slides": {"a": {"spots": {"models": 1}}}}'),
    ],
)
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=r"s\.json.*evaluate expression"):
        read_evaluation(str(tmp_path / "s.json"))


def test_a_file_is_read(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(EVALUATION))
    assert read_evaluation(str(tmp_path / "s.json")) == EVALUATION
    with pytest.raises(FileNotFoundError, match="no such file; give the --out"):
        read_evaluation(str(tmp_path / "t.json"))


@pytest.mark.parametrize(
    "damage",
    [
        *({"gene": "G1"}, {"gene": [1, 2]}, {"gene": ["G1"]}, {"ours": None}, {"ours": {"pcc": 1}}),
        *({"ours": {"pcc": [0.1]}}, {"ours": {"rmse": ["a", 0.1]}}),
    ],
)
def test_damaged_scores_by_gene_are_refused(tmp_path, damage):
    by_gene = {"gene": ["G1", "G2"], "ours": {"pcc": [0.1, None]}}
    for change, is_sound in (({}, True), (damage, False)):
        part = {"models": {}, "by_gene": by_gene | change}
        (tmp_path / "s.json").write_text(json.dumps({"slides": {"a": {"spots": part}}}))
        if is_sound:
            assert read_evaluation(str(tmp_path / "s.json"))["slides"]["a"]["spots"] == part
            continue
        with pytest.raises(ValueError, match=r"s\.json: holds no scores; give the --out"):
            read_evaluation(str(tmp_path / "s.json"))
