"""`scellst-ray models` and `models fetch`: output, checks and notes."""

import hashlib
import json
import random
from dataclasses import replace

import pytest
from rich.console import Console

from scellst_ray.commands import models
from scellst_ray.commands.cli import main
from scellst_ray.commands.models import ModelsFetchConfig, fetch
from scellst_ray.models.weights import catalogue
from scellst_ray.models.weights.fetch import Patience
from tests.support.weights_server import serving

CONTENT = random.Random(1).randbytes(200_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()
QUICK = Patience(tries=2, backoff_s=0.0)
NAME = "resnet50-imagenet"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCELLST_RAY_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "models"


@pytest.fixture
def server():
    with serving(CONTENT) as (url, behaviour):
        behaviour.url = url
        yield behaviour


@pytest.fixture
def entry(server, monkeypatch):
    """Return a function that puts an entry whose file is on the server into the catalogue."""

    def put(record=None, **changes):
        if record is not None:
            server.pages["/record"] = json.dumps({"files": [record]}).encode()
            changes["record"] = f"{server.url}/record"
        known = {"url": f"{server.url}/w.pth", "size": len(CONTENT), "sha256": SHA256} | changes
        made = replace(catalogue.CATALOGUE[NAME], **known)
        monkeypatch.setitem(catalogue.CATALOGUE, NAME, made)
        return made

    return put


def run(**settings):
    """Fetch; return what was said."""
    said = []
    fetch(ModelsFetchConfig(name=NAME, **settings), said.append, patience=QUICK)
    return "\n".join(said)


def paths(behaviour):
    return [path for path, _ in behaviour.requests]


def test_listing(entry, capsys, cache):
    made = entry()
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    for name in catalogue.CATALOGUE:
        assert name in shown
    for part in ("Commons Clause", "zenodo.org/records/15094831", str(cache), "models fetch NAME"):
        assert part in shown
    assert max(len(line) for line in shown.splitlines() if str(cache) not in line) <= 80
    row = next(line for line in shown.splitlines() if NAME in line)
    assert " no " in row
    cache.mkdir()
    made.path.write_bytes(CONTENT)
    assert main(["models"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if NAME in line)
    assert " yes " in row


def test_fetching_from_the_shell(entry, server, capsys, cache):
    made = entry()
    assert main(["models", "fetch", NAME]) == 0
    shown = capsys.readouterr().out
    assert made.licence in shown
    assert f"{NAME} is {cache}/w.pth" in shown
    assert made.path.read_bytes() == CONTENT
    assert catalogue.weights_path(NAME) == str(made.path)
    received = json.loads(made.lock_path.read_text())
    assert {k: received[k] for k in ("size", "sha256", "md5", "url")} == {
        "size": len(CONTENT),
        "sha256": SHA256,
        "md5": MD5,
        "url": made.url,
    }
    # Again: nothing is asked for, and a name may be a flag as well.
    server.requests.clear()
    assert main(["models", "fetch", f"--name={NAME}"]) == 0
    assert "in the cache already, and complete" in capsys.readouterr().out
    assert server.requests == []


@pytest.mark.usefixtures("entry")
def test_unknown_names_and_wrong_digests_are_one_line(capsys):
    assert main(["models", "fetch", "resnet50-imagnet"]) == 1
    assert "Did you mean 'resnet50-imagenet'?" in capsys.readouterr().err
    assert main(["models", "fetch", NAME, "--sha256", "abc"]) == 1
    shown = capsys.readouterr().err
    assert shown == "error: sha256 is 'abc'; give the 64 hex digits of a SHA-256\n"


def test_an_altered_file_is_refused(entry, server):
    made = entry(sha256="0" * 64)
    with pytest.raises(ValueError, match=f"its SHA-256 is {SHA256}, expected 0000"):
        run()
    assert not made.path.exists()
    assert not made.lock_path.exists()
    # A digest of one's own goes over the catalogue's, whatever the size it knows.
    made = entry(sha256="0" * 64, size=5)
    assert f"expected: {SHA256}" in run(sha256=SHA256.upper())
    assert made.path.read_bytes() == CONTENT
    assert made.is_here
    # From then on it is the one that counts.
    made.path.unlink()
    server.content = CONTENT[::-1]
    with pytest.raises(
        ValueError, match=f"expected {SHA256}; .*the digest is that of .*w.pth.json"
    ):
        run()
    server.content = CONTENT
    assert "SHA-256" in run()


def test_what_was_fetched_once_is_what_comes_again(entry, server):
    made = entry(sha256=SHA256[:16])
    run()
    made.path.unlink()
    # The same first digits are not enough once all of them are known.
    locked = json.loads(made.lock_path.read_text())
    other = SHA256[:16] + "0" * 48
    made.lock_path.write_text(json.dumps(locked | {"sha256": other}))
    with pytest.raises(ValueError, match=f"expected {other}"):
        run()
    assert not made.path.exists()
    assert server.requests


def test_a_file_put_there_by_hand_is_checked_and_written_down(entry, server, cache):
    made = entry()
    cache.mkdir()
    made.path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(ValueError, match=r"w.pth: its SHA-256 is .*; remove it to fetch it again"):
        run()
    made.path.write_bytes(CONTENT)
    assert "in the cache already" in run()
    assert json.loads(made.lock_path.read_text())["sha256"] == SHA256
    assert server.requests == []


def test_the_record_is_asked_too(entry, server):
    entry({"key": "w.pth", "size": len(CONTENT), "checksum": f"md5:{MD5}"})
    run()
    assert paths(server) == ["/record", "/w.pth"]


def test_a_file_that_is_not_the_records(entry):
    made = entry({"key": "w.pth", "size": len(CONTENT), "checksum": f"md5:{'0' * 32}"})
    with pytest.raises(ValueError, match=f"its MD5 is {MD5}, expected 0000"):
        run()
    assert not made.path.exists()


def test_a_record_that_has_another_file_than_the_catalogue(entry):
    record = {"key": "w.pth", "size": len(CONTENT), "checksum": f"md5:{MD5}"}
    made = entry(record, sha256="1" * 64)
    with pytest.raises(ValueError, match=f"that of the record.*--sha256 {SHA256} acc"):
        run()
    assert not made.path.exists()
    run(sha256=SHA256)
    assert made.path.read_bytes() == CONTENT


def test_a_record_with_a_file_of_another_size(entry, server):
    entry({"key": "w.pth", "size": 7, "checksum": f"md5:{MD5}"})
    with pytest.raises(ValueError, match="states 7 bytes, this release knows a file of 200,000"):
        run()
    assert paths(server) == ["/record"]


def test_without_the_record_the_digest_has_to_do(entry, server):
    made = entry(record={})
    server.statuses = [404]
    said = run()
    assert "the server answered 404" in said
    assert "checking the SHA-256 alone" in said
    assert made.path.read_bytes() == CONTENT


def test_a_mirror_is_held_to_the_same_digest(entry, server):
    made = entry({"key": "w.pth", "size": len(CONTENT), "checksum": f"md5:{MD5}"})
    run(url=f"{server.url}/mirror/of/it")
    assert paths(server) == ["/mirror/of/it"]
    assert made.path.read_bytes() == CONTENT
    assert json.loads(made.lock_path.read_text())["url"].endswith("/mirror/of/it")


def test_no_network_is_one_line(entry, capsys, monkeypatch):
    entry(url="http://127.0.0.1:9/w.pth")
    monkeypatch.setattr("scellst_ray.models.weights.fetch.Patience", lambda: QUICK)
    assert main(["models", "fetch", NAME]) == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("error: http://127.0.0.1:9/w.pth: ")
    assert "check the address and the network" in shown


def test_a_bar_is_drawn_where_somebody_looks():
    bar, report = models._show_progress(Console(force_terminal=True, record=True), "w.pth")
    with bar:
        report(50, 100)
        assert bar.tasks[0].completed == 50
        assert bar.tasks[0].total == 100
