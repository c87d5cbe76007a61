"""Downloads that are cut, altered or refused: a file under its final name is whole."""

import hashlib
import json
import random
import threading

import pytest

from scellst_ray.models.weights import fetch
from scellst_ray.models.weights.digests import ExpectedFile, digests_of
from scellst_ray.models.weights.fetch import Patience, WrongFileError, download, zenodo_file
from tests.support.weights_server import serving

CONTENT = random.Random(0).randbytes(3_000_001)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
RIGHT = ExpectedFile(len(CONTENT), SHA256, hashlib.md5(CONTENT).hexdigest())
BLOCK = 1 << 16
KEPT = 1_000_000 // BLOCK * BLOCK
QUICK = Patience(tries=3, backoff_s=0.0)


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """Bypass proxies of the machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "weights.pth"


def left(target):
    """Return the files next to the target, without the lock, which remains after a download."""
    return sorted(p.name for p in target.parent.iterdir() if not p.name.endswith(".lock"))


def ranges(behaviour):
    return [headers.get("Range") for _, headers in behaviour.requests]


def test_a_download(target):
    seen = []
    with serving(CONTENT) as (url, behaviour):
        found = download(f"{url}/w", target, RIGHT, lambda *state: seen.append(state), QUICK)
    assert target.read_bytes() == CONTENT
    assert left(target) == ["weights.pth"]
    assert found == digests_of(target)
    assert (found.size, found.sha256) == (len(CONTENT), SHA256)
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert ranges(behaviour) == [None]
    assert behaviour.requests[0][1]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("etag", ['"one"', None, 'W/"weak"'])
def test_a_cut_connection_is_taken_up_where_it_was_cut(target, etag):
    with serving(CONTENT, etag=etag, cut_after=[1_500_000, 700_000]) as (url, behaviour):
        download(f"{url}/w", target, RIGHT, patience=QUICK)
    assert target.read_bytes() == CONTENT
    # A cut loses the block that it falls into.
    first = 1_500_000 // BLOCK * BLOCK
    second = first + 700_000 // BLOCK * BLOCK
    assert ranges(behaviour) == [None, f"bytes={first}-", f"bytes={second}-"]
    assert behaviour.sent[2] == len(CONTENT) - second
    # A weak ETag promises nothing about bytes.
    expected = etag if etag == '"one"' else None
    assert [headers.get("If-Range") for _, headers in behaviour.requests[1:]] == [expected] * 2


def test_a_killed_download_leaves_no_file_and_the_next_call_asks_for_the_rest(target):
    with serving(CONTENT, cut_after=[1_000_000, 0, 0, 0]) as (url, behaviour):
        with pytest.raises(ConnectionError, match=f"cut 3 times; {KEPT:,} bytes are kept, and"):
            download(f"{url}/w", target, RIGHT, patience=QUICK)
        assert left(target) == [".weights.pth.part", ".weights.pth.part.json"]
        assert (target.parent / ".weights.pth.part").read_bytes() == CONTENT[:KEPT]
        behaviour.requests.clear()
        behaviour.sent.clear()
        download(f"{url}/w", target, RIGHT, patience=QUICK)
        assert ranges(behaviour) == [f"bytes={KEPT}-"]
        assert behaviour.sent == [len(CONTENT) - KEPT]
    assert target.read_bytes() == CONTENT
    assert left(target) == ["weights.pth"]


def test_a_process_that_dies_between_blocks(target):
    def die(done, _):
        if done > 1_000_000:
            raise KeyboardInterrupt

    with serving(CONTENT) as (url, behaviour):
        with pytest.raises(KeyboardInterrupt):
            download(f"{url}/w", target, RIGHT, die, QUICK)
        assert not target.exists()
        download(f"{url}/w", target, RIGHT, patience=QUICK)
    assert target.read_bytes() == CONTENT
    assert ranges(behaviour)[1] is not None


def test_a_server_without_ranges_sends_all_again(target):
    with serving(CONTENT, ranges=False, cut_after=[2_000_000]) as (url, behaviour):
        download(f"{url}/w", target, RIGHT, patience=QUICK)
    assert target.read_bytes() == CONTENT
    assert behaviour.sent == [2_000_000, len(CONTENT)]


def test_a_file_replaced_between_two_calls_is_sent_again(target):
    other = bytes(reversed(CONTENT))
    with serving(other, etag='"old"', cut_after=[1_000_000, 0, 0, 0]) as (url, behaviour):
        with pytest.raises(ConnectionError):
            download(f"{url}/w", target, RIGHT, patience=QUICK)
        behaviour.content, behaviour.etag = CONTENT, '"new"'
        download(f"{url}/w", target, RIGHT, patience=QUICK)
    assert target.read_bytes() == CONTENT


def test_without_a_validator_the_digest_finds_a_mixture(target):
    other = bytes(reversed(CONTENT))
    with serving(other, etag=None, cut_after=[1_000_000, 0, 0, 0]) as (url, behaviour):
        with pytest.raises(ConnectionError):
            download(f"{url}/w", target, RIGHT, patience=QUICK)
        behaviour.content = CONTENT
        with pytest.raises(WrongFileError, match="its MD5 is"):
            download(f"{url}/w", target, RIGHT, patience=QUICK)
        assert left(target) == []
        download(f"{url}/w", target, RIGHT, patience=QUICK)
    assert target.read_bytes() == CONTENT


def test_another_address_starts_again(target):
    with serving(CONTENT, cut_after=[1_000_000, 0, 0, 0]) as (url, behaviour):
        with pytest.raises(ConnectionError):
            download(f"{url}/w", target, RIGHT, patience=QUICK)
        download(f"{url}/mirror", target, RIGHT, patience=QUICK)
    assert ranges(behaviour)[-1] is None
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("note", [None, "{cut"])
def test_a_part_without_a_readable_note_is_not_trusted(target, note):
    target.parent.mkdir()
    (target.parent / ".weights.pth.part").write_bytes(b"x" * 100)
    if note:
        (target.parent / ".weights.pth.part.json").write_text(note)
    with serving(CONTENT) as (url, behaviour):
        download(f"{url}/w", target, RIGHT, patience=QUICK)
    assert ranges(behaviour) == [None]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(("size", "asked"), [(len(CONTENT), 1), (len(CONTENT) + 5, 2)])
def test_a_part_that_is_complete_or_too_long(target, size, asked):
    """A crash just before the rename leaves a complete part, a longer file leaves too much."""
    target.parent.mkdir()
    with serving(CONTENT, etag=None) as (url, behaviour):
        part = target.parent / ".weights.pth.part"
        part.write_bytes((CONTENT + b"12345")[:size])
        note = {"url": f"{url}/w", "validator": ""}
        (target.parent / ".weights.pth.part.json").write_text(json.dumps(note))
        download(f"{url}/w", target, RIGHT, patience=QUICK)
        assert len(behaviour.requests) == asked
    assert target.read_bytes() == CONTENT


def test_passing_faults_of_the_server(target):
    with serving(CONTENT, statuses=[503, 429, 500]) as (url, behaviour):
        download(f"{url}/w", target, RIGHT, patience=QUICK)
    assert len(behaviour.requests) == 4
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("statuses", "message"),
    [
        ([404], "the server answered 404 Not Found; check the address"),
        ([403], "the server answered 403 Forbidden; check the address"),
        (
            [503] * 9,
            "the server answered 503 Service Unavailable; check the address and the network",
        ),
    ],
)
def test_a_server_that_refuses(target, statuses, message):
    with (
        serving(CONTENT, statuses=statuses) as (url, _),
        pytest.raises(ConnectionError, match=message),
    ):
        download(f"{url}/w", target, RIGHT, patience=QUICK)
    assert left(target) == []


def test_nobody_there(target):
    with serving(CONTENT) as (url, _):
        pass
    with pytest.raises(ConnectionError, match=r"127.0.0.1.*check the address and the network"):
        download(f"{url}/w", target, RIGHT, patience=Patience(1, 0.0))


@pytest.mark.parametrize("tells_length", [True, False])
def test_an_altered_file_never_appears(target, tells_length):
    altered = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with serving(altered, tells_length=tells_length) as (url, _):
        expected = ExpectedFile(len(CONTENT), SHA256)
        with pytest.raises(
            WrongFileError, match=r"its SHA-256 is .*it was removed, check the address"
        ) as refused:
            download(f"{url}/w", target, expected, patience=QUICK)
    assert refused.value.found.sha256 == hashlib.sha256(altered).hexdigest()
    assert left(target) == []


def test_a_file_of_the_wrong_length_is_not_even_downloaded(target):
    with (
        serving(CONTENT[:-1]) as (url, behaviour),
        pytest.raises(ValueError, match="file has 3,000,000 bytes, expected 3,000,001"),
    ):
        download(f"{url}/w", target, RIGHT, patience=QUICK)
    assert left(target) == []
    assert len(behaviour.requests) == 1


def test_a_server_that_does_not_tell_the_length(target):
    with serving(CONTENT, tells_length=False, cut_after=[1_000_000]) as (url, behaviour):
        # A cut answer looks complete; only the known size shows the cut.
        download(f"{url}/w", target, RIGHT, patience=QUICK)
    assert target.read_bytes() == CONTENT
    assert ranges(behaviour) == [None, "bytes=1000000-"]


def test_a_full_disk_is_noticed_before_the_download(target, monkeypatch):
    usage = type("Usage", (), {"free": 2_000_000})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage)
    with (
        serving(CONTENT) as (url, _),
        pytest.raises(OSError, match="3,000,001 bytes are missing and 2,000,000 are free; free"),
    ):
        download(f"{url}/w", target, RIGHT, patience=QUICK)
    assert left(target) == []


def test_two_at_once(target):
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert go_on.wait(20)

    with serving(CONTENT) as (url, _):
        first = threading.Thread(
            target=download, args=(f"{url}/w", target, RIGHT, wait, QUICK), daemon=True
        )
        first.start()
        assert inside.wait(20)
        with pytest.raises(OSError, match="another process is downloading it"):
            download(f"{url}/w", target, RIGHT, patience=QUICK)
        go_on.set()
        first.join(20)
    assert target.read_bytes() == CONTENT


RECORD = {"files": [{"key": "a.pth", "size": 7, "checksum": "md5:0123", "links": {}}]}


def test_what_a_zenodo_record_states():
    page = {"/api/records/1": json.dumps(RECORD).encode(), "/html": b"<html>", "/list": b"[]"}
    with serving(b"", pages=page) as (url, behaviour):
        assert zenodo_file(f"{url}/api/records/1", "a.pth", QUICK) == ExpectedFile(7, None, "0123")
        with pytest.raises(ValueError, match=r"has no file b.pth; it has a.pth"):
            zenodo_file(f"{url}/api/records/1", "b.pth", QUICK)
        for name in ("html", "list"):
            with pytest.raises(ValueError, match="the answer is not a Zenodo record"):
                zenodo_file(f"{url}/{name}", "a.pth", QUICK)
        behaviour.statuses = [404]
        with pytest.raises(ConnectionError, match=r"cannot be read \(the server answered 404"):
            zenodo_file(f"{url}/api/records/1", "a.pth", QUICK)
