"""State of a run, against plain loops over the files of its folder."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import strategies as st

from scellst_ray import storage
from scellst_ray.runs.receipts_log import logged_at
from scellst_ray.runs.state import Rate, read_log, read_state
from tests.support.run_folders import MISSING, START, after, make_run, receipt, record, write_lease

WRONG = {"stage": "read", "error_type": "OSError", "error": "cut off"}
STATUS = st.sampled_from(["done", "empty", "partial", "failed", None])


def test_failures_that_the_log_does_not_tell(tmp_path):
    finish = {"stage": "finish", "error_type": "OSError", "error": "disk full"}
    log = [(0, [receipt("b", 0, 1, 5)])]
    failed = record("a", "failed", num_tiles=0, num_failed_tiles=1, **MISSING)
    run = make_run(tmp_path, {"a": 1, "b": 1}, [failed], log)
    state = read_state(run.uri, records={"b": record("b", "failed", **finish)})
    assert state.failures.rows() == [
        ("a", None, *MISSING.values()),
        ("b", None, *finish.values()),
    ]
    assert state.counts()["failed"] == 2
    assert read_state(run.uri).counts()["pending"] == 1


def test_an_empty_run_and_no_run(tmp_path):
    state = read_state(make_run(tmp_path / "run", {}).uri)
    assert set(state.counts().values()) == {0}
    assert state.rate() == Rate()
    assert (state.tiles_left(), state.eta_s()) == (0.0, None)
    with pytest.raises(FileNotFoundError, match="no run"):
        read_state(str(tmp_path))


def rows(slide_id, first, count, num_tiles=100):
    return [receipt(slide_id, tile, num_tiles, 3) for tile in range(first, first + count)]


def test_rates_leave_out_pauses(tmp_path):
    # Two drivers, the second a day later. Each file holds the tiles done since the file before it.
    day = 86_400
    log = [(0, rows("a", 0, 10)), (10, rows("a", 10, 20)), (20, rows("a", 30, 40))]
    log += [(day, rows("a", 70, 5)), (day + 5, rows("a", 75, 10))]
    run = make_run(tmp_path, {"a": 1}, log=log)
    state = read_state(run.uri)
    assert state.rate() == Rate(25.0, 70, 210)
    assert state.rate().tiles_per_s == pytest.approx(70 / 25)
    assert state.recent_rate() == Rate()  # nobody works
    assert state.eta_s() is None


def test_time_left_is_reckoned_from_the_driver_that_works(tmp_path):
    log = [(-5000, rows("a", 0, 60)), (100, rows("a", 60, 10)), (200, rows("a", 70, 10))]
    run = make_run(tmp_path, {"a": 1000, "b": 500}, log=log)
    write_lease(run, after(0), datetime.now(UTC))
    state = read_state(run.uri, now=after(250))
    assert state.recent_rate() == Rate(250.0, 20, 60)
    # 20 tiles of "a" are left; "b" has half its size, so it counts with half its tiles.
    assert state.tiles_left() == pytest.approx(20 + 50)
    assert state.eta_s() == pytest.approx(70 * 250 / 20)
    # Later, only the last 15 minutes count.
    assert read_state(run.uri, now=after(1050)).recent_rate() == Rate(900.0, 10, 30)
    assert read_state(run.uri, now=after(9000)).eta_s() is None


def test_without_sizes_a_slide_is_taken_for_any_other(tmp_path):
    sources = {"a": None, "b": None, "c": None}
    done = record("a", "done", num_tiles=30, num_cells=1)
    run = make_run(tmp_path, sources, [done], [(0, rows("b", 0, 4, num_tiles=10))])
    assert read_state(run.uri).tiles_left() == pytest.approx(6 + (30 + 10) / 2)
    none_known = make_run(tmp_path / "new", sources)
    assert read_state(none_known.uri).tiles_left() is None


@pytest.mark.parametrize(
    ("renewed_s", "changes", "state"),
    [
        (-10, {}, "alive"),
        (-100, {}, "dead"),  # a lease of this host, which has our clock
        (-10, {"process": "1"}, "dead"),  # another process has its pid
        (-10, {"machine": "elsewhere"}, "alive"),
        (-100, {"machine": "elsewhere"}, "silent"),
        (-1000, {"machine": "elsewhere"}, "dead"),
    ],
)
def test_the_lease(tmp_path, renewed_s, changes, state):
    run = make_run(tmp_path, {"a": 1}, log=[(0, rows("a", 0, 1))])
    now = datetime.now(UTC)
    write_lease(run, now - timedelta(hours=1), now + timedelta(seconds=renewed_s), **changes)
    found = read_state(run.uri)
    assert found.holder.state == state
    assert found.slides["status"][0] == ("pending" if state == "dead" else "running")


@pytest.mark.parametrize("content", ["", '{"token": "a", "ho'])
def test_a_lease_cut_off_in_the_middle_is_nobodys(tmp_path, content):
    run = make_run(tmp_path, {"a": 1})
    storage.publish_text(f"{run.uri}/lease.json", content)
    assert read_state(run.uri).holder.state == "none"


def test_the_log_keeps_its_order_and_times(tmp_path):
    log = [(seconds, rows("a", seconds, 2)) for seconds in (30, 0, 20)]
    run = make_run(tmp_path, {"a": 1}, log=log)
    storage.publish_table(f"{run.uri}/receipts/odd.parquet", run.receipts().slice(0, 1))
    found = read_log(run.uri)
    assert found["tile_id"].to_pylist() == [0, 1, 20, 21, 30, 31, 0]
    expected = [after(seconds) for seconds in (0, 0, 20, 20, 30, 30)]
    assert found["logged"].to_pylist() == [*expected, None]
    assert logged_at("s3://b/receipts/20260301T120000000123-0f.parquet") == START + timedelta(
        microseconds=123
    )


def test_a_run_on_an_object_store(tmp_path):
    uri = f"memory://{tmp_path.name}/run"
    make_run(uri, {"a": 1}, [record("a", "done")], [(0, rows("a", 0, 4)), (2, rows("a", 4, 4))])
    state = read_state(uri)
    assert state.counts()["done"] == 1
    assert state.rate() == Rate(2.0, 4, 12)
    storage.remove_tree(f"memory://{tmp_path.name}")
