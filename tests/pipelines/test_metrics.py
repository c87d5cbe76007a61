"""Counts of metrics, against the receipts and the progress they count."""

from collections import Counter

import pyarrow as pa
import pytest

from scellst_ray.core import schemas
from scellst_ray.pipelines import metrics as module
from scellst_ray.pipelines.metrics import (
    DriverMetrics,
    WorkerMetrics,
    ascii_tag,
    report_with_metrics,
    run_name,
)
from scellst_ray.pipelines.progress import Progress
from scellst_ray.runs.folder import RunFolder

RUN = RunFolder("s3://bucket/cohort/run7/", "0123")


class Recorded:
    """Stands for a metric of Ray's."""

    values: Counter

    def __init__(self, name, description="", tag_keys=()):
        assert description.endswith(".")
        self.name, self.tag_keys = name, tag_keys

    def set_default_tags(self, tags):
        self.default = tags
        return self

    def _key(self, tags):
        tags = self.default | (tags or {})
        assert set(tags) == set(self.tag_keys)
        assert (tags.pop("run"), tags.pop("digest")) == ("run7", "0123")
        return (self.name.removeprefix("scellst_ray_"), *tags.values())

    def inc(self, value=1.0, tags=None):
        assert value > 0
        Recorded.values[self._key(tags)] += value

    def set(self, value, tags=None):
        Recorded.values[self._key(tags)] = value


@pytest.fixture
def values(monkeypatch):
    for name in ("Counter", "Gauge"):
        monkeypatch.setattr(module, name, Recorded)
    Recorded.values = Counter()
    return Recorded.values


def receipts(*rows):
    full = [{"slide_id": "s", "num_tiles": 9, "num_cells": 0} | row for row in rows]
    return pa.Table.from_pylist(full, schema=schemas.RECEIPTS)


def test_a_worker_counts_its_receipts_once_a_second(values, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    metrics = WorkerMetrics(RUN)
    wrong = {"stage": "embed", "error_type": "ValueError", "error": "x", "seconds_embed": 0.25}
    metrics.count(receipts({"tile_id": 1, "num_cells": 7, "seconds_read": 0.5}, {"tile_id": 2}))
    metrics.count(receipts({"tile_id": 3, **wrong}, {"tile_id": 4, "seconds_read": 1.5}))
    # A slide that could not be planned is no tile; one without tissue is no failure either.
    planned = {"tile_id": -1, "num_tiles": 0, "seconds_plan": 2.0}
    metrics.count(receipts(planned | wrong | {"stage": "plan", "seconds_embed": None}, planned))
    first = {("tiles_done",): 2, ("cells_found",): 7, ("worker_seconds", "read"): 0.5}
    assert values == first
    now[0] = 101.0
    metrics.count(receipts())
    now[0] = 102.0
    metrics.count(receipts())  # nothing more
    assert values == {
        ("tiles_done",): 3,
        ("cells_found",): 7,
        ("tiles_failed", "embed"): 1,
        ("tiles_failed", "plan"): 1,
        ("worker_seconds", "read"): 2.0,
        ("worker_seconds", "embed"): 0.25,
        ("worker_seconds", "plan"): 4.0,
    }


def test_the_driver_shows_its_progress_now_and_then(values, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    shown = []
    progress = Progress(3, {"a": {"status": "done"}}, num_tiles=4, num_tiles_known=9, num_cells=50)
    report = report_with_metrics(RUN, shown.append)
    report(progress)
    expected = {
        ("slides", "done"): 1, ("slides", "empty"): 0, ("slides", "partial"): 0,
        ("slides", "failed"): 0, ("slides", "unfinished"): 2, ("run_tiles",): 4,
        ("run_tiles_known",): 9, ("run_cells",): 50,
    }  # fmt: skip
    assert values == expected
    progress.num_tiles, now[0] = 5, 100.5
    report(progress)
    assert values == expected
    now[0] = 101.1
    report(progress)
    assert values == expected | {("run_tiles",): 5}
    # The end is shown at once.
    progress.records |= {"b": {"status": "failed"}, "c": {"status": "failed"}}
    report(progress)
    assert values[("slides", "failed")] == 2
    assert values[("slides", "unfinished")] == 0
    assert len(shown) == 4


def test_names_hold_no_secrets():
    assert run_name(RunFolder("s3://key:secret@bucket/a/run", "")) == "run"
    assert run_name(RunFolder("https://host/run?signature=x", "")) == "run"


def test_rays_own_metrics_take_them():
    metrics = WorkerMetrics(RUN)
    metrics.count(receipts({"tile_id": 1, "num_cells": 7, "seconds_read": 0.5}))
    DriverMetrics(RUN).show(Progress(1))


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("run 7 (b), #2", "run 7 (b), #2"),
        ("läufe", "l%C3%A4ufe"),
        ("la\u0308ufe", "la%CC%88ufe"),
        ("実験", "%E5%AE%9F%E9%A8%93"),
        ("\U0001f9ec", "%F0%9F%A7%AC"),
        ("50%", "50%25"),
        ("a\nb", "a%0Ab"),
        ("l\udce4ufe", "l%E4ufe"),
    ],
)
def test_a_tag_is_ascii_whatever_the_folder_is_called(monkeypatch, name, tag):
    assert ascii_tag(name) == tag
    made = {}

    class Tagged(Recorded):
        def set_default_tags(self, tags):
            made.update(tags)
            return super().set_default_tags(tags)

    monkeypatch.setattr(module, "Counter", Tagged)
    WorkerMetrics(RunFolder(f"/runs/{name}", "0123"))
    assert made == {"run": tag, "digest": "0123"}
    assert all(text.isascii() and text.isprintable() for text in made.values())
