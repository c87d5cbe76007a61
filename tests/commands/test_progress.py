"""Log lines of a run, and their times."""

import logging

import pytest

from scellst_ray.commands import progress as module
from scellst_ray.commands.progress import cells_per_second, log_lines, shown_progress
from scellst_ray.pipelines.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that tests set."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_first_and_last_are_logged_and_few_in_between(clock, caplog):
    report = log_lines(every_s=30.0)
    progress = Progress(num_slides=2, num_tiles_known=100, started=990.0)
    with caplog.at_level(logging.INFO, "scellst_ray"):
        for second in range(100):
            clock[0] = 1000.0 + second
            progress.num_tiles = second
            progress.num_cells = 50 * second
            report(progress)
        assert [message.split("tiles ")[1].split(" of")[0] for message in caplog.messages] == [
            "0", "30", "60", "90",
        ]  # fmt: skip
        progress.records = {"a": {}}
        report(progress)
        assert len(caplog.messages) == 4
        progress.records = {"a": {}, "b": {}}
        report(progress)
    # At once, though the last line is 9 s old.
    assert caplog.messages[-1] == ("slides 2 of 2, tiles 99 of 100 known, 4,950 cells, 45 cells/s")


def test_cells_of_an_earlier_process_do_not_count(clock):
    progress = Progress(num_slides=1, num_cells=900, num_cells_before=500, started=980.0)
    assert cells_per_second(progress) == pytest.approx(20.0)
    clock[0] = 980.0
    assert cells_per_second(Progress(num_slides=1, started=980.0)) == 0.0


def test_without_a_terminal_lines_are_logged(caplog):
    with caplog.at_level(logging.INFO, "scellst_ray"), shown_progress() as report:
        report(Progress(num_slides=1))
    assert caplog.messages == ["slides 0 of 1, tiles 0 of 0 known, 0 cells, 0 cells/s"]


def test_bars_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with shown_progress() as report:
        report(Progress(num_slides=3, records={"a": {}}, num_tiles=4, num_tiles_known=9))
    shown = capsys.readouterr().err
    assert "1/3" in shown
    assert "4/9" in shown
    assert "cells/s" in shown
