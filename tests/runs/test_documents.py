import json
import os
from typing import NotRequired, TypedDict

import pytest

from scellst_ray import storage
from scellst_ray.runs.documents import (
    checked_record,
    mismatch,
    parse_document,
    parse_lease,
    publish_document,
    publish_sources,
    read_document,
    read_records,
    read_sources,
    warn_once,
)
from scellst_ray.runs.records import (
    CropIndex,
    CropRecord,
    LeaseInfo,
    RunInfo,
    SlideRecord,
    SlideSource,
)

RECORD = {"slide_id": "S", "status": "done", "num_cells": 5, "tables": ["CELLS"], "mpp": 0.5}
KEYS = ("slide_id", "status")
DAMAGED = {
    "empty": b"",
    "blank": b" \n",
    "cut": b'{"slide_id": "S", "status',
    "not UTF-8": b'{"slide_id": "\xff\xfe"}',
    "null": b"null",
    "a list": b"[]",
    "a number": b"5",
    "a text": b'"S"',
    "another shape": b"{}",
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "zeros": b"\0" * 40,
    "another kind of value": b'{"slide_id": 5, "status": "done"}',
    "unknown status": b'{"slide_id": "S", "status": "don\xc3\xa9"}',
    "tables of numbers": b'{"slide_id": "S", "status": "done", "tables": [1]}',
    "a count as text": b'{"slide_id": "S", "status": "done", "num_cells": "5"}',
    "a huge count": b'{"slide_id": "S", "status": "done", "num_cells": 99999999999999999999}',
    "a truth as a count": b'{"slide_id": "S", "status": "done", "num_cells": true}',
    "half a character": b'{"slide_id": "S", "status": "done", "error": "\\ud83d"}',
    "half a character in an unknown key": b'{"slide_id": "S", "status": "done", "x": ["\\uDE00"]}',
    "another slide": b'{"slide_id": "T", "status": "done"}',
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_record_is_no_record_and_named_once(tmp_path, caplog, kind):
    (tmp_path / "S.json").write_bytes(DAMAGED[kind])
    publish_document(f"{tmp_path}/T.json", RECORD | {"slide_id": "T"})
    for _ in range(2):
        assert set(read_records(str(tmp_path), SlideRecord, "it is done again")) == {"T"}
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}/S.json: ")
    assert line.endswith("it is done again")
    with pytest.raises(storage.DamagedFileError, match=r"S\.json"):
        checked_record(f"{tmp_path}/S.json", SlideRecord)


FOREIGN = (
    "Thumbs.db",
    "notes.txt",
    ".DS_Store",
    "S (conflicted copy).json",
    "S.json~",
    "S.json.bak",
    ".S.json.swp",
    "desktop.ini",
    "#S.json#",
    "S.JSON",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_somebody_else_is_passed_over(tmp_path, caplog, name):
    publish_document(f"{tmp_path}/S.json", RECORD)
    (tmp_path / name).write_bytes(b"hello")
    assert read_records(str(tmp_path), SlideRecord, "") == {"S": RECORD}
    assert caplog.messages == []


def test_folders_and_dead_links_are_passed_over(tmp_path, caplog):
    (tmp_path / "T.json").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "U.json").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "V.json")
    assert read_records(str(tmp_path), SlideRecord, "") == {}
    assert caplog.messages == []


def test_a_record_that_may_not_be_read_counts_as_none(tmp_path, caplog, monkeypatch):
    publish_document(f"{tmp_path}/S.json", RECORD)

    def refuse(uri):
        raise PermissionError(13, "Permission denied", uri)

    monkeypatch.setattr(storage, "read_bytes", refuse)
    assert read_records(str(tmp_path), SlideRecord, "done again") == {}
    (line,) = caplog.messages
    assert line == f"{tmp_path}/S.json: cannot be read (Permission denied); done again"


def test_a_store_that_does_not_answer_costs_no_record(monkeypatch):
    publish_document("memory://records/S.json", RECORD)

    def refuse(uri):
        raise ConnectionError(uri)

    monkeypatch.setattr(storage, "read_bytes", refuse)
    with pytest.raises(ConnectionError):
        read_records("memory://records", SlideRecord, "")


def test_a_changed_digit_is_noticed(tmp_path):
    uri = f"{tmp_path}/S.json"
    publish_document(uri, RECORD)
    assert read_document(uri, SlideRecord, needed=KEYS) == RECORD
    content = storage.read_bytes(uri)
    silent = []
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = parse_document(bytes(changed), SlideRecord, uri, "", KEYS)
        except storage.DamagedFileError:
            continue
        # A bit in the name of the checksum itself hides it, and changes nothing else.
        if {key: found.get(key) for key in RECORD} != RECORD:
            silent.append(bytes(changed))
    assert silent == []


