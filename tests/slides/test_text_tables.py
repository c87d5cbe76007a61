"""Tables of text: separators, encodings, and what is no table."""

import gzip

import pytest

from scellst_ray.slides.text_tables import number_text, present, read_text_table


def test_cells_are_text_without_blanks_or_none():
    table = read_text_table(b' a , b,c\n 1 ,"x, y",NA\n\n2\n')
    assert table.columns == ["a", "b", "c"]
    assert table.rows == [{"a": "1", "b": "x, y", "c": None}, {"a": "2", "b": None, "c": None}]
    assert table.numbers == [1, 3]


def test_the_separator_of_the_header_counts():
    assert read_text_table(b"a;b\n1,5;x,y,z\n").rows == [{"a": "1,5", "b": "x,y,z"}]
    assert read_text_table(b'"a;b;c",d\n1,2\n').columns == ["a;b;c", "d"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"\n\n", "it is empty"),
        (b"a,b\n1,2,3\n4,5\n", "row 1 has 3 values and the header has 2 names"),
        (b"a,b\n\n1,2,3,4\n", "row 2 has 4 values"),
        (b"a,a\n1,2\n", r"column.s. a occur twice"),
        (b'a,b\n"1,2\n', "unexpected end of data; check the quotes"),
        (b"a,b\nl\xe4ufe,2\n", "byte 5 is no text in UTF-8"),
        (b"PK\x03\x04....", "it is an Excel workbook or another zip file; save the sheet as CSV"),
        (b"\xd0\xcf\x11\xe0....", "it is an Excel workbook"),
        (b"II*\0\x08\0\0\0", "bytes of value 0|no text in"),
        (gzip.compress(b"a,b\n1,2\n")[:-9], "it is a damaged gzip file"),
        (b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 50, "it is a damaged gzip file"),
    ],
)
def test_what_is_no_table(content, reason):
    with pytest.raises(ValueError, match=reason):
        read_text_table(content)


def test_a_bomb_is_unpacked_up_to_the_bound(monkeypatch):
    monkeypatch.setattr("scellst_ray.slides.text_tables.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        read_text_table(gzip.compress(b"a" * 10_000))


def test_numbers_and_missing_values():
    assert [number_text(text) for text in ("0,25", "-1,5", "1,234,5", "a,b", "1.5", None)] == [
        *("0.25", "-1.5", "1,234,5", "a,b", "1.5", None)
    ]
    assert [present(v) for v in (" NaN ", float("nan"), 0, False, " x ")] == [
        None,
        None,
        0,
        False,
        "x",
    ]
