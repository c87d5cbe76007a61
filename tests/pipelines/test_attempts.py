"""The protocol of attempts with simulated deaths, and real ones of Ray's workers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from scellst_ray.core.schemas import RECEIPTS
from scellst_ray.pipelines.attempts import HOSTS_PER_ATTEMPT, Attempts
from scellst_ray.pipelines.extract import extract
from scellst_ray.pipelines.session import ray_session
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.stages.config import ExtractConfig
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.tiles import CellsSpec
from scellst_ray.stages.write import WriteShards


class Died(BaseException):
    """Stands for the end of a process: nothing in the package catches it."""


class Worker:
    """A worker whose processes die and are started again, as Ray does it."""

    def __init__(self, note, deadly, max_attempts=3, lost=lambda _: False):
        self.note, self.deadly, self.max_attempts, self.lost = str(note), deadly, max_attempts, lost
        self.num_deaths = 0
        self.tried = []
        self.attempts = self.start()

    def start(self):
        return Attempts(self.note, self.max_attempts, None, f"host{self.num_deaths}", self.lost)

    def do(self, *tiles, slide_id="s"):
        """Return the rows of these tiles, after as many processes as it takes."""
        while True:
            # A retried batch is made of the same input again.
            rows = [{"slide_id": slide_id, "tile_id": tile, "num_tiles": 99} for tile in tiles]
            try:
                parts = self.attempts.run_guarded(rows, self._work)
            except Died:
                self.num_deaths += 1
                assert self.num_deaths < 1000
                self.attempts = self.start()
            else:
                return {row["tile_id"]: row for rows in parts for row in rows}

    def _work(self, rows, begins):
        for stage in ("read", "write"):
            begins(stage)
            for row in rows:
                if row.get("error") is None:
                    self.tried.append(row["tile_id"])
                    if self.deadly(row, stage):
                        raise Died
        return rows


def errors(rows):
    return {tile for tile, row in rows.items() if row.get("error") is not None}


def test_without_deaths_a_batch_is_one_piece_of_work(tmp_path):
    worker = Worker(tmp_path / "note.json", lambda *_: False)
    assert errors(worker.do(1, 2, 3)) == set()
    assert worker.tried == [1, 2, 3, 1, 2, 3]
    # One note, of the last batch; nothing else is left.
    assert [path.name for path in tmp_path.iterdir()] == ["note.json"]
    assert json.loads((tmp_path / "note.json").read_text())["begun"] == [
        ["s", 1],
        ["s", 2],
        ["s", 3],
    ]


def test_a_deadly_tile_is_given_up_and_its_neighbours_are_not(tmp_path):
    worker = Worker(tmp_path / "note", lambda row, s: row["tile_id"] == 2 and s == "write")
    rows = worker.do(1, 2, 3)
    assert errors(rows) == {2}
    assert worker.num_deaths == 3
    assert rows[2]["error_type"] == "ProcessDied"
    assert rows[2]["stage"] == "write"
    for text in ("slide 's' tile 2", "3 attempts", "stage write", "memory_gb", "max_attempts"):
        assert text in rows[2]["error"]
    # The batches after it go on in one piece.
    worker.tried.clear()
    assert errors(worker.do(4, 5)) == set()
    assert worker.tried == [4, 5, 4, 5]


def test_a_tile_that_succeeds_in_the_end_leaves_no_trace(tmp_path):
    worker = Worker(tmp_path / "note", lambda row, _: row["tile_id"] == 2 and worker.num_deaths < 2)
    rows = worker.do(1, 2)
    assert worker.num_deaths == 2
    assert rows == Worker(tmp_path / "other", lambda *_: False).do(1, 2)


@pytest.mark.parametrize("batch", [[1], [1, 2]])
def test_with_one_attempt_a_batch_is_still_taken_apart(tmp_path, batch):
    worker = Worker(tmp_path / "note", lambda row, _: row["tile_id"] == 1, max_attempts=1)
    assert errors(worker.do(*batch)) == {1}
    assert worker.num_deaths == len(batch)


def test_a_rotten_slide_is_left_and_others_are_not(tmp_path):
    worker = Worker(tmp_path / "note", lambda row, _: row["slide_id"] == "bad")
    for first in range(0, 100, 2):
        rows = worker.do(first, first + 1, slide_id="bad")
        assert errors(rows) == {first, first + 1}
    assert "3 tiles of this slide" in rows[first]["error"]
    assert worker.num_deaths <= 3 * 3
    assert errors(worker.do(1, 2, slide_id="good")) == set()


def test_rows_with_an_error_or_without_a_tile_are_not_suspected(tmp_path):
    worker = Worker(tmp_path / "note", lambda *_: False)
    rows = [
        {"slide_id": "a", "tile_id": 1, "num_tiles": 3, "error": "cannot be read"},
        {"slide_id": "b", "tile_id": -1, "num_tiles": 0},
    ]
    (found,) = worker.attempts.run_guarded(rows, lambda rows, _: rows)
    assert found == rows
    assert not (tmp_path / "note").exists()


def test_planning_is_guarded_as_tile_minus_one(tmp_path):
    def plan(rows, begins):
        (row,) = rows
        if row.get("error") is None:
            begins("plan")
            raise Died
        return row

    for _ in range(3):
        with pytest.raises(Died):
            Attempts(str(tmp_path / "n"), 3, None).run_guarded(
                [{"slide_id": "s", "tile_id": -1}], plan
            )
    (row,) = Attempts(str(tmp_path / "n"), 3, None).run_guarded(
        [{"slide_id": "s", "tile_id": -1}], plan
    )
    assert row["stage"] == "plan"
    assert row["error"].startswith("slide 's': 3 attempts ended")


def test_lost_hosts_are_hardly_blamed_on_tiles(tmp_path):
    worker = Worker(tmp_path / "note", lambda *_: worker.num_deaths < 8, lost=lambda _: True)
    assert errors(worker.do(1)) == set()
    assert worker.num_deaths == 8
    # But a tile that takes its host with it every time ends too.
    worker = Worker(tmp_path / "other", lambda *_: True, lost=lambda _: True)
    assert errors(worker.do(1)) == {1}
    assert worker.num_deaths == 3 * HOSTS_PER_ATTEMPT


def test_which_host_is_asked_for_is_that_of_the_attempt(tmp_path):
    asked = []
    worker = Worker(
        tmp_path / "n", lambda *_: worker.num_deaths < 2, lost=lambda host: bool(asked.append(host))
    )
    worker.do(1)
    assert asked == ["host0", "host1"]


def test_a_note_that_cannot_be_written_or_read_costs_no_tile(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    worker = Worker(tmp_path / "file" / "note", lambda *_: False)
    assert errors(worker.do(1, 2)) == set()
    assert "cannot be written" in caplog.text
    (tmp_path / "note").write_text("{ cut off")
    assert errors(Worker(tmp_path / "note", lambda *_: False).do(1)) == set()
    assert "cannot be read" in caplog.text


@settings(deadline=None, max_examples=60)
@given(
    kills=st.dictionaries(st.integers(0, 19), st.integers(1, 5), max_size=5),
    size=st.integers(1, 7),
    max_attempts=st.integers(1, 4),
)
def test_any_pattern_of_deaths_ends_and_blames_only_the_guilty(
    tmp_path_factory, kills, size, max_attempts
):
    """Tile t ends the first kills[t] processes that take it, whatever else is in its batch."""
    left = dict(kills)

    def deadly(row, stage):
        here = stage == "write" and left.get(row["tile_id"], 0) > 0
        left[row["tile_id"]] = left.get(row["tile_id"], 0) - here
        return here

    worker = Worker(tmp_path_factory.mktemp("n") / "note", deadly, max_attempts)
    rows = {}
    for start in range(0, 20, size):
        rows |= worker.do(*range(start, min(20, start + size)))
    assert set(rows) == set(range(20))
    assert worker.num_deaths <= sum(kills.values())
    given_up = {t for t in errors(rows) if "attempts ended" in rows[t]["error"]}
    # One that never ended a process is never blamed, though it may be left with a rotten slide.
    assert given_up <= set(kills)
    left_alone = errors(rows) - given_up
    assert not left_alone or len(given_up) >= 3
    assert {t for t, num in kills.items() if num > max_attempts} <= errors(rows)


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


ENDLESS = """
import ctypes, sys, time
from scellst_ray.core import watchdog
from scellst_ray.pipelines import attempts
watchdog.GRACE_S = 0.5
# PyDLL keeps the lock of the interpreter, so that no other Python thread runs.
sleep = time.sleep if sys.argv[2] == "free" else ctypes.PyDLL(None).sleep
rows = [{"slide_id": "s", "tile_id": 7, "num_tiles": 9}]
attempts.Attempts(sys.argv[1], 3, 0.3).run_guarded(rows, lambda rows, begins: sleep(50))
"""


@pytest.mark.parametrize(("lock", "reason"), [("free", "took longer than 0.3 s"), ("held", None)])
def test_what_takes_too_long_ends_its_process(tmp_path, lock, reason):
    done = run_python(ENDLESS, tmp_path / "note", lock)
    assert done.returncode == 1
    note = json.loads((tmp_path / "note").read_text())
    assert note["begun"] == [["s", 7]]
    assert note["reason"] == reason
    # The stacks are printed in any case.
    assert 'File "<string>", line 9 in <lambda>' in done.stderr
    if reason:
        assert "slide 's' tile 7: took longer than 0.3 s" in done.stderr


def test_a_batch_in_time_goes_on_undisturbed(tmp_path):
    brief = ENDLESS.replace("0.3", "2").replace("sleep(50)", "print('done')") + "time.sleep(2.5)"
    done = run_python(brief, tmp_path / "note", "free")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# With Ray: a cohort with slides that end the workers' processes.

TILES = {"core_px": 96, "halo_px": 32, "encoder": "none", "memory_gb": 0.5, "tiles_per_task": 2}
SPEC = CellsSpec(
    segmenter="hematoxylin",
    read_mpp=None,
    core_px=TILES["core_px"],
    halo_px=TILES["halo_px"],
    encoder="none",
    precision="float32",
    head_uri=None,
    store_embeddings=False,
)
BAD_TILE = 5


def break_reader():
    """Make the reader of a worker crash, or hang, on slides whose names ask for it.

    Ray calls this in every worker: what the test's own process patches does not reach them.
    """
    from scellst_ray.slides import reader

    read, overview = reader.Slide.read, reader.Slide.overview

    def reading(self, box, mpp):
        if self.uri.endswith("crash_tile.tiff") and (box.x0, box.y0) == where:
            signal.raise_signal(signal.SIGSEGV)  # in this thread, at once
        if self.uri.endswith("hang_tile.tiff") and (box.x0, box.y0) == where:
            time.sleep(600)
        return read(self, box, mpp)

    def looking(self, mpp):
        if self.uri.endswith("crash_plan.tiff"):
            signal.raise_signal(signal.SIGSEGV)  # in this thread, at once
        if self.uri.endswith("hang_plan.tiff"):
            time.sleep(600)
        return overview(self, mpp)

    where = tuple(json.loads(os.environ["SCELLST_RAY_TEST_WHERE"]))
    reader.Slide.read, reader.Slide.overview = reading, looking


def receipts_of(run, slide_id, path, helpers):
    """Return receipts of a plain loop over all tiles of a slide."""
    tiles = plan_slide(helpers.slide_row(path, slide_id=slide_id), SPEC)
    segment, write = helpers.find_stage(SPEC), WriteShards(run)
    return pa.concat_tables([write(segment([tile])) for tile in tiles])


@pytest.fixture(scope="module")
def broken_cohort(small_cohort, tmp_path_factory, helpers):
    """Return a manifest, where its deadly tile lies, and the CELLS with and without that tile."""
    folder = tmp_path_factory.mktemp("broken")
    source = small_cohort.parent / "s0" / "slide.tiff"
    lines = ["slide_id,uri"]
    for name in ("crash_plan", "crash_tile", "good", "hang_plan", "hang_tile"):
        (folder / f"{name}.tiff").symlink_to(source)
        lines.append(f"{name},{name}.tiff")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    tiles = plan_slide(helpers.slide_row(source), SPEC)
    bad = next(tile for tile in tiles if tile["tile_id"] == BAD_TILE)
    run = RunFolder(str(folder / "plain"), "")
    receipts = receipts_of(run, "whole", source, helpers).to_pylist()
    cells = {}
    for name in ("whole", "without"):
        rows = receipts_of(run, name, source, helpers).to_pylist()
        for row in rows:
            if name == "without" and row["tile_id"] == BAD_TILE:
                row |= {"error": "died", "shard": None, "num_cells": 0}
        finish_slide(run, name, pa.Table.from_pylist(rows, schema=RECEIPTS))
        cells[name] = pq.read_table(run.cells_uri(name)).drop_columns("slide_id")
    assert len(receipts) > 8
    assert 20 < len(cells["without"]) < len(cells["whole"])
    return folder / "manifest.csv", (bad["read_x0"], bad["read_y0"]), cells


@pytest.fixture(scope="module")
def broken_ray(broken_cohort, ray_forks):  # noqa: ARG001 - set up first
    """Start a Ray whose workers have a reader that crashes and hangs."""
    _, where, _ = broken_cohort
    # Workers cannot import this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={
            "worker_process_setup_hook": break_reader,
            "env_vars": {"SCELLST_RAY_TEST_WHERE": json.dumps(where)},
        },
    )
    try:
        with ray_session() as cluster:
            yield cluster
    finally:
        ray.shutdown()
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.ray
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("broken_ray")
def test_slides_that_end_processes_cost_no_other_slide_anything(broken_cohort, tmp_path):
    manifest, _, cells = broken_cohort
    limits = {"tile_timeout_s": 3.0, "plan_timeout_s": 3.0, "max_attempts": 2}
    config = ExtractConfig(manifest=str(manifest), out=str(tmp_path), gpus=False, **limits, **TILES)
    records = extract(config)
    assert {name: record["status"] for name, record in records.items()} == {
        "crash_plan": "failed",
        "crash_tile": "partial",
        "good": "done",
        "hang_plan": "failed",
        "hang_tile": "partial",
    }
    for name, record in records.items():
        if name.endswith("_plan"):
            continue
        found = pq.read_table(RunFolder(str(tmp_path), "").cells_uri(name)).drop_columns("slide_id")
        assert found.equals(cells["whole" if name == "good" else "without"])
        assert record["num_failed_tiles"] == (name != "good")
    for name in ("crash_plan", "crash_tile", "hang_plan", "hang_tile"):
        record = records[name]
        assert record["error_type"] == "ProcessDied"
        assert record["stage"] == ("plan" if name.endswith("_plan") else "read")
        assert f"slide '{name}'" in record["error"]
        assert ("took longer than 3 s" in record["error"]) == name.startswith("hang")
        if name.endswith("_tile"):
            assert f"tile {BAD_TILE}" in record["error"]
    assert not (tmp_path / "attempts").exists()
    assert not (tmp_path / "lease.json").exists()
    # One receipt a tile, whatever was done twice.
    log = pa.concat_tables([pq.read_table(path) for path in Path(tmp_path, "receipts").iterdir()])
    assert len(log) == log.group_by(["slide_id", "tile_id"]).aggregate([]).num_rows
