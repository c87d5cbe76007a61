"""The summary of a run, as JSON and as Markdown."""

import json
from datetime import UTC, datetime

import pytest

from scellst_ray import storage
from scellst_ray.core.version import __version__
from scellst_ray.runs.folder import read_config
from scellst_ray.runs.state import read_state
from scellst_ray.runs.summary import (
    failure_groups,
    format_number,
    markdown,
    write_summary,
)
from tests.support.absent import ABSENT
from tests.support.run_folders import MISSING, START, after, make_run, receipt, record, write_lease

SECRET = "s3://key:secret@bucket/m.csv?signature=x"
CONFIG = {"manifest": SECRET, "out": "o", "slides": None, "core_px": 960}


def failed_tile(slide_id, tile_id, error, stage="read", error_type="OSError"):
    why = {"stage": stage, "error_type": error_type, "error": error}
    return receipt(slide_id, tile_id, 20, 0, **why)


@pytest.fixture
def run(tmp_path):
    """Return a run of four slides: two done, one partial, one failed."""
    first = [receipt("a", tile, 20, 5) for tile in range(20)]
    second = [receipt("b", tile, 10, 7) for tile in range(10)]
    second += [receipt("c", 0, 20, 1)]
    third = [failed_tile("c", t, f"slide 'c' tile {t}: /data/c.svs ended early") for t in (1, 2)]
    third += [receipt("d", -1, 0, **MISSING)]
    numbers = {"num_tiles": 20, "num_cells": 100}
    records = [
        record("a", "done", **numbers, seconds={"read": 3.0, "segment": 40.0}),
        record("b", "done", num_tiles=10, num_cells=70, seconds={"read": 9.5, "segment": 9.0}),
        record("c", "partial", num_tiles=20, num_failed_tiles=2, seconds={"read": 1.25}),
        record("d", "failed", num_tiles=0, num_failed_tiles=1, finished=after(60).isoformat()),
    ]
    log = [(0, first), (40, second), (50, third)]
    return make_run(tmp_path, {"a": 4000, "b": 2000, "c": 3000, "d": 1000}, records, log, CONFIG)


def test_the_json(run):
    size = storage.content_size(storage.list_files(f"{run.uri}/receipts")[0])
    summary = write_summary(run.uri)
    assert storage.read_json(f"{run.uri}/summary.json") == summary
    assert summary["slides"] == {
        "total": 4, "done": 2, "empty": 0, "partial": 1, "failed": 1, "running": 0, "pending": 0,
    }  # fmt: skip
    assert summary["tiles"] == {"done": 48, "failed": 2, "known": 50}
    assert summary["num_cells"] == 170
    # Rates are over 50 s: the tiles of the first file were done before.
    assert summary["throughput"] == {"seconds": 50.0, "tiles_per_s": 0.26, "cells_per_s": 1.42}
    assert summary["seconds"] == {
        "plan": 0.0, "read": 13.75, "network": 0.0, "segment": 49.0, "crop": 0.0, "embed": 0.0,
        "write": 0.0,
    }  # fmt: skip
    slow = [(row["slide_id"], row["seconds"], row["stage"]) for row in summary["slowest"]]
    assert slow == [("a", 43.0, "segment"), ("b", 18.5, "read"), ("c", 1.25, "read")]
    assert summary["bytes"]["slides"] == 10_000
    assert summary["bytes"]["run"]["receipts"] > size
    assert summary["bytes"]["run"]["cells"] == 0
    assert (summary["first_receipt"], summary["last_receipt"]) == (
        "2026-03-01T12:00:00.000+00:00", "2026-03-01T12:00:50.000+00:00",
    )  # fmt: skip
    assert summary["last_record"] == after(60).isoformat()
    assert summary["created"] == START.isoformat()
    assert summary["versions"]["scellst_ray"] == __version__
    versions = {"python", "pyarrow", *({"ray", "torch"} - ABSENT)}
    assert versions <= set(summary["versions"])
    assert summary["releases"] == {"0.1.0": 4}


def test_failures_are_grouped_by_cause_with_an_example(run):
    cut, missing = write_summary(run.uri)["failures"]
    assert (cut["num_slides"], cut["num_tiles"], cut["stage"]) == (1, 2, "read")
    error = "slide 'c' tile 1: /data/c.svs ended early"
    assert cut["example"] == {"slide_id": "c", "tile_id": 1, "error": error}
    assert (missing["num_slides"], missing["num_tiles"]) == (1, 0)
    assert missing["error_type"] == "FileNotFoundError"


