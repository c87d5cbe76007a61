"""Ray's errors about lost processes take one line; errors of our own keep their traceback."""

import pytest
import ray.exceptions as of_ray
from ray.train import ControllerError, WorkerGroupError

from scellst_ray.commands import cli, table
from scellst_ray.core.lost_process import explain_lost_process

VANISHED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: MapWorker\nThe actor "
    "is dead because its worker process died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
    "There are some potential root causes. (1) The process is killed by SIGKILL by OOM killer."
)
BY_MEMORY = "Task was killed due to the node running low on memory.\nMemory on the node: 30/31 GB"


def died(text=VANISHED):
    """Return the error of an actor that ended, with Ray's words about it."""
    error = of_ray.ActorDiedError()
    error.error_msg = text
    return error


def caused_by(cause, text="x"):
    """Return an error of a task that another error caused, as Ray Data raises it."""
    error = of_ray.RayTaskError("f", text, cause)
    error.__cause__ = cause
    return error


def from_here(error):
    """Return an error that was raised from another one."""
    outer = of_ray.RaySystemError("x")
    outer.__cause__ = error
    return outer


OWN = ValueError("slide_id is missing")
LOST = [
    (of_ray.OutOfMemoryError(BY_MEMORY), "memory was nearly used up"),
    (of_ray.WorkerCrashedError(), "ended from outside"),
    (died(), "ended from outside"),
    (died("The actor was killed by the memory monitor"), "memory was nearly"),
    (of_ray.NodeDiedError("x"), "a host of the cluster"),
    (of_ray.LocalRayletDiedError(), "Ray itself ended"),
    (of_ray.OutOfDiskError("x"), "disk"),
    (of_ray.ObjectStoreFullError("x"), "object store"),
    (caused_by(of_ray.OutOfMemoryError(BY_MEMORY)), "memory was nearly"),
    (caused_by(caused_by(of_ray.WorkerCrashedError())), "ended from outside"),
    (from_here(of_ray.NodeDiedError("x")), "a host of the cluster"),
    (ControllerError(died()), "controller of the training"),
    (died(f"{VANISHED}\n\tclass_name: TrainController"), "controller"),
    (WorkerGroupError("x", {0: died()}), "ended from outside"),
    (
        WorkerGroupError(
            "x",
            {
                0: of_ray.OutOfMemoryError(BY_MEMORY),
                1: RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
                2: died(),
            },
        ),
        "memory was nearly",
    ),
    (Exception("The current node timed out during startup. This could happen"), "did not start"),
]
OTHERS = [
    OWN,
    ZeroDivisionError("x"),
    caused_by(OWN),
    WorkerGroupError("x", {0: OWN, 1: died()}),
    ControllerError(OWN),
    of_ray.ActorDiedError(caused_by(OWN)),
    of_ray.GetTimeoutError("x"),
    MemoryError("x"),
    RuntimeError("gloo: connection closed by peer"),
]


@pytest.mark.parametrize(("error", "words"), LOST)
def test_a_lost_process_takes_one_line(error, words):
    line = explain_lost_process(error)
    assert line is not None
    assert words in line
    assert "\n" not in line
    assert "--memory-gb" in line
    assert "run the same command again" in line


@pytest.mark.parametrize("error", OTHERS)
def test_other_errors_are_not_explained_away(error):
    assert explain_lost_process(error) is None


def test_errors_that_hold_each_other_end():
    one, other = of_ray.RaySystemError("x"), of_ray.RaySystemError("y")
    one.__cause__, other.__cause__ = other, one
    assert explain_lost_process(one) is None


def raising(monkeypatch, error):
    """Let `status` raise an error, and run it."""

    def work(_):
        raise error

    monkeypatch.setattr(table.Command, "load_work", lambda _: work)
    return cli.main(["status", "run"])


def test_the_command_line_says_it_and_no_more(monkeypatch, capsys):
    assert raising(monkeypatch, of_ray.OutOfMemoryError(BY_MEMORY)) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: Ray ended a worker")


def test_the_command_line_keeps_other_tracebacks(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        raising(monkeypatch, ZeroDivisionError("x"))
