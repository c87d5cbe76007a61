"""`report` writes all pages twice with equal bytes, and names what it could not show."""

import shutil
import subprocess
from pathlib import Path

import pytest

from scellst_ray.commands.annotate import run_annotate
from scellst_ray.commands.configs import AnnotateConfig, ReportConfig
from scellst_ray.commands.report import run_report
from scellst_ray.pipelines.over_slides import NUM_FOR_RAY
from tests.support.crop_runs import write_crop_run
from tests.support.exported_runs import add_slide
from tests.support.pages import check_page
from tests.support.paired_runs import make_other_run
from tests.support.reported_runs import make_reported_run, write_spots
from tests.support.scored_runs import random_scores, write_scores

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture
def run(tmp_path):
    return make_reported_run(tmp_path)


def report(run, out, **more):
    return run_report(ReportConfig(run=run.uri, out=str(out), **more))


def pages_in(folder):
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_all_pages_and_the_same_again(run, tmp_path, capsys):
    assert report(run, tmp_path / "one") == 0
    assert "one/index.html and the pages of 3 slide(s)" in capsys.readouterr().out
    first = pages_in(tmp_path / "one")
    assert set(first) == {"index.html", *(f"slides/{s}.html" for s in "abp")}
    for text in first.values():
        check_page(text.decode())
    report(run, tmp_path / "two")
    assert pages_in(tmp_path / "two") == first


def test_spots_of_a_manifest(run, tmp_path):
    manifest = write_spots(tmp_path, ["CD3E", "EPCAM"])
    report(run, tmp_path / "out", manifest=manifest, genes=["EPCAM", "ERBB2"])
    page = check_page((tmp_path / "out/slides/a.html").read_text())
    assert "Spots measured, cells predicted" in page.text
    assert "measured EPCAM in 20 spots" in page.pictures()
    assert "Spots measured" not in (tmp_path / "out/slides/b.html").read_text()


def test_types_from_expression(run, tmp_path):
    write_scores(run, random_scores(run, ["T cell", "<b>tumour"], "ab"))
    report(run, tmp_path / "out")
    index = check_page((tmp_path / "out/index.html").read_text())
    assert "2 types by markers of m.csv. Score: mean of the markers." in index.text
    page = check_page((tmp_path / "out/slides/a.html").read_text())
    assert "Cell types from expression" in page.text
    assert "map of the score of <b>tumour on a" in page.pictures()
    assert "Cell types" not in (tmp_path / "out/slides/p.html").read_text()


def test_what_annotate_has_found(run, tmp_path):
    markers = tmp_path / "m.csv"
    markers.write_text("type,gene\nimmune,CD3E\nNeoplastic,ERBB2\n")
    run_annotate(AnnotateConfig(run=run.uri, markers=str(markers)))
    report(run, tmp_path / "out")
    index = check_page((tmp_path / "out/index.html").read_text())
    assert "Differential genes of nucleus types" in index.text
    assert "balanced accuracy against nucleus types is " in index.text


def test_damaged_scores_cost_their_part_alone(run, tmp_path):
    write_scores(run, random_scores(run, ["T cell", "tumour"], "ab"))
    (tmp_path / "run/scores/scores.json").write_text("{")
    with pytest.raises(ValueError, match=r"3 slide\(s\) lack a part: .*: scores: .*scores\.json"):
        report(run, tmp_path / "out")
    assert len(pages_in(tmp_path / "out")) == 4


@pytest.mark.usefixtures("run")
def test_another_run_beside(tmp_path, monkeypatch):
    make_other_run(tmp_path, {"a": 90, "b": 35, "z": 4})
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        run_report(ReportConfig(run="run", out=name, beside="other"))
    assert pages_in("one") == pages_in("two")
    index = check_page(Path("one/index.html").read_text())
    assert "Beside other" in index.text
    assert "Slides of the other run alone: z." in index.text
    page = check_page(Path("one/slides/a.html").read_text())
    assert {"CD3E in this run", "CD3E in the other run"} - set(page.pictures()) == set()
    assert "Nothing to compare" in Path("one/slides/p.html").read_text()


