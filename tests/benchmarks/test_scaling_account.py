"""The accounts of benchmarks/scaling.py, on calls written by hand and at random."""

import importlib.util
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


def _load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gpu_time = _load("gpu_time")


def _call(gpu, began, ended, tiles, stage="network", gpu_s=1.0):
    return gpu_time.Call(gpu, stage, began, ended, gpu_s, tuple(("s", tile) for tile in tiles))


def test_each_cause_by_hand():
    calls = [
        # Three seconds late to start, half a second too long, two seconds without input.
        _call("a", 3.0, 5.5, [0, 1]),
        _call("a", 7.5, 8.5, [2]),
        # Next to it on the same GPU, within its time: both get half of it, nothing is idle.
        _call("b", 0.0, 4.0, [3, 4]),
        _call("b", 1.0, 4.0, [3, 4], stage="embed", gpu_s=1.0),
    ]
    found = gpu_time.account(calls, {"a": None, "b": None, "c": None}, 0.0, 10.0)
    # GPU c never got a call; b is idle from 4 to 10 and a from 8.5 on.
    assert found == pytest.approx(
        {"useful": 7, "redo": 0, "late": 0.5, "start": 13, "input": 2, "tail": 7.5}
    )


def test_what_a_lost_host_cost():
    calls = [
        _call("lost", 0.0, 2.0, [0, 1]),
        _call("lost", 2.0, None, [2, 3]),
        _call("kept", 0.0, 2.0, [4, 5]),
        # What the lost host had in hand, and one tile whose result had gone down with it.
        _call("kept", 2.0, 4.0, [2, 3]),
        _call("kept", 4.0, 5.0, [0]),
    ]
    found = gpu_time.account(calls, {"lost": 3.5, "kept": None}, 0.0, 6.0)
    # Of the lost one 3.5 s were to be had: tile 1 counts, tile 0 and the broken call do not.
    assert found == pytest.approx(
        {"useful": 6, "redo": 2.5, "late": 0, "start": 0, "input": 0, "tail": 1}
    )


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.integers(0, 50),
            st.one_of(st.none(), st.integers(1, 20)),
            st.sets(st.integers(0, 8), min_size=1),
        )
    ),
    st.integers(30, 80),
)
def test_nothing_is_left_out_or_counted_twice(drawn, lost_at):
    # Nothing begins on a host that is lost.
    drawn = [one for one in drawn if one[0] == "a" or one[1] < lost_at]
    calls = [_call(gpu, t, None if n is None else t + n, tiles) for gpu, t, n, tiles in drawn]
    found = gpu_time.account(calls, {"a": None, "b": float(lost_at)}, 0.0, 100.0)
    assert sum(found.values()) == pytest.approx(100 + lost_at)
    finished = {tile for call in calls if call.ended is not None for tile in call.tiles}
    assert found["useful"] == len(finished)
    assert min(found[name] for name in ("start", "input", "tail")) >= 0
    # Second by second: how long nothing went on.
    for gpu, end in (("a", 100), ("b", lost_at)):
        spans = [(c.began, end if c.ended is None else c.ended) for c in calls if c.gpu == gpu]
        spans = [(began, min(ended, end)) for began, ended in spans if began < end]
        idle = gpu_time.idle_seconds(spans, 0, end)
        quiet = sum(all(not b <= second < e for b, e in spans) for second in range(end))
        assert sum(idle.values()) == quiet


def test_calls_as_processes_leave_them(tmp_path):
    call = {"gpu": "n:0", "stage": "embed", "gpu_s": 0.5, "tiles": [["s", 1]], "began": 2.0}
    lines = [json.dumps(call), json.dumps({"ended": 3.0}), json.dumps(call | {"began": 4.0})]
    (tmp_path / "whole").write_text("\n".join([*lines, '{"ended": 5']))
    (tmp_path / "begun").write_text("\n".join(lines[2:]))
    (tmp_path / "empty").write_text("")
    calls = gpu_time.read_calls(tmp_path)
    assert [(c.began, c.ended) for c in calls] == [(4.0, None), (2.0, 3.0), (4.0, None)]
    assert {c.tiles for c in calls} == {(("s", 1),)}


def test_summary_tells_where_slides_were_read():
    reads = [
        gpu_time.Call(node, "read", 0.0, 1.0, 0.1, (("s", tile),))
        for tile, node in enumerate(["n", "n", "n", "m"])
    ]
    on_gpu = [_call("n:0", 1.0, 5.0, range(4))]
    found = gpu_time.summary([*reads, *on_gpu], {"n:0": None}, -5.0, 5.0)
    assert (found["nodes_per_slide"], found["read_on_main_node"]) == (2.0, 0.75)
    assert (found["efficiency"], found["with_start"], found["start_s"]) == (0.8, 0.4, 5.0)
