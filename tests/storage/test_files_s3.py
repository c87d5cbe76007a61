"""Storage on S3, with a real client and a server that misbehaves."""

import json
import logging
import os

import numpy as np
import pyarrow as pa
import pytest
from s3fs import S3FileSystem

from scellst_ray import storage
from scellst_ray.nuclei.imported.tiles import read_tile
from scellst_ray.storage import files, retries
from scellst_ray.storage.node_cache import hold
from tests.support.s3_server import BUCKET, KINDS, serving_s3

ROOT = f"s3://{BUCKET}/run"
MB = 2**20


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Retry only in this package, with hardly any waits."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(S3FileSystem, "retries", 1)


@pytest.fixture(scope="module")
def server():
    with serving_s3(attempts=1) as store:
        yield store


@pytest.fixture
def s3(server):
    """Return the store without faults, and an empty folder in it."""
    storage.remove_tree(ROOT)
    server.planned, server.share = [], 0.0
    server.asked.clear()
    server.failed.clear()
    return server


def methods(store):
    return [method for method, *_ in store.asked]


@pytest.mark.usefixtures("s3")
def test_what_is_published_is_there():
    table = pa.table({"a": np.arange(1000)})
    storage.publish_table(f"{ROOT}/t.parquet", table)
    storage.publish_json(f"{ROOT}/x/a.json", {"a": 1})
    storage.publish_text(f"{ROOT}/x/b.txt", "µ")
    assert storage.read_table(f"{ROOT}/t.parquet").equals(table)
    assert storage.read_json(f"{ROOT}/x/a.json") == {"a": 1}
    assert storage.read_text(f"{ROOT}/x/b.txt") == "µ"
    assert storage.list_files(f"{ROOT}/x") == [f"{ROOT}/x/a.json", f"{ROOT}/x/b.txt"]
    assert storage.list_files(f"{ROOT}/x/a.json") == []
    assert storage.list_files(f"{ROOT}/none") == []
    assert [storage.exists(f"{ROOT}/{name}") for name in ("x", "x/a.json", "y")] == [1, 1, 0]
    storage.remove_tree(f"{ROOT}/x")
    assert not storage.exists(f"{ROOT}/x")
    with pytest.raises(FileNotFoundError, match=r"x/a.json: no such file"):
        storage.read_json(f"{ROOT}/x/a.json")


def test_a_small_file_is_one_request_and_no_bucket_is_asked_for(s3):
    storage.publish_text(f"{ROOT}/a.txt", "a")
    assert methods(s3) == ["PUT"]
    s3.asked.clear()
    with pytest.raises(FileNotFoundError):
        storage.publish_text("s3://no-such-bucket/a.txt", "a")
    assert not [path for method, path, _ in s3.asked if method == "PUT" and path.count("/") < 2]


@pytest.mark.usefixtures("s3")
def test_what_another_process_wrote_is_seen():
    storage.publish_text(f"{ROOT}/a.txt", "a")
    assert storage.list_files(ROOT) == [f"{ROOT}/a.txt"]
    assert not storage.exists(f"{ROOT}/b.parquet")
    import boto3

    table = pa.table({"a": [1]})
    storage.publish_table(f"{ROOT}/c.parquet", table)
    client = boto3.client("s3")
    source = {"Bucket": BUCKET, "Key": "run/c.parquet"}
    client.copy_object(Bucket=BUCKET, Key="run/b.parquet", CopySource=source)
    assert storage.exists(f"{ROOT}/b.parquet")
    assert storage.read_table(f"{ROOT}/b.parquet").equals(table)
    assert len(storage.list_files(ROOT)) == 3
    storage.publish_text(f"{ROOT}/below/d.txt", "d")
    size = len(storage.read_bytes(f"{ROOT}/b.parquet"))
    before = {"cohort/run/a.txt": 1, "cohort/run/b.parquet": size, "cohort/run/below/d.txt": 1}
    assert storage.sizes(ROOT) == before | {"cohort/run/c.parquet": size}
    assert storage.sizes(f"{ROOT}/a.txt") == {"cohort/run/a.txt": 1}
    # The folder was listed before one file was added and another one removed.
    assert storage.list_files(f"{ROOT}/below") == [f"{ROOT}/below/d.txt"]
    client.copy_object(Bucket=BUCKET, Key="run/below/e.parquet", CopySource=source)
    client.delete_object(Bucket=BUCKET, Key="run/below/d.txt")
    assert storage.sizes(f"{ROOT}/below") == {"cohort/run/below/e.parquet": size}
    assert storage.sizes(f"{ROOT}/none") == {}


def test_a_large_file_goes_in_parts_and_appears_at_the_end(s3, monkeypatch):
    content = os.urandom(MB) * 11
    monkeypatch.setattr(files, "PART_BYTES", 5 * MB)
    fs, path = storage.resolve(f"{ROOT}/large.bin")
    storage.publish_text(f"{ROOT}/large.bin", "old")
    s3.asked.clear()
    # The third part fails for good: the old file stays, and nothing is left behind.
    monkeypatch.setattr(retries, "TRIES", 1)
    s3.planned = [None, None, None, 403]
    with pytest.raises(PermissionError, match=r"large.bin: access refused"):
        storage.publish(f"{ROOT}/large.bin", lambda file: file.write_bytes(content))
    assert methods(s3)[-1] == "DELETE"
    assert storage.read_text(f"{ROOT}/large.bin") == "old"
    s3.asked.clear()
    monkeypatch.setattr(retries, "TRIES", 6)
    s3.planned = [None, 500, None, "drop", None, 503]
    storage.publish(f"{ROOT}/large.bin", lambda file: file.write_bytes(content))
    assert storage.read_bytes(f"{ROOT}/large.bin") == content
    assert len(fs.ls(path.rsplit("/", 1)[0])) == 1
    assert any("partNumber=3" in query for *_, query in s3.asked)


