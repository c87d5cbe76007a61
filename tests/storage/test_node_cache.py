"""The node's cache, with processes that are killed and a store that misbehaves."""

import errno
import fcntl
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from scellst_ray.storage import cache_space
from scellst_ray.storage.node_cache import hold
from tests.support import cached
from tests.support.cache_readers import digest_of, keep, started
from tests.support.cached import copies, limit, use
from tests.support.object_server import serving, wait_until

cache, put = cached.cache, cached.put  # fixtures
pytestmark = pytest.mark.usefixtures("cache")

KB = 1000


# Local files are returned themselves.


def test_a_local_file_is_itself_and_costs_nothing(tmp_path, cache):
    (tmp_path / "s.tif").write_bytes(b"x")
    for uri in (str(tmp_path / "s.tif"), f"file://{tmp_path}/s.tif"):
        with hold(uri) as held:
            assert held.path == tmp_path / "s.tif"
            assert not held.is_copy
        held.close()
    assert use(str(tmp_path / "s.tif")) == b"x"
    with pytest.raises(FileNotFoundError, match=r"gone.tif: no such file"):
        hold(str(tmp_path / "gone.tif"))
    assert not cache.exists()


def test_an_object_is_downloaded_once_and_again_when_it_changed(cache):
    with serving({"a b.svs": b"first" * KB}) as (address, objects):
        for _ in range(3):
            with hold(f"{address}/a b.svs") as held:
                assert held.path.name == "a b.svs"
                assert held.path.read_bytes() == b"first" * KB
        assert objects.gets() == 1
        objects.files["/a b.svs"] = b"other" * KB  # as many bytes
        assert use(f"{address}/a b.svs") == b"other" * KB
        assert objects.gets() == 2
    assert copies(cache) == ["a b.svs", "a b.svs"]


def test_a_store_without_etags_and_one_without_sizes(put, monkeypatch):
    uri = put("s.svs", b"1")
    assert use(uri) == b"1"
    put("s.svs", b"2")
    assert use(uri) == b"2"
    ask = MemoryFileSystem.info
    monkeypatch.setattr(MemoryFileSystem, "info", lambda *a: ask(*a) | {"size": None})
    assert use(uri) == b"2"
    assert use(uri) == b"2"


def test_folders_and_missing_objects_are_refused(put, tmp_path):
    put("folder/s.svs", b"x")
    with pytest.raises(IsADirectoryError, match="folder: a folder; give a file"):
        hold(f"memory://{tmp_path.name}/folder")
    with pytest.raises(FileNotFoundError, match=r"memory://.*/gone.svs: no such file"):
        hold(f"memory://{tmp_path.name}/gone.svs")


@pytest.mark.parametrize("name", ["x" * 200 + ".svs", ".hidden", "µ" * 100 + ".tiff"])
def test_any_name_can_be_a_file(put, name):
    with hold(put(name, b"x")) as held:
        assert held.path.read_bytes() == b"x"
        assert held.path.suffix == Path(name).suffix


def test_an_object_that_changes_while_it_comes_is_fetched_again(put, monkeypatch, cache):
    uri = put("s.svs", b"old")
    fetch, times = MemoryFileSystem.get_file, []

    def and_change(self, *args, **kwargs):
        fetch(self, *args, **kwargs)
        times.append(1)
        if len(times) <= changes:
            put("s.svs", b"new")

    monkeypatch.setattr(MemoryFileSystem, "get_file", and_change)
    changes = 1
    assert use(uri) == b"new"
    assert len(times) == 2
    assert copies(cache) == ["s.svs"]
    changes = 100
    put("s.svs", b"old")
    with pytest.raises(ConnectionError, match="changed, or was dropped, 6 times"):
        hold(uri)
    assert copies(cache) == ["s.svs"]


# Several processes.


