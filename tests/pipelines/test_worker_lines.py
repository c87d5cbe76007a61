"""Lines of Ray's other processes: ours without a prefix, those of others with it."""

import os

import pytest
from ray._private import ray_logging
from ray._private import worker as ray_worker

from scellst_ray.pipelines import worker_lines
from scellst_ray.pipelines.worker_lines import HANDLER, filter_worker_lines, show_lines

CPP = "[2026-12-01 04:18:21,078 E 1 1] core_worker.cc:2465: of ray"
OURS = "2026-12-01 04:18:21,078 WARNING slide a is small"


@pytest.fixture
def held(monkeypatch):
    """Return the list that receives what is written to descriptor 2."""
    written = []
    monkeypatch.setattr(worker_lines.os, "write", lambda fd, data: written.append((fd, data)))
    return written


def shown(batch):
    calls = []
    show_lines(batch, lambda part, is_plain: calls.append((part["lines"], is_plain)))
    return calls


def test_our_lines_have_no_prefix_and_others_keep_it(held):
    lines = ["Traceback", OURS, '{"time": "x"}', CPP, "a", "b"]
    batch = {"pid": 7, "actor_name": "MapWorker", "is_err": True, "lines": lines}
    assert shown(batch) == [
        (["Traceback"], False),
        ([OURS, '{"time": "x"}'], True),
        (["a", "b"], False),
    ]
    assert held == [(2, f"(MapWorker pid=7) {CPP}\n".encode())]


@pytest.mark.parametrize(
    ("pid", "lines", "expected"),
    [
        ("raylet", [CPP], [([CPP], False)]),
        ("raylet", [CPP.replace("of ray", ":info_message:Spilled 9 MiB")], []),
        ("raylet", ["Traceback"], [(["Traceback"], False)]),
        ("gcs_server", [CPP], []),
        (
            "autoscaler",
            ["Adding 2 nodes", "Error: no node fits"],
            [(["Error: no node fits"], False)],
        ),
        (9, [], []),
    ],
)
@pytest.mark.usefixtures("held")
def test_processes_of_ray_itself(pid, lines, expected):
    assert shown({"pid": pid, "is_err": True, "lines": lines}) == expected


def test_the_handler_of_ray_is_replaced_once(monkeypatch, capsys):
    dispatcher = ray_logging.WorkerStandardStreamDispatcher()
    monkeypatch.setattr(ray_logging, "global_worker_stdstream_dispatcher", dispatcher)
    filter_worker_lines()
    assert dispatcher.handlers == []  # lines of workers are not wanted
    monkeypatch.setattr(ray_worker, "_worker_logs_enabled", True)
    dispatcher.add_handler(HANDLER, lambda _: pytest.fail("replaced"))
    filter_worker_lines()
    filter_worker_lines()
    dispatcher.emit({"pid": os.getpid(), "ip": "x", "is_err": True, "lines": [OURS]})
    assert [name for name, _ in dispatcher.handlers] == [HANDLER]
    assert capsys.readouterr().err.replace("\x1b[0m", "") == f"{OURS}\n"


def test_our_lines_are_no_repetitions(capsys):
    lines = [OURS.replace("slide a", f"slide S{number}") for number in range(3)]
    for pid, line in enumerate(lines):
        batch = {"pid": pid, "ip": "x", "is_err": True, "lines": [line]}
        show_lines(batch, worker_lines._print)
    assert capsys.readouterr().err.splitlines() == lines


def test_without_standard_error_lines_of_ray_write_into_no_other_file(monkeypatch, held):
    monkeypatch.setattr(worker_lines.sys, "__stderr__", None)
    assert shown({"pid": 7, "is_err": True, "lines": [CPP, OURS]}) == [([OURS], True)]
    assert held == []
