"""Small files within bounds."""

import gzip

import fsspec
import pytest

from scellst_ray.spots import files
from scellst_ray.spots.files import positive_number, read_bytes, read_json_object, reason_of, shown

LOCAL = fsspec.filesystem("file")


def test_gzip_is_unpacked_within_a_bound(tmp_path, monkeypatch):
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(bytes(100_000)))
    assert len(read_bytes(LOCAL, str(path))) == 100_000
    monkeypatch.setattr(files, "UNPACKED_BYTES", 50_000)
    with pytest.raises(ValueError, match=r"a\.tsv\.gz: unpacks to more than 50000 bytes"):
        read_bytes(LOCAL, str(path))
    monkeypatch.setattr(files, "UNPACKED_RATIO", 1000)
    assert len(read_bytes(LOCAL, str(path))) == 100_000


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain", "absent", "folder"])
def test_files_that_cannot_be_read_are_named(tmp_path, damage):
    path = tmp_path / "a.tsv.gz"
    packed = gzip.compress(b"some text of a table" * 50)
    contents = {
        "cut": packed[:-9],
        "flipped": packed[:12] + b"\xff\xff" + packed[14:],
        "plain": b"x",
    }
    if damage in contents:
        path.write_bytes(contents[damage])
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=r"a\.tsv\.gz: (cannot be read|no such file)"):
        read_bytes(LOCAL, str(path))


def test_json_objects_and_all_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 2}')
    assert read_json_object(LOCAL, str(path)) == {"a": 2}
    for text in ("[1]", "3", "{", "", '"text"', "[" * 100_000, "\udcff"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"a\.json: not a JSON object"):
            read_json_object(LOCAL, str(path))


def test_only_positive_finite_numbers_count():
    values = {
        "z": 10**400,
        "a": 2,
        "b": 0.5,
        "c": -1,
        "d": "2",
        "e": float("nan"),
        "f": float("inf"),
        "g": True,
    }
    numbers = [positive_number(values, name) for name in "abcdefghz"]
    assert numbers == [2.0, 0.5, *[None] * 7]


def test_reasons_are_one_short_line():
    assert reason_of(ValueError("a\nb\x0b\x00c")) == "a b c"
    assert len(reason_of(ValueError("x" * 999))) < 250


def test_values_of_a_file_are_shown_short_and_in_one_line():
    assert shown(["EPCAM", 3]) == "['EPCAM', 3]"
    nested = "a"
    for _ in range(500):
        nested = {"a": nested}
    for value in ("x\n" * 500, list("abc" * 99), nested, ["y" * 999] * 9):
        assert len(shown(value)) < 250
        assert "\n" not in shown(value)
