"""Tables of positions as pandas, R and spreadsheets write them."""

import io

import numpy as np
import pandas as pd
import pytest

from scellst_ray.spots import positions
from scellst_ray.spots.positions import (
    marks_of,
    numbers_of,
    read_position_parquet,
    read_position_text,
)

NAMES = ("barcode", "in_tissue", "array_row", "array_col", "y", "x")
FRAME = pd.DataFrame(
    {
        "barcode": ["AAAC-1", "AAAG-1", "AAAT-1"],
        "in_tissue": [1, 0, 1],
        "array_row": [0, 0, 2],
        "array_col": [0, 2, 4],
        "y": [10.5, 50.0, 30.0],
        "x": [100.0, 500.25, 1900.0],
    }
)


def written(frame=FRAME, **options):
    return frame.to_csv(**{"index": False} | options)


def marks(values):
    return FRAME.assign(in_tissue=values)


PLAIN = written()
R_ROW_NAMES = "\n".join(
    ['"barcode","in_tissue","array_row","array_col","y","x"']
    + [f'"{i}",{line}' for i, line in enumerate(PLAIN.splitlines()[1:], 1)]
)
WRITTEN = {
    "plain": PLAIN,
    "index": written(index=True),
    "barcode as index": FRAME.set_index("barcode").to_csv(),
    "barcode as index without name": FRAME.set_index("barcode").rename_axis(None).to_csv(),
    "bool": written(marks([True, False, True])),
    "float": written(marks([1.0, 0.0, 1.0])),
    "with missing": written(marks([1.0, np.nan, 1.0])),
    "NA": written(marks(["1", "NA", "1"])),
    "of R": written(marks(["TRUE", "FALSE", "TRUE"]), quoting=2),
    "row names of R": R_ROW_NAMES,
    "named rows of R": R_ROW_NAMES.replace('"barcode"', '"","barcode"', 1),
    "German": written(marks(["WAHR", "FALSCH", "WAHR"]), sep=";", decimal=","),
    "tabs": written(sep="\t"),
    "no header": written(header=False),
    "no header, index": written(header=False, index=True),
    "numbered header": FRAME.set_axis(range(6), axis=1).to_csv(index=False),
    "numbered header, index": FRAME.set_axis(range(6), axis=1).to_csv(),
    "other order": written(FRAME[["x", "in_tissue", "y", "barcode", "array_col", "array_row"]]),
    "Windows": PLAIN.replace("\n", "\r\n"),
    "old Mac": PLAIN.replace("\n", "\r"),
    "byte-order mark": "\ufeff" + PLAIN,
    "spaces": PLAIN.replace(",", " , ").replace("\n", " \n"),
    "empty lines": PLAIN + "\n\n",
    "empty columns": PLAIN.replace("\n", ",,\n") + ",,,,,,,\n",
    "capitals": PLAIN.replace("in_tissue", "In_Tissue").replace("barcode", "Barcode"),
    "thousands": PLAIN.replace("1900.0", '"1,900.0"'),
}


def check(table):
    assert table["barcode"].to_list() == FRAME["barcode"].tolist()
    assert marks_of(table, "in_tissue", "t").tolist() == [True, False, True]
    for name in ("y", "x", "array_row", "array_col"):
        assert numbers_of(table, name, "t").tolist() == FRAME[name].tolist()


@pytest.mark.parametrize("way", WRITTEN)
def test_every_way_to_write_a_table(way):
    check(read_position_text(WRITTEN[way].encode(), NAMES, "t"))


def test_unicode_text_of_a_spreadsheet():
    check(read_position_text(written(sep="\t").encode("utf-16"), NAMES, "t"))


@pytest.mark.parametrize(
    "frame",
    [
        FRAME,
        marks([True, False, True]),
        marks([1.0, np.nan, 1.0]),
        marks(["True", "False", "True"]),
        marks(pd.Categorical(["1", "0", "1"])),
        FRAME.set_index("barcode"),
        FRAME.set_index("barcode").rename_axis(None),
        FRAME.assign(more=[[1], [2], [3]]),
    ],
    ids=["int", "bool", "float", "text", "category", "index", "no name", "nested column"],
)
def test_parquet_of_pandas(frame):
    content = io.BytesIO()
    frame.to_parquet(content)
    check(read_position_parquet(content.getvalue(), NAMES, "t"))


def test_cells_that_are_neither_are_refused():
    table = read_position_text(written(marks([1, 2, 1])).encode(), NAMES, "t")
    with pytest.raises(ValueError, match="t: in_tissue is '2', which is not a number 0 or 1"):
        marks_of(table, "in_tissue", "t")
    table = read_position_text(PLAIN.replace("500.25", "far").encode(), NAMES, "t")
    with pytest.raises(ValueError, match=r"t: a position is not a number .x of row 2 is 'far'"):
        numbers_of(table, "x", "t")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a table .it is empty"),
        (b"\n \n", "not a table"),
        (b"barcode\xff", "not a table"),
        (b'barcode,x\n"a,1\n' + b"x" * 200_000, "not a table"),
        (b"barcode,in_tissue,x\na,1,2\nb,1\n", r"row 2 has 2 cells, expected 3"),
    ],
)
def test_text_that_is_no_table_is_refused(content, words):
    with pytest.raises(ValueError, match=f"t: {words}"):
        read_position_text(content, NAMES, "t")


def test_parquet_that_is_none_is_refused():
    for content in (b"PAR1", b"", b"PAR1" + bytes(50) + b"PAR1"):
        with pytest.raises(ValueError, match="t: not a Parquet file"):
            read_position_parquet(content, NAMES, "t")
    table = io.BytesIO()
    pd.DataFrame({"other": [1]}).to_parquet(table)
    assert "barcode" not in read_position_parquet(table.getvalue(), NAMES, "t").columns


def test_parquet_that_declares_more_rows_than_it_has_bytes_for_is_refused(monkeypatch):
    content = io.BytesIO()
    FRAME.loc[[0] * 9000].to_parquet(content)
    assert read_position_parquet(content.getvalue(), NAMES, "t").height == 9000
    monkeypatch.setattr(positions, "MAX_ROWS", 1000)
    monkeypatch.setattr(positions, "ROWS_PER_BYTE", 0)
    with pytest.raises(ValueError, match=r"t: not a Parquet file .it declares 9000 rows in"):
        read_position_parquet(content.getvalue(), NAMES, "t")
