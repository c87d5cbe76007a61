"""Slides opened as the file that a run knows."""

import os

import numpy as np
import pytest

from scellst_ray.core.geometry import Box
from scellst_ray.slides.source import ChangedFileError, open_slide
from scellst_ray.storage import node_cache
from tests.support import cached
from tests.support.object_server import serving

cache = cached.cache  # a fixture


@pytest.fixture
def file(tmp_path, helpers):
    image = np.full((300, 300, 3), 200, np.uint8)
    return helpers.write_pyramid(tmp_path / "s.tif", [image], 0.5)


def source_of(path):
    return f"{node_cache.fingerprint(str(path))}-rest0000"


def test_the_file_that_was_planned(file):
    with open_slide(str(file), None, planned=source_of(file)) as opened:
        opened.slide.read(Box(0, 0, 64, 64), 0.5)
        opened.check()
        assert str(opened.fingerprint) == source_of(file).removesuffix("-rest0000")


@pytest.mark.parametrize("kind", ["touched", "another", "grown"])
def test_another_file_than_was_planned(file, kind):
    planned, stat = source_of(file), file.stat()
    content = bytearray(file.read_bytes())
    if kind == "another":  # of the same size and time
        content[len(content) // 2] ^= 1
    file.write_bytes(content + b"x" * (kind == "grown"))
    if kind == "another":
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ChangedFileError, match=r"s\.tif: the file changed while .* same command"):
        open_slide(str(file), None, planned=planned)


def test_a_change_while_it_is_read(file):
    with open_slide(str(file), None) as opened:
        opened.slide.read(Box(0, 0, 64, 64), 0.5)
        opened.check()
        other = file.with_name("other.tif")
        other.write_bytes(file.read_bytes())
        os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
        other.replace(file)  # the open file is still read, and is not the one that is there
        with pytest.raises(ChangedFileError, match="changed while the run was reading it"):
            opened.check()


def test_a_copy_of_the_file_of_a_finished_slide(file):
    recorded = source_of(file)
    os.utime(file, ns=(1, 1))
    with open_slide(str(file), None, recorded=recorded):
        pass
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ChangedFileError, match="another one than that in which the run found"):
        open_slide(str(file), None, recorded=recorded)


@pytest.mark.usefixtures("cache")
def test_an_object_that_is_replaced(file):
    whole = file.read_bytes()
    with serving({"s.tif": whole}) as (address, objects):
        planned = source_of(f"{address}/s.tif")
        objects.asked.clear()
        with open_slide(f"{address}/s.tif", None, planned=planned) as opened:
            # Asked before and after the download, and not once more for the fingerprint.
            assert [kind for kind, _ in objects.asked].count("HEAD") == 2
            objects.files["/s.tif"] = whole[:-1] + b"\0\1"[whole[-1] == 0 :][:1]
            opened.slide.read(Box(0, 0, 64, 64), 0.5)
            opened.check()  # the copy is still that of the object which was planned
        with pytest.raises(ChangedFileError):
            open_slide(f"{address}/s.tif", None, planned=planned)