def test_a_run_that_cannot_stand_beside(run, tmp_path):
    other = make_other_run(tmp_path, {"z": 4})
    with pytest.raises(ValueError, match="is the run itself"):
        report(run, tmp_path / "out", beside=f"{run.uri}/")
    with pytest.raises(ValueError, match="shares no slide_id"):
        report(run, tmp_path / "out", beside=other.uri)
    with pytest.raises(FileNotFoundError, match="no run of scellst_ray"):
        report(run, tmp_path / "out", beside=str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_damaged_table_of_the_other_run(run, tmp_path):
    other = make_other_run(tmp_path, {"a": 90, "b": 35})
    path = tmp_path / "other/expression/a.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a; the first: the other run: .*other/expression/a"):
        report(run, tmp_path / "out", beside=other.uri)
    assert "Beside other" in (tmp_path / "out/slides/b.html").read_text()


def test_some_slides(run, tmp_path):
    report(run, tmp_path / "out", slides=["b"])
    assert set(pages_in(tmp_path / "out")) == {"index.html", "slides/b.html"}


def test_a_damaged_table_costs_its_part_alone(run, tmp_path):
    path = tmp_path / "run/expression/a.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        ValueError, match=r"1 slide\(s\) lack a part: a; the first: expression: .*a\.parq"
    ):
        report(run, tmp_path / "out")
    assert len(pages_in(tmp_path / "out")) == 4
    page = check_page((tmp_path / "out/slides/a.html").read_text())
    assert "expression: " in page.text
    assert "Predicted expression" in (tmp_path / "out/slides/b.html").read_text()
    assert "a.parquet" in (tmp_path / "out/index.html").read_text()


def test_a_page_that_cannot_be_written_costs_no_other_one(run, tmp_path):
    (tmp_path / "out/slides/a.html").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"1 slide\(s\) were not reported: a"):
        report(run, tmp_path / "out")
    assert (tmp_path / "out/slides/b.html").exists()
    assert "no page: " in (tmp_path / "out/index.html").read_text()


def test_what_cannot_be_used_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="is the folder of a run"):
        report(run, tmp_path / "run")
    with pytest.raises(ValueError, match="did you mean 'CD3E'"):
        report(run, tmp_path / "out", genes=["CD3D"])
    with pytest.raises(FileNotFoundError, match=r"s\.json: no such file"):
        report(run, tmp_path / "out", evaluation="s.json")
    with pytest.raises(ValueError, match="slides with a record"):
        report(run, tmp_path / "out", slides=["x"])
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_workers_of_ray_write_the_same(run, tmp_path, local_ray, monkeypatch):
    del local_ray  # its workers run in another folder
    for number in range(NUM_FOR_RAY):
        add_slide(run.folder, f"n{number}", 5 + number, embedding=False, hidden=True)
    monkeypatch.chdir(tmp_path)
    assert run_report(ReportConfig(run="run", out="by_ray")) == 0
    monkeypatch.setattr("scellst_ray.pipelines.over_slides._is_for_ray", lambda _: False)
    assert run_report(ReportConfig(run="run", out="here")) == 0
    assert len(pages_in("here")) == NUM_FOR_RAY + 4
    assert pages_in("by_ray") == pages_in("here")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_chromium_shows_the_pages_without_a_complaint(run, tmp_path):
    run = write_scores(run, random_scores(run, ["T cell", "tumour"], "ab"))
    write_crop_run(run.uri, {"a": 30})
    other = make_other_run(tmp_path, {"a": 90, "b": 35})
    report(run, tmp_path / "out", beside=other.uri)
    for name in ("index.html", "slides/a.html"):
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
        flags += " --disable-background-networking --disable-component-update --disable-sync"
        command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--enable-logging=stderr", "--dump-dom", (tmp_path / "out" / name).as_uri()]
        found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        assert ":CONSOLE" not in found.stderr
        assert "</html>" in found.stdout
