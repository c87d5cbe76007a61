import json
from pathlib import Path

import pytest

from scellst_ray import storage
from scellst_ray.commands.annotate import run_annotate
from scellst_ray.commands.configs import AnnotateConfig
from scellst_ray.runs.documents import publish_document
from scellst_ray.runs.reading import open_run
from scellst_ray.runs.scores import (
    column_of,
    read_agreement,
    read_differential_genes,
    read_scores,
    read_scores_info,
    score_types,
    table_uri,
)
from scellst_ray.runs.verify import verify_run
from tests.support.exported_runs import add_slide, make_run

ARCHIVE = Path(__file__).parents[1] / "archives" / "v1" / "run"


@pytest.fixture
def scored(tmp_path):
    run = make_run(tmp_path, head=True)
    add_slide(run.folder, "e", 0, embedding=False, hidden=True)
    (tmp_path / "m.json").write_text('{"T": ["CD3E"], "tumour": ["ERBB2"]}')
    run_annotate(AnnotateConfig(run=run.uri, markers=str(tmp_path / "m.json")))
    return open_run(run.uri)


def test_scores_in_the_order_of_cells(scored):
    assert score_types(scored) == ("T", "tumour")
    for slide_id in ("a", "b"):
        table = read_scores(scored, slide_id)
        assert table.column_names[2:] == ["best_type", "score_T", "score_tumour"]
        assert table["cell_id"].equals(scored.cells(slide_id)["cell_id"])
        assert read_scores(scored, slide_id, ["score_tumour"]).equals(
            table.select(["score_tumour"])
        )
    empty = read_scores(scored, "e")
    assert empty.column_names == table.column_names
    assert len(empty) == 0
    with pytest.raises(ValueError, match="did you mean 'score_T'"):
        read_scores(scored, "a", ["score_t"])
    with pytest.raises(ValueError, match="'z'"):
        read_scores(scored, "z")


def test_a_run_without_scores(tmp_path):
    for run in (make_run(tmp_path, head=True), open_run(ARCHIVE)):
        assert score_types(run) == ()
        assert read_scores_info(run.uri) is None
        assert read_agreement(run) is None
        assert read_differential_genes(run) is None
        assert read_scores(run, run.choose()[0]) is None


def test_a_slide_that_came_later_has_none(scored):
    add_slide(scored.folder, "late", 9, embedding=False, hidden=True)
    assert read_scores(open_run(scored.uri), "late") is None


def test_a_stale_table_is_refused(scored):
    add_slide(scored.folder, "a", 31, embedding=False, hidden=True)
    run = open_run(scored.uri)
    with pytest.raises(ValueError, match=r"a\.parquet: is stale: .*annotate` again"):
        read_scores(run, "a")
    assert len(read_scores(run, "b")) == 40
    for read in (read_agreement, read_differential_genes):
        with pytest.raises(ValueError, match="slide 'a' has changed since"):
            read(run)
    assert [(f.path, f.kind) for f in verify_run(run.uri).problems] == [
        ("scores/a.parquet", "foreign"),
        ("scores/cohort/agreement.parquet", "foreign"),
        ("scores/cohort/differential_genes.parquet", "foreign"),
    ]


def test_tables_of_all_slides(scored):
    assert sum(read_agreement(scored)["n"].to_pylist()) == 70
    assert len(read_differential_genes(scored)) == 9  # 3 types x 3 genes
    path = Path(table_uri(scored.uri, "AGREEMENT"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(storage.DamagedFileError, match="annotate` again"):
        read_agreement(scored)
    assert [(f.path, f.kind) for f in verify_run(scored.uri).problems] == [
        ("scores/cohort/agreement.parquet", "damaged")
    ]


def test_damage_is_refused_and_verify_names_it(scored):
    assert verify_run(scored.uri).findings == []
    a, b = (Path(scored.uri) / "scores" / f"{slide_id}.parquet" for slide_id in "ab")
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    with pytest.raises(storage.DamagedFileError, match="annotate` again"):
        read_scores(scored, "a")
    assert [(f.path, f.kind) for f in verify_run(scored.uri).findings] == [
        ("scores/a.parquet", "foreign")
    ]
    half = len(content) // 2
    a.write_bytes(content[:half] + bytes([content[half] ^ 4]) + content[half + 1 :])
    assert {f.path for f in verify_run(scored.uri).problems} == {"scores/a.parquet"}
    a.unlink()
    with pytest.raises(FileNotFoundError, match="absent"):
        read_scores(scored, "a")
    assert [(f.path, f.kind) for f in verify_run(scored.uri).findings] == [
        ("scores/a.parquet", "missing")
    ]


def test_a_damaged_document_is_refused_and_files_without_one_do_not_count(scored):
    path = Path(scored.uri) / "scores" / "scores.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"scaled": False}))
    with pytest.raises(storage.DamagedFileError, match=r"scores\.json: is damaged"):
        score_types(scored)
    assert ("scores/scores.json", "damaged") in {
        (f.path, f.kind) for f in verify_run(scored.uri).problems
    }
    path.unlink()
    assert read_scores(scored, "a") is None
    found = verify_run(scored.uri)
    assert found.problems == []
    assert {f.kind for f in found.findings} == {"passed over"}


def test_keys_of_later_releases_are_passed_over(scored):
    path = f"{scored.uri}/scores/scores.json"
    info = {k: v for k, v in storage.read_json(path).items() if k != "checksum"}
    publish_document(path, info | {"later": 1})
    assert score_types(scored) == ("T", "tumour")


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("T cells", "score_T_cells"),
        ("CD8+ T/NK", "score_CD8+_T_NK"),
        ("Zellen_ä", "score_Zellen_ä"),
        (" (odd) ", "score_odd"),
    ],
)
def test_columns_of_types_are_safe(name, column):
    assert column_of(name) == column