def opened(uri):
    with storage.open_parquet(uri) as file:
        return file.read()


def tile(uri):
    return read_tile(uri, 0)


@pytest.mark.parametrize("fault", [fault for fault in KINDS if fault != "slow"])
def test_each_call_survives_each_fault(s3, fault):
    table = pa.table({"a": np.arange(100)})
    calls = [
        lambda: storage.publish_text(f"{ROOT}/a.txt", "a"),
        lambda: storage.publish_table(f"{ROOT}/t.parquet", table),
        lambda: storage.read_text(f"{ROOT}/a.txt") == "a",
        lambda: storage.read_table(f"{ROOT}/t.parquet").equals(table),
        lambda: storage.read_schema(f"{ROOT}/t.parquet").equals(table.schema),
        lambda: opened(f"{ROOT}/t.parquet").equals(table),
        lambda: storage.read_bytes(f"{ROOT}/t.parquet", 0, 4) == b"PAR1",
        lambda: storage.exists(f"{ROOT}/a.txt"),
        lambda: not storage.exists(f"{ROOT}/none.txt"),
        lambda: len(storage.list_files(ROOT)) == 2,
        lambda: storage.list_files(f"{ROOT}/none") == [],
        lambda: hold(f"{ROOT}/a.txt").path.read_text() == "a",
        lambda: storage.remove_tree(f"{ROOT}/t.parquet"),
    ]
    for number, call in enumerate(calls):
        s3.planned = [fault] * 2
        assert call() in (None, True), number
        assert s3.planned == [], number
    assert storage.list_files(ROOT) == [f"{ROOT}/a.txt"]


def test_a_store_that_is_down_is_not_called_empty(s3, monkeypatch):
    monkeypatch.setattr(retries, "TRIES", 3)
    storage.publish_text(f"{ROOT}/a.txt", "a")
    for call in (storage.exists, storage.list_files, storage.read_text, opened, tile):
        s3.planned = [503] * 99
        with pytest.raises(ConnectionError, match="still failing after 3 tries"):
            call(f"{ROOT}/a.txt")
    s3.planned = [403] * 4
    with pytest.raises(PermissionError, match="check the credentials on every node"):
        storage.exists(f"{ROOT}/b.txt")
    s3.planned = []


def test_many_requests_with_a_tenth_failing(s3):
    s3.share = 0.1
    for number in range(60):
        storage.publish_json(f"{ROOT}/{number}.json", number)
    found = [storage.read_json(uri) for uri in storage.list_files(ROOT)]
    assert sorted(found) == list(range(60))
    assert len(s3.failed) >= 6


def test_keys_are_in_no_message_and_no_file(s3, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG, "scellst_ray")
    monkeypatch.setattr(retries, "TRIES", 2)
    s3.planned = [503, 503, 403]
    texts = []
    for _ in range(2):
        with pytest.raises(OSError, match=f"{ROOT}/a.txt: ") as raised:
            storage.publish_text(f"{ROOT}/a.txt", "a")
        texts += [str(raised.value), repr(raised.value)]
    storage.publish_json(f"{ROOT}/a.json", {"uri": ROOT})
    with hold(f"{ROOT}/a.json") as held:
        texts += [str(held.path), held.path.read_text()]
    texts += [caplog.text, *capfd.readouterr()]
    whole = "\n".join(texts)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[name] not in whole
    assert json.loads(held.path.read_text()) == {"uri": ROOT}


# Slides in MRXS: a file, and a folder of the same name.


def write_mrxs(names):
    for name, text in names.items():
        storage.publish_text(f"{ROOT}/{name}", text)


SLIDE = {
    "s.mrxs": "jpeg",
    "s/Slidedat.ini": "[GENERAL]",
    "s/Index.dat": "index",
    "s/deep/Data0000.dat": "pixels",
    "s2/Slidedat.ini": "another's",
}


def tree_of(held):
    folder = held.path.parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_a_slide_in_mrxs_comes_with_its_folder(s3):
    write_mrxs(SLIDE)
    s3.share = 0.2
    expected = {name: text for name, text in SLIDE.items() if not name.startswith("s2")}
    with hold(f"{ROOT}/s.mrxs") as held:
        assert tree_of(held) == expected
        first = held.path
    s3.share = 0.0
    s3.asked.clear()
    with hold(f"{ROOT}/s.mrxs") as held:
        assert held.path == first
    assert set(methods(s3)) <= {"HEAD", "GET"}
    assert not [path for method, path, _ in s3.asked if method == "GET" and path.endswith(".dat")]
    # If any of its files changes, it is another slide.
    storage.publish_text(f"{ROOT}/s/deep/Data0000.dat", "others")
    with hold(f"{ROOT}/s.mrxs") as held:
        assert held.path != first
        assert tree_of(held)["s/deep/Data0000.dat"] == "others"


@pytest.mark.usefixtures("s3")
def test_a_slide_in_mrxs_without_its_folder_is_refused():
    write_mrxs({"s.mrxs": "jpeg", "s2/Slidedat.ini": "another's"})
    with pytest.raises(FileNotFoundError, match=r"run/s/: no files; copy the pixels"):
        hold(f"{ROOT}/s.mrxs")