def test_several_processes_download_once():
    content = os.urandom(300 * KB)
    with serving({"s.svs": content}) as (address, objects):
        # Nothing is sent until all have asked, so that all wait at the same time.
        objects.when = lambda: wait_until(lambda: objects.asked.count(("HEAD", "/s.svs")) >= 3)
        children = [started(digest_of, f"{address}/s.svs") for _ in range(3)]
        assert {answers.get() for _, answers in children} == {hashlib.sha256(content).hexdigest()}
        for process, _ in children:
            process.kill()
            process.join()
        assert objects.gets() == 1


def test_who_waited_for_a_download_looks_again(monkeypatch):
    both, lock_file = threading.Barrier(2), cache_space.lock_file

    def together(lock, how, path):
        lock_file(lock, how, path)
        if how == fcntl.LOCK_SH and not objects.gets():
            both.wait(20)  # both have seen that there is no copy

    monkeypatch.setattr(cache_space, "lock_file", together)
    with serving({"s.svs": b"s" * KB}) as (address, objects), ThreadPoolExecutor(2) as pool:
        assert list(pool.map(use, [f"{address}/s.svs"] * 2)) == [b"s" * KB] * 2
        assert objects.gets() == 1


def test_a_killed_download_is_begun_anew_by_who_waits(cache):
    content = os.urandom(3000 * KB)
    with serving({"s.svs": content}) as (address, objects):
        objects.go_on.clear()
        first, _ = started(digest_of, f"{address}/s.svs")
        objects.half_sent.wait(20)
        wait_until(lambda: any(p.stat().st_size for p in (cache / "files").glob("*/.s.svs.part")))
        second, answers = started(digest_of, f"{address}/s.svs")
        wait_until(lambda: objects.asked.count(("HEAD", "/s.svs")) >= 2)
        first.kill()
        first.join()
        objects.go_on.set()
        assert answers.get() == hashlib.sha256(content).hexdigest()
        second.join()
        assert objects.gets() == 2
        assert use(f"{address}/s.svs") == content
        assert objects.gets() == 2
    assert copies(cache) == ["s.svs"]


def test_what_another_process_reads_stays_until_it_is_killed(put, cache, monkeypatch):
    with serving({"read.svs": b"r" * 600}) as (address, _):
        reader, answers = started(keep, f"{address}/read.svs")
        path = Path(answers.get())
        limit(monkeypatch, 1000)
        use(put("a.svs", b"a" * 600))
        assert path.read_bytes() == b"r" * 600
        use(put("b.svs", b"b" * 600))
        assert copies(cache) == ["b.svs", "read.svs"]
        reader.kill()
        reader.join()
        use(put("c.svs", b"c" * 600))
        assert copies(cache) == ["c.svs"]


