"""State of each slide, against plain loops over its history."""

from datetime import UTC, datetime
from itertools import pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scellst_ray import storage
from scellst_ray.runs.state import read_state
from tests.support.run_folders import MISSING, START, make_run, receipt, record, write_lease

WRONG = {"stage": "read", "error_type": "OSError", "error": "cut off"}
STATUS = st.sampled_from(["done", "empty", "partial", "failed", None])


def frame(state):
    return {row["slide_id"]: row for row in state.slides.iter_rows(named=True)}


def expected_slide(slide_id, content, tries, *, may_run):
    """Return status, tiles known, done and failed, and cells of a slide, from its history."""
    best = {}
    for row in tries:
        if row["slide_id"] == slide_id:
            # A success beats an error, whichever came first.
            kept = best.get(row["tile_id"], row)
            ranked = [(each.get("error") is None, each["num_cells"]) for each in (kept, row)]
            best[row["tile_id"]] = row if ranked[1] >= ranked[0] else kept
    if content is not None:
        num_failed = content["num_failed_tiles"]
        num_done = content["num_tiles"] - num_failed
        return content["status"], content["num_tiles"], num_done, num_failed, content["num_cells"]
    if not best:
        return "pending", None, 0, 0, 0
    good = [row for row in best.values() if row.get("error") is None]
    status = "running" if may_run else "pending"
    return status, 9, len(good), len(best) - len(good), sum(row["num_cells"] for row in good)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    statuses=st.lists(STATUS, min_size=3, max_size=3),
    tries=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 8), st.integers(0, 50), st.booleans()),
        max_size=30,
    ),
    cuts=st.lists(st.integers(0, 30), max_size=3),
    alive=st.booleans(),
)
def test_slides_equal_a_loop_over_their_history(tmp_path_factory, statuses, tries, cuts, alive):
    rows = [
        receipt(s, t, 9, *((0,) if bad else (n,)), **(WRONG if bad else {}))
        for s, t, n, bad in tries
    ]
    records = {
        s: record(s, status, num_tiles=9, num_failed_tiles=2 * (status == "partial"), num_cells=7)
        for s, status in zip("abc", statuses, strict=True)
        if status is not None
    }
    bounds = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    parts = [rows[a:b] for a, b in pairwise(bounds) if b > a]
    log = [(10 * number, part) for number, part in enumerate(parts)]
    run = make_run(tmp_path_factory.mktemp("run"), dict.fromkeys("abc", 100), records.values(), log)
    if alive:
        write_lease(run, START, datetime.now(UTC))
    state = read_state(run.uri)
    assert state.holder.may_work == alive
    found = frame(state)
    for slide_id in "abc":
        row = found[slide_id]
        names = ("status", "num_tiles", "tiles_done", "tiles_failed", "num_cells")
        expected = expected_slide(slide_id, records.get(slide_id), rows, may_run=alive)
        assert tuple(row[name] for name in names) == expected
    counts = state.counts()
    assert sum(counts.values()) == 3
    assert counts["done"] == statuses.count("done")
    unfinished = [s for s in "abc" if records.get(s, {}).get("status") not in ("done", "empty")]
    keys = {True: set(), False: set()}
    for row in rows:
        keys[row.get("error") is None].add((row["slide_id"], row["tile_id"]))
    failed = {key for key in keys[False] - keys[True] if key[0] in unfinished}
    listed = set(state.failures.select("slide_id", "tile_id").iter_rows())
    assert {key for key in listed if key[1] is not None} == failed


def test_a_slide_that_could_not_be_planned_and_one_mended_since(tmp_path):
    bad = receipt("a", -1, 0, **MISSING)
    was_bad = receipt("b", -1, 0, **MISSING)
    log = [(0, [bad, was_bad]), (9, [receipt("b", 0, 2, 5)])]
    failed = record("a", "failed", num_tiles=0, num_failed_tiles=1, **MISSING)
    state = read_state(make_run(tmp_path, {"a": 1, "b": 1}, [failed], log).uri)
    found = frame(state)
    assert (found["a"]["status"], found["a"]["tiles_done"], found["a"]["tiles_failed"]) == (
        "failed", 0, 0,
    )  # fmt: skip
    assert (found["b"]["status"], found["b"]["num_tiles"], found["b"]["tiles_done"]) == (
        "pending", 2, 1,
    )  # fmt: skip
    # The earlier failure of "b" no longer counts.
    assert state.failures.rows() == [("a", -1, *MISSING.values())]


def test_a_slide_without_its_crops_is_partial(tmp_path):
    records = [record("a", "done", num_cells=3), record("b", "done", num_cells=4)]
    run = make_run(tmp_path, {"a": 1, "b": 1}, records)
    storage.publish_json(f"{run.uri}/crops/crops.json", {"failed": {"b": "OSError: a: b"}})
    state = read_state(run.uri)
    assert [state.counts()[name] for name in ("done", "partial")] == [1, 1]
    assert state.failures.rows() == [("b", None, "crops", "OSError", "a: b")]


def test_a_record_that_lacks_counts_takes_those_of_the_log(tmp_path):
    whole = record("a", "done", num_tiles=2, num_failed_tiles=0, num_cells=5)
    bare = {key: value for key, value in whole.items() if not key.startswith("num_")}
    rows = [receipt("a", 0, 2, 3), receipt("a", 1, 2, 2)]
    run = make_run(tmp_path, {"a": 100}, [bare], [(0, rows)])
    found = frame(read_state(run.uri))["a"]
    names = ("status", "num_tiles", "tiles_done", "tiles_failed", "num_cells")
    assert [found[name] for name in names] == ["done", 2, 2, 0, 5]
