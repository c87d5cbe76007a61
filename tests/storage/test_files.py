import os
import stat
import subprocess
import sys

import fsspec
import pyarrow as pa
import pytest

from scellst_ray import storage


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    """Yield a folder, on disk and on an object store stand-in."""
    if request.param == "local":
        yield str(tmp_path / "run")
        return
    uri = f"memory://{tmp_path.name}"
    yield uri
    storage.remove_tree(uri)


def test_join_and_is_local(tmp_path):
    assert storage.join("s3://b/run/", "cells", "a.parquet") == "s3://b/run/cells/a.parquet"
    assert storage.is_local(str(tmp_path))
    assert storage.is_local("relative/name")
    assert storage.is_local(f"file://{tmp_path}")
    assert not storage.is_local("memory://x")
    assert storage.resolve("relative")[1] == os.path.abspath("relative")  # noqa: PTH100


def test_publish_json_text_and_table_round_trip(folder):
    value = {"b": [1, 2.5, None], "a": "µm"}
    storage.publish_json(storage.join(folder, "x.json"), value)
    assert storage.read_json(storage.join(folder, "x.json")) == value
    storage.publish_text(storage.join(folder, "deep", "er", "t.txt"), "µ\n")
    assert storage.exists(storage.join(folder, "deep", "er", "t.txt"))
    table = pa.table({"a": [1, 2], "b": ["x", "y"]}).replace_schema_metadata({b"k": b"v"})
    uri = storage.join(folder, "slide_id=7.parquet")  # no partition column is read from a name
    storage.publish_table(uri, table)
    assert storage.read_table(uri).equals(table, check_metadata=True)
    assert storage.read_table(uri, ["b"]).column_names == ["b"]
    assert storage.read_schema(uri).metadata[b"k"] == b"v"


def test_publish_replaces(folder):
    uri = storage.join(folder, "x.txt")
    storage.publish_text(uri, "first and longer")
    storage.publish_text(uri, "second")
    with fsspec.open(uri, "r") as handle:
        assert handle.read() == "second"
    assert storage.list_files(folder) == [uri]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(folder):
    uri = storage.join(folder, "x.txt")
    storage.publish_text(uri, "old")

    def fail(path):
        path.write_text("half")
        message = "disk full"
        raise OSError(message)

    with pytest.raises(OSError, match="disk full"):
        storage.publish(uri, fail)
    with fsspec.open(uri, "r") as handle:
        assert handle.read() == "old"
    fs, path = storage.resolve(folder)
    assert len(fs.ls(path)) == 1


def test_published_files_have_the_usual_mode(tmp_path):
    storage.publish_text(str(tmp_path / "published"), "x")
    (tmp_path / "plain").write_text("x")
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("published", "plain")]
    assert modes[0] == modes[1]


def test_list_files_is_sorted_and_hides_temporaries(folder):
    assert storage.list_files(folder) == []
    for name in ("b", "a", "c"):
        storage.publish_text(storage.join(folder, name), name)
    with fsspec.open(storage.join(folder, ".hidden"), "w") as handle:
        handle.write("x")
    assert storage.list_files(folder) == [storage.join(folder, name) for name in "abc"]


def test_remove_tree(folder):
    storage.publish_text(storage.join(folder, "a", "b"), "x")
    storage.remove_tree(storage.join(folder, "a"))
    assert not storage.exists(storage.join(folder, "a", "b"))
    storage.remove_tree(storage.join(folder, "a"))  # absent: nothing to do


def test_local_copy_of_a_local_file_is_the_file(tmp_path):
    (tmp_path / "s.tif").write_bytes(b"x")
    assert storage.local_copy(str(tmp_path / "s.tif")) == tmp_path / "s.tif"
    assert storage.local_copy(f"file://{tmp_path}/s.tif") == tmp_path / "s.tif"
    with pytest.raises(FileNotFoundError, match=r"gone.tif: no such file"):
        storage.local_copy(str(tmp_path / "gone.tif"))


def test_local_copy_downloads_once_and_follows_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("SCELLST_RAY_CACHE_DIR", str(tmp_path / "cache"))
    uri = f"memory://{tmp_path.name}/slide.tif"
    with fsspec.open(uri, "wb") as handle:
        handle.write(b"first")
    first = storage.local_copy(uri)
    assert first.read_bytes() == b"first"
    assert first.name == "slide.tif"
    first.write_bytes(b"FIRST")  # a second call does not download
    assert storage.local_copy(uri) == first
    assert first.read_bytes() == b"FIRST"
    with fsspec.open(uri, "wb") as handle:
        handle.write(b"other content")
    assert storage.local_copy(uri).read_bytes() == b"other content"
    assert not list((tmp_path / "cache").rglob("*.part"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        storage.local_copy(f"memory://{tmp_path.name}/gone.tif")


def test_a_killed_writers_file_is_known_by_its_name(tmp_path):
    # As after a power cut: nothing is cleaned up.
    code = (
        "import os, sys; from scellst_ray import storage; "
        "storage.publish(sys.argv[1], lambda path: (path.touch(), os._exit(1)))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "a.parquet")]
    assert subprocess.run(words, check=False).returncode == 1
    (left,) = tmp_path.iterdir()
    assert storage.TEMPORARY_NAME.fullmatch(left.name)
    assert storage.list_files(str(tmp_path)) == []
