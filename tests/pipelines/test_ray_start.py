"""A Ray that cannot be joined or started ends in a line with the variable and the remedy."""

import os
import socket
import subprocess
import sys

import pytest

from scellst_ray.pipelines.ray_start import ExplainedStart, cluster_address
from tests.support.paths import ROOT


@pytest.fixture
def address(monkeypatch):
    """Return a function that sets RAY_ADDRESS."""
    return lambda value: monkeypatch.setenv("RAY_ADDRESS", value)


@pytest.mark.parametrize("value", ["", "local", " "])
def test_no_cluster_to_join(address, value):
    address(value)
    assert cluster_address() == ""


def test_an_address_that_answers_is_taken(address):
    with socket.create_server(("127.0.0.1", 0)) as server:
        value = f"127.0.0.1:{server.getsockname()[1]}"
        address(value)
        assert cluster_address() == value
    address("auto")
    assert cluster_address() == "auto"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("http://127.0.0.1:8265", "a job server: submit the command with `ray job submit`"),
        ("https://ray.example.com", "a job server"),
        ("ray://127.0.0.1:10001", "expected HOST:PORT of a Ray head"),
        ("127.0.0.1", "expected HOST:PORT"),
        ("127.0.0.1:port", "expected HOST:PORT"),
        (":6379", "expected HOST:PORT"),
    ],
)
def test_what_is_no_address_of_a_cluster(address, value, reason):
    address(value)
    with pytest.raises(ValueError, match="RAY_ADDRESS is") as refused:
        cluster_address()
    assert reason in str(refused.value)
    assert "unset" in str(refused.value)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::1]", "no-such-host.invalid", "a" * 70, "127.0.0.1:9"]
)
def test_an_address_where_nothing_listens(address, host):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address(f"{host}:{port}")
    with pytest.raises(ConnectionError, match=r"no Ray can be joined there .*; start the"):
        cluster_address()


@pytest.mark.parametrize("port", ["99999", "9" * 30])
def test_a_port_that_cannot_be(address, port):
    address(f"127.0.0.1:{port}")
    with pytest.raises(ConnectionError, match="correct RAY_ADDRESS"):
        cluster_address()


class RayError(Exception):
    """Stands for one of Ray's errors, which have no common base."""


@pytest.mark.parametrize(
    "error", [RayError("a\nb"), RuntimeError("Version mismatch"), OSError("x")]
)
def test_errors_of_the_start_become_a_line(monkeypatch, error):
    monkeypatch.setenv("TMPDIR", "/scratch/läufe")
    with pytest.raises(ConnectionError) as refused, ExplainedStart(""):
        raise error
    line = str(refused.value)
    assert line.startswith(f"Ray did not start on this machine: {str(error)[0]}")
    assert "set RAY_TMPDIR to a short folder" in line
    assert "TMPDIR is /scratch/läufe" in line
    assert "\n" not in line
    with (
        pytest.raises(ConnectionError, match=r"RAY_ADDRESS is 10\.0\.0\.1:6379, and no Ray can be"),
        ExplainedStart("10.0.0.1:6379"),
    ):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), ValueError("RAY_TMPDIR is")])
def test_what_has_its_own_words_passes(error):
    with pytest.raises(type(error)) as passed, ExplainedStart(""):
        raise error
    assert passed.value is error


def test_a_start_that_does_not_end_ends_the_process():
    code = (
        "import time; from scellst_ray.pipelines.ray_start import ExplainedStart\n"
        "with ExplainedStart('10.0.0.1:6379', limit_s=0.2): time.sleep(600)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("error: RAY_ADDRESS is 10.0.0.1:6379, and no Ray can be joined")
    assert run.stderr.count("\n") == 1
