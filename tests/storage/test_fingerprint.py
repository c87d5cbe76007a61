"""Fingerprints: another content, size or time is another one, a copy has the same content."""

import os
import shutil

import pytest

from scellst_ray.storage import node_cache
from scellst_ray.storage.fingerprint import (
    BLOCK_BYTES,
    NUM_BLOCKS,
    UNCHANGING,
    Fingerprint,
    changed_of,
    fingerprint_of,
    is_unchanged,
    look,
    of_object,
)
from tests.support import cached
from tests.support.object_server import serving

cache = cached.cache  # a fixture
LARGE = 3 * NUM_BLOCKS * BLOCK_BYTES


def of(path):
    return fingerprint_of(look(path))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.svs"
    path.write_bytes(bytes(range(256)) * (LARGE // 256))
    return path


def test_a_copy_has_the_content_and_another_time(file, tmp_path):
    before = of(file)
    assert (len(before.content), len(before.changed)) == (16, 8)
    copy = tmp_path / "elsewhere" / "b.svs"
    copy.parent.mkdir()
    shutil.copy(file, copy)
    os.utime(copy, ns=(0, 0))
    after = of(copy)
    assert after.content == before.content
    assert after.changed != before.changed
    shutil.copystat(file, copy)
    assert of(copy) == before  # its name does not count


@pytest.mark.parametrize("at", [0, LARGE // 2, LARGE - 1])
def test_another_content_of_the_same_size_and_time(file, at):
    before, stat = of(file), file.stat()
    content = bytearray(file.read_bytes())
    for place in range(max(0, at - 2 * 3 * BLOCK_BYTES), min(LARGE, at + 2 * 3 * BLOCK_BYTES)):
        content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = of(file)
    assert after.changed == before.changed
    assert after.content != before.content


@pytest.mark.parametrize("size", [0, 1, 5000, BLOCK_BYTES, BLOCK_BYTES * NUM_BLOCKS])
def test_every_byte_of_a_small_file_counts(tmp_path, size):
    path = tmp_path / "a.png"
    path.write_bytes(bytes(size))
    found = {of(path).content}
    places = {0, size // 3, size // 2, size - 1} if size else set()
    for place in places:
        content = bytearray(size)
        content[place] = 1
        path.write_bytes(content)
        found.add(of(path).content)
    path.write_bytes(bytes(size + 1))  # it grew
    assert len({*found, of(path).content}) == len(places) + 2


def test_a_file_that_changed_is_noticed_without_reading(file, tmp_path):
    files = look(file)
    assert is_unchanged(files)
    os.utime(file)
    assert not is_unchanged(files)
    assert changed_of(look(file)) != changed_of(files)
    files, stat = look(file), file.stat()
    other = tmp_path / "other"
    other.write_bytes(bytes(LARGE))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)  # size and time are the same, the file is another one
    assert changed_of(look(file)) == changed_of(files)
    assert not is_unchanged(files)
    file.unlink()
    assert not is_unchanged(files)
    with pytest.raises(FileNotFoundError):
        look(file)


def dicom(series, rest=b""):
    """Return the beginning of a DICOM file."""
    uid = series.encode() + b"\0" * (len(series) % 2)
    tag = b"\x20\x00\x0e\x00UI" + len(uid).to_bytes(2, "little")
    return b"\0" * 128 + b"DICM" + tag + uid + b"\x20\x00\x11\x00IS" + rest


SEVERAL = {
    "s.mrxs": {"s.mrxs": b"m", "s/Slidedat.ini": b"[x]", "s/Data0000.dat": b"pixels"},
    "a.dcm": {"a.dcm": dicom("1.2"), "b.dcm": dicom("1.2", b"level 2")},
    "s.vms": {"s.vms": b"[Virtual]\nImageFile=s.jpg\nMap = m.jpg\n", "s.jpg": b"j", "m.jpg": b"m"},
    "s.zarr": {"s.zarr/.zattrs": b"{}", "s.zarr/0/0.0": b"chunk", "s.zarr/0/.zarray": b"{}"},
}


@pytest.mark.parametrize("main", SEVERAL)
def test_a_slide_of_several_files_is_all_of_them(tmp_path, main):
    for name, content in SEVERAL[main].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    # What lies next to it and is no part of it.
    (tmp_path / "other.jpg").write_bytes(b"x")
    (tmp_path / "other.dcm").write_bytes(dicom("9.9"))
    before = of(tmp_path / main)
    (tmp_path / "other.jpg").write_bytes(b"xx")
    (tmp_path / "other.dcm").write_bytes(dicom("9.9.9"))
    assert of(tmp_path / main) == before
    for name, content in SEVERAL[main].items():
        files, path = look(tmp_path / main), tmp_path / name
        path.write_bytes(content[:-1] + b"?")
        os.utime(path, ns=(1, 1))
        assert not is_unchanged(files), name
        after = of(tmp_path / main)
        if main != "s.vms" or name != main:  # a name in it has changed, too
            assert after.content != before.content, name
        path.write_bytes(content)
    assert of(tmp_path / main).content == before.content


def test_a_folder_of_thousands_of_files(tmp_path):
    folder = tmp_path / "s.zarr"
    for number in range(300):
        (folder / str(number % 7)).mkdir(parents=True, exist_ok=True)
        (folder / str(number % 7) / str(number)).write_bytes(b"%d" % number)
    before = of(folder)
    (folder / "6" / "300").write_bytes(b"new")
    assert of(folder).content != before.content


def test_sources_name_a_file():
    mark = Fingerprint("c" * 16, "1" * 8)
    assert str(mark) == "cccccccccccccccc-11111111"
    assert mark.is_that_of(f"{mark}-rest")
    touched = Fingerprint("c" * 16, "2" * 8)
    assert not touched.is_that_of(f"{mark}-rest")
    assert touched.has_content_of(f"{mark}-rest")
    assert not Fingerprint("d" * 16).has_content_of(f"{mark}-rest")
    assert of_object(["5", "etag"]).changed == UNCHANGING
    assert of_object(["5", "etag"]) != of_object(["6", "etag"])


def test_an_object_is_known_by_what_its_store_says(tmp_path, cache):  # noqa: ARG001
    with serving({"a.svs": b"first", "b/copy.svs": b"first"}) as (address, objects):
        first = node_cache.fingerprint(f"{address}/a.svs")
        assert objects.gets() == 0
        assert node_cache.fingerprint(f"{address}/b/copy.svs") == first
        with node_cache.hold(f"{address}/a.svs") as held:
            assert held.mark == first
        objects.files["/a.svs"] = b"other"  # as many bytes
        second = node_cache.fingerprint(f"{address}/a.svs")
        assert second.content != first.content
        objects.etags["/a.svs"] = objects.etags["/b/copy.svs"] = None
        assert node_cache.fingerprint(f"{address}/a.svs").content != second.content
        assert node_cache.fingerprint(f"{address}/gone.svs") is None
    local = tmp_path / "a.svs"
    local.write_bytes(b"first")
    assert node_cache.fingerprint(str(local)) == of(local)
    assert node_cache.fingerprint(str(tmp_path / "gone.svs")) is None
    with node_cache.hold(str(local)) as held:
        assert held.mark is None


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_might_be_read_for_ever_is_not_read(tmp_path, kind):
    path = tmp_path / "s.svs"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(OSError, match=r"s.svs: neither a file nor a folder"):
        of(path)
    assert node_cache.fingerprint(str(path)) is None


def test_a_slide_that_is_an_empty_folder_is_named(tmp_path):
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr/0").mkdir()
    with pytest.raises(OSError, match=r"s.zarr: an empty folder; give a file"):
        of(tmp_path / "s.zarr")
    assert node_cache.fingerprint(str(tmp_path / "s.zarr")) is None