def test_messages_of_one_cause_are_one_group(tmp_path):
    ids = [f"P{number}_A" for number in range(30)]
    rows = [
        failed_tile(s, 3, f"{s}: 0x{i:x} of s3://b/{s}.svs: level {i}") for i, s in enumerate(ids)
    ]
    rows += [failed_tile(s, 4, "out of memory") for s in ids[:5]]
    rows += [failed_tile(s, 5, "out of memory", stage="embed") for s in ids[:4]]
    run = make_run(tmp_path, dict.fromkeys(ids), log=[(0, rows)])
    groups = failure_groups(read_state(run.uri))
    assert [(g["num_slides"], g["num_tiles"], g["stage"]) for g in groups] == [
        (30, 30, "read"), (5, 5, "read"), (4, 4, "embed"),
    ]  # fmt: skip


def test_no_credentials_anywhere(run):
    write_summary(run.uri)
    for name in ("summary.json", "SUMMARY.md"):
        with open(f"{run.uri}/{name}", encoding="utf-8") as handle:  # noqa: PTH123
            text = handle.read()
        assert "s3://bucket/m.csv" in text
        assert "secret" not in text
        assert "signature" not in text
    assert read_config(run.uri)["manifest"] == SECRET  # a retry needs it unchanged


def test_the_page(run):
    summary = write_summary(run.uri)
    page = markdown(json.loads(json.dumps(summary)))
    lines = page.splitlines()
    assert lines[0] == "# extract of 4 slides"
    assert lines[1] == "2 done, 0 empty, 1 partial, 1 failed, 0 running, 0 pending."
    assert "- tiles: 48 of 50 known, 2 failed" in lines
    assert "- throughput: 0.26 tiles/s, 1.42 cells/s, over 50 s of receipts" in lines
    assert "| segment | 49.0 | 78% |" in lines
    assert "| a | 20 | 100 | 43.0 | segment |" in lines
    assert "| 1 | 0 | plan | d | FileNotFoundError: /data/x.svs: no such file |" in lines
    assert "core_px: 960" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count(" | ") for line in tables} <= {2, 4}


def test_a_bar_or_a_line_in_a_message_does_not_break_the_table(tmp_path):
    rows = [failed_tile("a", 0, "one|two\nthree")]
    run = make_run(tmp_path, {"a": 1}, log=[(0, rows)])
    assert "| OSError: one\\|two three |" in markdown(write_summary(run.uri))


def test_it_is_written_again_while_a_driver_works(run):
    write_lease(run, START, datetime.now(UTC))
    first, second = write_summary(run.uri), write_summary(run.uri)
    assert second["bytes"]["run"] == first["bytes"]["run"]
    assert second | {"written": None} == first | {"written": None}


def test_what_the_driver_alone_knows_is_in_it(run):
    why = {"stage": "finish", "error_type": "OSError", "error": "disk full"}
    summary = write_summary(run.uri, {"b": record("b", "failed", num_tiles=0, **why)})
    assert summary["slides"]["failed"] == 2
    assert "disk full" in {group["example"]["error"] for group in summary["failures"]}


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "?"), (0.0, "0"), (0.12345, "0.123"), (7.0, "7"), (99.94, "99.9"), (12345.6, "12,346")],
)
def test_numbers(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("segmenter", "without_tiles", "with_tiles"),
    [
        ("hematoxylin", "no tissue found", "tissue in 4 tiles, but no nuclei"),
        ("cellvit", "no tissue found", "tissue in 4 tiles, but no nuclei"),
        ("imported", "no imported nuclei", "no imported nuclei were kept"),
    ],
)
def test_empty_slides_are_named_with_the_reason(tmp_path, segmenter, without_tiles, with_tiles):
    records = [
        record("pale", "empty", num_tiles=4),
        record("blank", "empty", num_tiles=0),
        record("whole", "done", num_cells=9),
    ]
    run = make_run(tmp_path, {"blank": 10, "pale": 20, "whole": 30}, records)
    info = storage.read_json(f"{run.uri}/run.json")
    info["identity"]["segmenter"] = segmenter
    storage.publish_json(f"{run.uri}/run.json", info)
    summary = write_summary(run.uri)
    assert summary["empty"] == [
        {"slide_id": "blank", "reason": without_tiles},
        {"slide_id": "pale", "reason": with_tiles},
    ]
    page = storage.read_text(f"{run.uri}/SUMMARY.md")
    assert (
        f"## Empty slides\n| slide | reason |\n| --- | --- |\n| blank | {without_tiles} |" in page
    )
    assert f"| pale | {with_tiles} |" in page


def test_very_many_empty_slides_are_counted_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr("scellst_ray.runs.summary.NUM_EMPTY", 2)
    names = [f"s{n}" for n in range(5)]
    records = [record(name, "empty", num_tiles=0) for name in names]
    summary = write_summary(make_run(tmp_path, dict.fromkeys(names, 1), records).uri)
    assert len(summary["empty"]) == 5
    assert "| s1 | no tissue found |\n| ... and 3 more | see summary.json |" in markdown(summary)


def test_a_run_without_empty_slides_has_no_such_table(run):
    assert write_summary(run.uri)["empty"] == []
    assert "Empty slides" not in storage.read_text(f"{run.uri}/SUMMARY.md")