def test_a_folder_without_locks_is_named(put, cache, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    message = f"{cache}/locks/.*: cannot be locked .*; set SCELLST_RAY_CACHE_DIR"
    with pytest.raises(OSError, match=message):
        hold(put("a", b"a"))


# A store that misbehaves.


def test_passing_errors_are_survived(caplog):
    content = os.urandom(200 * KB)
    faults = [503, "reset", "cut", 429, 500]
    with serving({"s.svs": content}) as (address, objects):
        objects.faults = list(faults)
        assert use(f"{address}/s.svs") == content
        assert objects.gets() == 6
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 5
    assert all("/s.svs: " in line and "; will try again in 0.0 s" in line for line in lines)
    assert "503" in lines[0]


def test_passing_errors_are_survived_while_asking_what_there_is():
    with serving({"s.svs": b"x"}) as (address, objects):
        # If HEAD fails, fsspec tries GET, and takes any failure of it for a missing file.
        objects.head_faults, objects.faults = [503, "drop"], [503, "drop"]
        assert use(f"{address}/s.svs") == b"x"
        assert objects.asked.count(("HEAD", "/s.svs")) == 4


def test_a_cut_that_no_library_noticed(put, monkeypatch, cache):
    fetch, cuts = MemoryFileSystem.get_file, [5, 0]

    def cut(self, remote_path, path, **kwargs):
        fetch(self, remote_path, path, **kwargs)
        if cuts:
            os.truncate(path, cuts.pop())

    monkeypatch.setattr(MemoryFileSystem, "get_file", cut)
    uri = put("s.svs", b"s" * 10)
    assert use(uri) == b"s" * 10
    cuts.extend([5] * 6)
    with pytest.raises(ConnectionError, match=r"ConnectionError: only 5 of 11 bytes arrived\)"):
        hold(put("s.svs", b"s" * 11))
    assert copies(cache) == ["s.svs"]


def test_lasting_errors_end_and_leave_nothing(cache):
    with serving({"s.svs": b"x" * KB}) as (address, objects):
        signed = address.replace("//", "//me:secret@") + "/s.svs?signature=secret"
        objects.faults = [503] * 6
        with pytest.raises(ConnectionError, match="still failing after 6 tries") as error:
            hold(signed)
        assert objects.gets() == 6
        assert f"{address}/s.svs" in str(error.value)
        assert "secret" not in str(error.value)
        assert error.value.__suppress_context__
        for status, kind in ((403, PermissionError), (404, FileNotFoundError), (400, OSError)):
            objects.faults = [status, None]
            with pytest.raises(kind) as error:
                hold(signed)
            assert "secret" not in str(error.value)
            assert objects.faults == [None]  # not tried again
        assert copies(cache) == []
        assert use(signed) == b"x" * KB
        assert not any("secret" in str(path) for path in cache.rglob("*"))


# Slides.


def test_a_slide_is_held_while_it_is_open(
    synthetic_slide, put, helpers, cells_spec, cache, monkeypatch
):
    from scellst_ray.stages.plan_slide import plan_slide
    from scellst_ray.stages.read import Read

    limit(monkeypatch, 0)
    uri = put("s.tiff", synthetic_slide.slide.read_bytes())
    rows = plan_slide(helpers.slide_row(uri), cells_spec)
    assert len(rows) > 4
    read = Read(cells_spec)
    assert "image" in read(rows[:1])[0]
    use(put("a", b"a"))
    assert copies(cache) == ["a", "s.tiff"]
    assert "image" in read(rows[1:2])[0]
    read.slides.drop(uri, rows[0]["mpp"], rows[0]["source"])
    use(put("b", b"b"))
    assert copies(cache) == ["b"]


# Slides in MRXS; tests on S3 are in test_files_s3.py.


def test_a_file_that_would_lie_elsewhere_is_refused(put, monkeypatch, cache):
    uri = put("s.mrxs", b"jpeg")
    put("s/Index.dat", b"index")
    path = uri.removeprefix("memory:/").removesuffix(".mrxs")
    wrong = {f"{path}/../../evil": {"name": "x", "size": 1}}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: wrong)
    with pytest.raises(OSError, match=r"'\.\./\.\./evil' cannot be a file below it"):
        hold(uri)
    assert not list(cache.rglob("evil"))


def test_the_folder_counts_and_goes_with_its_slide(put, monkeypatch, cache):
    uri = put("s.mrxs", b"s" * 10)
    put("s/Data0000.dat", b"d" * 300)
    put("s/Data0001.dat", b"d" * 300)
    limit(monkeypatch, 1000)
    assert use(uri) == b"s" * 10
    assert sum(path.is_file() for path in cache.rglob("files/**/*")) == 3
    use(put("small", b"x" * 300))
    assert copies(cache) == ["s", "s.mrxs", "small"]
    with hold(uri) as held:  # it is held, so none of its files may go
        use(put("large", b"x" * 700))
        assert (held.path.parent / "s" / "Data0001.dat").stat().st_size == 300
    use(put("larger", b"x" * 900))
    assert copies(cache) == ["larger"]


def test_a_slide_in_mrxs_with_one_bad_file_leaves_nothing(put, monkeypatch, cache):
    uri = put("s.mrxs", b"jpeg")
    put("s/Data0000.dat", b"d" * 300)
    fetch = MemoryFileSystem.get_file

    def refuse(self, remote_path, path, **kwargs):
        if remote_path.endswith(".dat"):
            message = "no"
            raise PermissionError(message)
        fetch(self, remote_path, path, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "get_file", refuse)
    with pytest.raises(PermissionError):
        hold(uri)
    assert copies(cache) == []
    monkeypatch.undo()
