"""One file of a run is altered: readers report it, or return what they returned before.

`benchmarks/silent_faults.py` alters many more.
"""

import pyarrow as pa
import pytest

from tests.faults.altered_runs import (
    ALTERATIONS,
    KINDS,
    SAME,
    SILENT,
    describe,
    is_equal,
    judge_altered,
    readings_of,
)
from tests.faults.whole_run import make_whole_run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Return a run folder with every kind of file, and what readers make of it."""
    run = make_whole_run(tmp_path_factory.mktemp("whole") / "run", cells_per_tile=12)
    return run.uri, readings_of(run.uri)


@pytest.mark.parametrize("kind", KINDS)
def test_no_alteration_is_silent(whole_run, tmp_path, kind):
    answers = [
        answer
        for alteration in ALTERATIONS
        for answer in judge_altered(*whole_run, tmp_path / "copy", kind, alteration, 0)
    ]
    assert [answer for answer in answers if not answer.is_good] == []
    assert len(answers) > len(whole_run[1])


def test_readings_of_one_run_are_equal(whole_run):
    uri, expected = whole_run
    again = readings_of(uri)
    assert {name: is_equal(again[name], expected[name]) for name in expected} == dict.fromkeys(
        expected, True
    )
    assert [record["status"] for record in expected["status"][0]] == [
        *("done", "done", "partial", "failed", "pending"),
    ]
    assert len(expected["failures"]) == 2
    assert len(expected["cells"]) == 3


def test_a_difference_is_seen():
    table = pa.table({"a": [1]})
    assert is_equal([table], [pa.table({"a": [1]})])
    assert not is_equal([table], [pa.table({"a": [2]})])
    assert not is_equal([table], [table, table])
    assert describe([{"a": 1}], [{"a": 2}]) == "a: 1, not 2"
    assert SAME != SILENT
