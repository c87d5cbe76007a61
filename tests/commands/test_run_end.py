"""What a person sees at the end of a run, and the exit code."""

import pytest

from scellst_ray.commands.run_end import summarise


def record(status, **changes):
    values = {"status": status, "num_cells": 1200, "num_tiles": 12, "num_failed_tiles": 0}
    return values | changes


def last_column(text):
    """Return the cells of a printed table's last column, joined without white space."""
    rows = [line for line in text.splitlines() if line.count("│") > 2]
    return "".join("".join(line.strip("│┃").split("│")[-1].split()) for line in rows)


def test_done_and_empty_is_success(capsys):
    code = summarise({"a": record("done"), "b": record("empty", num_cells=0)}, "runs/[mine]")
    shown = capsys.readouterr().out
    assert code == 0
    assert shown == "2 slides: 1 done, 1 empty, 0 partial, 0 failed; 1,200 cells in runs/[mine]\n"


@pytest.mark.parametrize("status", ["partial", "failed"])
def test_failures_are_listed_with_their_whole_reason(capsys, monkeypatch, status):
    monkeypatch.setenv("COLUMNS", "80")
    path = "/data/cohort/" + "a_folder_with_a_long_name/" * 6 + "slide.tiff"
    error = f"{path}: level [bold] of [/x] cannot be read; copy it again."
    bad = record(status, num_failed_tiles=3, stage="read", error_type="OSError", error=error)
    code = summarise({"good": record("done"), "slide_17": bad}, "out")
    shown = capsys.readouterr().out
    assert code == 1
    assert f"1 done, 0 empty, {int(status == 'partial')} partial" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80
    row = next(line for line in shown.splitlines() if "slide_17" in line)
    assert all(part in row for part in ("slide_17", status, "3 of 12", "read"))
    assert "good" not in shown
    # Neither cut, nor with anything in brackets taken for markup.
    assert last_column(shown) == "".join(f"OSError: {error}".split())
    assert "run the same command again" in shown


def test_a_slide_without_a_plan_is_listed(capsys):
    bad = record("failed", num_cells=0, num_tiles=0, num_failed_tiles=1)
    bad |= {"stage": "plan", "error_type": "ValueError", "error": "mpp unknown"}
    assert summarise({"s": bad}, "out") == 1
    assert "1 of 1" in capsys.readouterr().out


def test_slides_unlike_the_training_slides_are_named_and_change_no_exit_code(capsys):
    shift = {"score": 1.8, "limit": 1.2, "beyond": True}
    records = {"odd": record("done", domain_shift=shift)}
    records["fine"] = record("done", domain_shift=shift | {"score": 1.1, "beyond": False})
    assert summarise(records, "out") == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line == (
        "warning: odd: its cells look unlike those the head was trained on: score 1.80, held-out "
        "training slides at most 1.20; check stain and resolution before you trust its expression"
    )
    unknown = {"score": 1.8, "limit": None, "beyond": None}
    records = {name: record("done", domain_shift=unknown) for name in "ab"}
    assert summarise(records, "out") == 0
    _, line = capsys.readouterr().out.splitlines()
    assert "this head has no limit of domain shift" in line