def test_unknown_keys_and_documents_without_checksum_are_read(tmp_path):
    (tmp_path / "S.json").write_text(json.dumps(RECORD | {"of_tomorrow": [1]}))
    assert checked_record(f"{tmp_path}/S.json", SlideRecord)["of_tomorrow"] == [1]


@pytest.mark.parametrize("kind", [RunInfo, CropIndex, CropRecord, LeaseInfo])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"5"])
def test_every_document_names_its_file_and_the_remedy(kind, content):
    with pytest.raises(storage.DamagedFileError, match=r"^run/x\.json: is damaged: .*; do this$"):
        parse_document(content, kind, "run/x.json", "do this")


SOURCE = {"uri": "a.tiff", "mpp": None}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b'{"S": 5}', b'{"S": {}}', b'{"S": {"uri": 1, "mpp": null}}']
)
def test_sources(tmp_path, content):
    uri = f"{tmp_path}/slides.json"
    assert read_sources(uri, SlideSource, "mend it") == {}
    storage.publish_json(uri, {"S": SOURCE, "checksum": SOURCE})
    assert read_sources(uri, SlideSource, "mend it") == {"S": SOURCE, "checksum": SOURCE}
    storage.publish_bytes(uri, content)
    with pytest.raises(storage.DamagedFileError, match=r"slides\.json: is damaged: .*; mend it"):
        read_sources(uri, SlideSource, "mend it")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"bytes": 1000', '"bytes": 1004'),
        ('"S":', '"T":'),
        ('"a.tiff"', '"e.tiff"'),
        ('"checksum": "', '"checks5m": "'),
    ],
)
def test_a_changed_entry_of_a_source_is_noticed(tmp_path, old, new):
    uri = f"{tmp_path}/slides.json"
    sources = {"S": {**SOURCE, "bytes": 1000}, "checksum": SOURCE}
    publish_sources(uri, sources)
    assert read_sources(uri, SlideSource, "mend it") == sources
    storage.publish_text(uri, storage.read_text(uri).replace(old, new, 1))
    with pytest.raises(storage.DamagedFileError, match=r"slides\.json: .*entry of slide '.' was"):
        read_sources(uri, SlideSource, "mend it")


def test_an_entry_that_was_removed_is_noticed(tmp_path):
    uri = f"{tmp_path}/slides.json"
    sources = {name: {**SOURCE, "bytes": 7} for name in ("S", "T", "all_slides")}
    publish_sources(uri, sources)
    assert read_sources(uri, SlideSource, "mend it") == sources
    stored = storage.read_json(uri)
    without_one = {name: stored[name] for name in ("S", "all_slides")}
    for content in (without_one, {"S": stored["S"]}):
        storage.publish_json(uri, content)
        with pytest.raises(storage.DamagedFileError, match="an entry was added or removed"):
            read_sources(uri, SlideSource, "mend it")
    # Entries of earlier releases say nothing of each other.
    del stored["S"]["all_slides"]
    storage.publish_json(uri, {"S": stored["S"]})
    assert read_sources(uri, SlideSource, "mend it") == {"S": sources["S"]}


LEASE = {
    **dict.fromkeys(("token", "host", "machine", "process"), "a"),
    **dict.fromkeys(("acquired", "renewed", "expires"), "2026-03-01T12:00:00+00:00"),
    "pid": 7,
    "seconds": 60.0,
}


@pytest.mark.parametrize(
    "change",
    [{"expires": "soon"}, {"acquired": "2026-03-01T12:00:00"}, {"pid": "7"}, {"seconds": None}],
)
def test_a_lease_has_times_with_a_zone(change):
    assert parse_lease(json.dumps(LEASE).encode(), "lease.json") == LEASE
    with pytest.raises(storage.DamagedFileError, match=r"lease\.json: is damaged"):
        parse_lease(json.dumps(LEASE | change).encode(), "lease.json")


class Inner(TypedDict):
    a: int


class Outer(TypedDict):
    inner: NotRequired[Inner]
    many: NotRequired[dict[str, list[float]]]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({}, None),
        ({"inner": {"a": 1, "b": 2}}, None),
        ({"many": {"x": [1, 2.5]}}, None),
        ({"inner": {}}, "inner has no a"),
        ({"inner": {"a": 1.5}}, "a is 1.5, expected int"),
        ({"many": {"x": [1, "2"]}}, "many.x[1] is '2', expected float"),
        ([], "it is [], expected an object"),
        ({"inner": {"a": 2**63 - 1}}, None),
        ({"inner": {"a": 2**63}}, f"a is {2**63}, expected a number of 64 bits"),
    ],
)
def test_mismatch(value, problem):
    assert mismatch(value, Outer) == problem


def test_a_warning_comes_once(caplog, tmp_path):
    for _ in range(3):
        warn_once(f"{tmp_path} is odd")
    assert caplog.messages == [f"{tmp_path} is odd"]
