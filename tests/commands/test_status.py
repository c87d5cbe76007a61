"""`scellst-ray status`: its output for people and for machines."""

import json
import re
from datetime import UTC, datetime, timedelta

import pytest

from scellst_ray.commands.status import StatusConfig, driver_line, status, status_of
from scellst_ray.runs.state import read_state
from tests.support.run_folders import MISSING, START, here, make_run, receipt, record, write_lease

WHY = MISSING | {"error": "[/x]: no such file"}


@pytest.fixture
def run(tmp_path):
    """Return a run of four slides: done, failed, begun and not begun."""
    now = datetime.now(UTC)
    seconds = (now - START).total_seconds()
    good = [receipt("begun", tile, 50, 2) for tile in range(10)]
    more = [receipt("begun", tile, 50, 2) for tile in range(10, 30)]
    records = [
        record("fine", "done", num_tiles=50, num_cells=90, seconds={"read": 12.5}),
        record("bad", "failed", num_tiles=0, num_failed_tiles=1, **WHY),
    ]
    sources = {"fine": 10, "bad": 10, "begun": 10, "waiting": 20}
    return make_run(tmp_path, sources, records, [(seconds - 300, good), (seconds - 100, more)])


def printed_status(capsys, run, **flags):
    assert status(StatusConfig(run=run.uri, **flags)) == 0
    return capsys.readouterr().out


def test_nobody_works(capsys, run):
    text = printed_status(capsys, run)
    first, tiles, speed, driver, *_ = text.splitlines()
    assert first.endswith("4 slides: 1 done, 0 empty, 0 partial, 1 failed, 0 running, 2 pending")
    assert tiles == "tiles: 80 of 100 known, 0 failed; 150 cells"
    assert speed == "speed: 0.1 tiles/s, 0.2 cells/s, over 200 s of receipts"
    assert driver == "no driver works on it"
    assert "now:" not in text
    assert re.search(r"fine +│ +50 +│ +90 +│ +12.5 +│ +read", text)
    assert "FileNotFoundError" in text
    assert "[/x]" in text  # no markup
    assert "retry" in text


def test_a_driver_works(capsys, run):
    now = datetime.now(UTC)
    write_lease(run, now - timedelta(seconds=400), now)
    lines = printed_status(capsys, run).splitlines()
    assert lines[0].endswith("1 done, 0 empty, 0 partial, 1 failed, 1 running, 1 pending")
    assert lines[3].startswith(f"a driver works on it: {here()}, since 20")
    assert "(0:06:4" in lines[3]
    # 20 tiles of the slide begun; the one not begun is twice the size of those known, 100 of 30
    # bytes with the failed one's 0 tiles, so 66.7 tiles.
    assert re.fullmatch(r"now: 0\.07\d+ tiles/s, about 87 tiles left, 0:1\d:\d\d to go", lines[4])


def test_json(capsys, run):
    now = datetime.now(UTC)
    write_lease(run, now - timedelta(seconds=400), now)
    found = json.loads(printed_status(capsys, run, json=True))
    assert found["slides"]["running"] == 1
    assert found["tiles_left"] == 87
    assert found["driver"]["state"] == "alive"
    assert found["recent"]["num_tiles"] == 30
    assert found["eta_s"] == pytest.approx(86.67 / found["recent"]["tiles_per_s"], rel=0.01)
    assert found["failures"][0]["example"]["slide_id"] == "bad"


def test_it_writes_nothing_unless_asked(capsys, run, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    printed_status(capsys, run)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert "wrote summary.json and SUMMARY.md" in printed_status(capsys, run, write=True)
    json.loads(printed_status(capsys, run, json=True, write=True))
    assert {p.name for p in tmp_path.iterdir()} >= {"summary.json", "SUMMARY.md"}


def test_no_run_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run of scellst_ray"):
        status(StatusConfig(run=str(tmp_path)))


@pytest.mark.parametrize(
    ("renewed_s", "changes", "line"),
    [
        (-70, {}, "no driver works on it; the last one was killed: process"),
        (-70, {"machine": "other"}, "a driver on another host may work on it: process"),
        (
            -10,
            {"machine": "other", "host": "h7", "pid": 42},
            "a driver works on it: process 42 on h7",
        ),
    ],
)
def test_who_works(run, renewed_s, changes, line):
    now = datetime.now(UTC)
    write_lease(run, now - timedelta(days=3), now + timedelta(seconds=renewed_s), **changes)
    state = read_state(run.uri)
    found = driver_line(state.holder, state.now)
    assert found.startswith(line)
    assert "(3 days, 0:00:0" in found
    assert re.search(r"renewed 0:0[01]:1\d ago$", found)


def test_many_failures_are_cut_and_counted(capsys, tmp_path):
    rows = [
        receipt("s", tile, 50, 0, stage="read", error_type=f"Error{chr(65 + tile)}", error="x")
        for tile in range(25)
    ]
    run = make_run(tmp_path, {"s": 1}, log=[(0, rows)])
    assert "and 5 more" in printed_status(capsys, run)
    assert len(status_of(read_state(run.uri))["failures"]) == 25
