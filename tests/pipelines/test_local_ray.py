"""A local Ray is for this user and this machine alone."""

import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from scellst_ray.pipelines import local_ray
from scellst_ray.pipelines.ray_internals import LONGEST_TEMP_DIR

PROGRAM = """
    import json, os, psutil, ray
    from scellst_ray.pipelines.session import ray_session

    with ray_session(num_cpus=1, dashboard=True):
        ray.get(ray.remote(lambda: 1).remote())
        me = psutil.Process()
        listening = {
            connection.laddr.ip.removeprefix("::ffff:")
            for process in [me, *me.children(recursive=True)]
            for connection in process.net_connections("inet")
            if connection.status == "LISTEN"
        }
        session = ray.get_runtime_context().get_session_name()
        print(json.dumps([sorted(listening), session]))
"""


@pytest.mark.ray
def test_it_listens_on_loopback_and_its_folder_is_closed():
    # The path is short, because it holds sockets.
    with tempfile.TemporaryDirectory(prefix="r") as name:
        Path(name).chmod(0o755)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"RAY_TMPDIR": name, "HOME": name}
        program = "\n".join(line[4:] for line in PROGRAM.splitlines())
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=240,
        )
        listening, session = json.loads(run.stdout.splitlines()[-1])
        closed = Path(name, f"scellst_{os.getuid()}")
        assert (closed / "ray" / session / "sockets").is_dir()
        assert mode_of(closed) == 0o700
        assert mode_of(Path(name, ".ray", "auth_token")) == 0o600
    assert listening == ["127.0.0.1"]


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def shared(monkeypatch):
    """Return a short folder in which all users may write, as /tmp, and make it the only one."""
    with tempfile.TemporaryDirectory(prefix="s") as name:
        Path(name).chmod(0o1777)
        monkeypatch.setenv("RAY_TMPDIR", name)
        yield Path(name)


def test_ray_lies_in_a_closed_folder_of_a_shared_one(shared):
    closed = shared / f"scellst_{os.getuid()}"
    assert local_ray.temp_dir() == closed / "ray"
    assert mode_of(closed) == 0o700


def test_an_own_folder_is_taken_as_it_is(shared):
    shared.chmod(0o700)
    assert local_ray.temp_dir() == shared / "ray"
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize("fault", ["open", "link"])
def test_a_folder_of_somebody_else_is_refused(shared, tmp_path, fault):
    closed = shared / f"scellst_{os.getuid()}"
    if fault == "open":
        closed.mkdir()
        closed.chmod(0o777)
    else:
        closed.symlink_to(tmp_path)
    with pytest.raises(PermissionError, match=f"^{closed}: .*set RAY_TMPDIR to a short folder"):
        local_ray.temp_dir()


def test_a_long_temporary_folder_gives_way_to_tmp(monkeypatch, tmp_path):
    long = tmp_path / "scratch" / "jobs" / "1355700.cluster-head.example.org"
    long.mkdir(parents=True)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    found = local_ray.temp_dir()
    assert found == Path(f"/tmp/scellst_{os.getuid()}/ray")
    assert len(str(found)) <= LONGEST_TEMP_DIR


@pytest.mark.parametrize("length", [LONGEST_TEMP_DIR, 60, 200])
def test_a_long_folder_that_was_given_is_named(monkeypatch, length):
    given = "/" + "x" * (length - 1)
    monkeypatch.setenv("RAY_TMPDIR", given)
    with pytest.raises(ValueError, match=f"RAY_TMPDIR is {given}, too long") as raised:
        local_ray.temp_dir()
    longest = int(str(raised.value).split()[-2])
    monkeypatch.setattr(local_ray, "make_private_folder", lambda *_: None)
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * (longest - 1))
    assert len(str(local_ray.temp_dir())) == LONGEST_TEMP_DIR


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return a home whose user has no token; the umask lets all users read."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in local_ray.TOKEN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = os.umask(0o022)
    yield tmp_path
    os.umask(before)


def test_a_token_is_made_for_this_user_alone_and_kept(home):
    token = home / ".ray" / "auth_token"
    local_ray.close_token()
    assert mode_of(token) == 0o600
    assert mode_of(token.parent) == 0o700
    text = token.read_text()
    assert len(text) == 64
    local_ray.close_token()
    assert token.read_text() == text


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o666, 0o604])
def test_a_token_that_others_can_read_is_closed(home, mode):
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("abc")
    token.chmod(mode)
    local_ray.close_token()
    assert (mode_of(token), token.read_text()) == (0o600, "abc")


@pytest.mark.parametrize("name", local_ray.TOKEN_VARIABLES)
def test_a_token_that_was_given_needs_no_other(home, monkeypatch, name):
    monkeypatch.setenv(name, "x")
    local_ray.close_token()
    assert list(home.iterdir()) == []


def test_a_home_that_cannot_be_written_is_left_to_ray(home, monkeypatch):
    (home / "file").write_text("")
    monkeypatch.setenv("HOME", str(home / "file"))
    local_ray.close_token()
    assert (home / "file").read_text() == ""


def test_a_temporary_folder_that_is_not_ascii_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/läufe/tmp")
    assert local_ray.temp_dir() == Path("/tmp", f"scellst_{os.getuid()}", "ray")
    for name in ("/läufe", "/実験", str(tmp_path / "e\u0301")):
        monkeypatch.setenv("RAY_TMPDIR", name)
        with pytest.raises(ValueError, match=f"RAY_TMPDIR is {name}, .*with an ASCII path"):
            local_ray.temp_dir()
