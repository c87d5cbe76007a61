"""Parts of HDF5 files: links, giants, wrong kinds and cut files each give one line."""

import io
from pathlib import Path

import h5py
import numpy as np
import pytest

from scellst_ray.spots import hdf5
from scellst_ray.spots.hdf5 import (
    attribute,
    find_part,
    names_in,
    open_hdf5,
    read_array,
    read_strings_of,
)


@pytest.fixture
def path(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.arange(3)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["group/numbers"] = np.arange(3)
        file["group/names"] = ["a", "é"]
        file["fixed"] = np.array(["a", "b"], "S")
        file["pairs"] = np.zeros(2, [("a", int), ("b", float)])
        file.create_dataset("lists", (2,), h5py.vlen_dtype(np.int32))
        file["bytes"] = np.array([b"\xff\xfe"], "S")
        file.create_dataset("giant", (2**40,), np.int64, chunks=(2**20,))
        file["soft"] = h5py.SoftLink("/group/numbers")
        file["nowhere"] = h5py.SoftLink("/none")
        file["outside"] = h5py.ExternalLink("other.h5", "x")
        file["group/loop"] = file["group"]
        layout = h5py.VirtualLayout((3,), int)
        layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "x", (3,))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("away", (3,), np.int8, external=[(str(tmp_path / "raw"), 0, 3)])
        file.attrs["text"], file.attrs["bytes"] = "t", np.bytes_(b"b")
    return str(tmp_path / "a.h5")


def test_values_are_read(path):
    with open_hdf5(path, "a") as file:
        assert read_array(find_part(file, "group/numbers", "a"), "a n").tolist() == [0, 1, 2]
        assert read_strings_of(find_part(file, "group/names", "a"), "a") == ["a", "é"]
        assert read_strings_of(find_part(file, "fixed", "a"), "a") == ["a", "b"]
        assert find_part(file, "group/none", "a") is None
        assert find_part(file, "group/numbers/none", "a") is None
        assert names_in(find_part(file, "group", "a"), "a") == ["loop", "names", "numbers"]
        assert names_in(None, "a") == []
        assert (attribute(file, "text"), attribute(file, "bytes")) == ("t", "b")
        assert attribute(file, "none") is None
    content = io.BytesIO(Path(path).read_bytes())
    with open_hdf5(content, "a") as file:
        assert "group" in names_in(file, "a")


@pytest.mark.parametrize("name", ["soft", "nowhere", "outside"])
def test_links_are_refused(path, name):
    with (
        open_hdf5(path, "a") as file,
        pytest.raises(ValueError, match=f"a: /{name} is a link to another place or file"),
    ):
        find_part(file, name, "a")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("giant", r"a x declares 8796093022208 bytes"),
        ("virtual", "keeps its values in another file"),
        ("away", "keeps its values in another file"),
        ("group", "a x is a group, expected values"),
        ("none", "a x is absent, expected values"),
        ("pairs", "neither numbers nor text"),
        ("lists", "neither numbers nor text"),
        ("bytes", "cannot be read"),
        ("group/loop", "a x is a group"),
    ],
)
def test_parts_of_another_kind_are_refused(path, key, words):
    with open_hdf5(path, "a") as file, pytest.raises(ValueError, match=words):
        read_array(find_part(file, key, "a"), "a x")


def test_numbers_are_no_names(path):
    with open_hdf5(path, "a") as file, pytest.raises(ValueError, match="expected a list of text"):
        read_strings_of(find_part(file, "group/numbers", "a"), "a")


def test_the_bound_grows_with_the_file(path, monkeypatch):
    monkeypatch.setattr(hdf5, "PART_BYTES", 10)
    monkeypatch.setattr(hdf5, "PART_RATIO", 0)
    with open_hdf5(path, "a") as file, pytest.raises(ValueError, match="declares 24 bytes"):
        read_array(find_part(file, "group/numbers", "a"), "a")


@pytest.mark.parametrize("content", [b"", b"text", b"\x89HDF\r\n\x1a\n" + bytes(99)])
def test_files_that_are_no_hdf5_are_refused(tmp_path, content):
    path = tmp_path / "b.h5"
    path.write_bytes(content)
    for given in (str(path), io.BytesIO(content)):
        with (
            pytest.raises(ValueError, match=r"b: not a readable HDF5 file .* Copy it again"),
            open_hdf5(given, "b"),
        ):
            pass


def test_more_text_than_the_file_can_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "NUM_TEXTS", 10)
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file.create_dataset("texts", (100_000,), h5py.string_dtype(), chunks=(1000,))
    with (
        open_hdf5(str(tmp_path / "t.h5"), "t") as file,
        pytest.raises(ValueError, match=r"t x declares 800000 bytes"),
    ):
        read_strings_of(find_part(file, "texts", "t"), "t x")
