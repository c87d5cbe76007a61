import json

import openpyxl
import pytest

from scellst_ray.annotation.markers import find_in_panel, read_markers

WIDE = [["T cells", "B cells"], ["CD3E", "CD79A"], ["CD2", None], ["CD3E", None]]
FOUND = {"T cells": ["CD3E", "CD2"], "B cells": ["CD79A"]}


def as_text(rows, separator=","):
    return "\n".join(separator.join(cell or "" for cell in row) for row in rows) + "\n"


def write_excel(path, *sheets):
    book = openpyxl.Workbook()
    book.remove(book.active)
    for rows in sheets:
        sheet = book.create_sheet()
        for row in rows:
            sheet.append(row)
    book.save(path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", as_text(WIDE)),
        ("m.tsv", as_text(WIDE, "\t")),
        ("m.csv", "\ufeff" + as_text(WIDE, ";")),
        ("m.csv", "type,gene\nT cells,CD3E\nB cells,CD79A\nT cells, CD2\nT cells,CD3E\n"),
        ("m.csv", "group,names,scores\nT cells,CD3E,9\nT cells,CD2,8\nB cells,CD79A,7\n"),
        ("m.txt", "Gene;Cell_Type\nCD3E;T cells\nCD2;T cells\nCD79A;B cells\n"),
        ("m.json", json.dumps(FOUND)),
        ("m.yaml", "T cells: [CD3E, CD2]\nB cells:\n- CD79A\n"),
    ],
)
def test_markers_as_people_and_programs_write_them(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert read_markers(str(path)) == FOUND


def test_excel(tmp_path):
    assert read_markers(write_excel(tmp_path / "a.xlsx", WIDE)) == FOUND
    # An empty sheet before, empty rows, and pandas' column of row numbers.
    numbered = [[None, *WIDE[0]], *([n, *row] for n, row in enumerate(WIDE[1:])), [None, None]]
    assert read_markers(write_excel(tmp_path / "b.xlsx", [], [[], *numbered])) == FOUND
    long = [["gene", "type"], ["CD3E", "T cells"], ["CD79A", "B cells"], ["CD2", "T cells"]]
    assert read_markers(write_excel(tmp_path / "c.xlsx", long)) == FOUND


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "", "is empty"),
        ("m.csv", "\n\n", "is empty"),
        ("m.csv", "T,T\nCD3E,CD2\n", "T occur twice"),
        ("m.csv", "T,B\nCD3E,\n", "type 'B' names no gene"),
        ("m.csv", "type,gene\n", "names no types"),
        ("m.csv", "type,gene\nT,CD3E\n,CD2\n", "row 2 lacks its type"),
        ("m.csv", "gene,score\nCD3E,1\n", "column of the name gene and none of the name type"),
        ("m.csv", "T\n1-Mar\n", "is the date 1-Mar"),
        ("m.xls", "x", "save it as .xlsx or CSV"),
        ("m.xlsx", "x", "no readable Excel workbook"),
        ("m.json", "{", "m.json: "),
        ("m.json", "[1]", "expected types"),
        ("m.json", '{"T": ["A"], "T": ["B"]}', "type 'T' occurs twice"),
        ("m.json", '{"T": [1]}', "a marker is 1"),
        ("m.json", '{"T": []}', "names no gene"),
        ("m.yaml", "T: [A]\nT: [B]\n", "type 'T' occurs twice"),
        ("m.yaml", "T: A\n", "expected types"),
        ("m.yaml", "T: [", "cannot be read"),
    ],
)
def test_what_names_no_markers_is_refused_in_a_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_markers(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_excel_that_names_no_markers_is_refused(tmp_path):
    import datetime

    dated = [["T"], ["CD3E"], [datetime.datetime(2026, 3, 1)]]
    with pytest.raises(ValueError, match="is the date 2026-03-01"):
        read_markers(write_excel(tmp_path / "d.xlsx", dated))
    with pytest.raises(ValueError, match="column 2 has no name"):
        read_markers(write_excel(tmp_path / "e.xlsx", [["T", None], ["CD3E", "CD2"]]))
    with pytest.raises(ValueError, match="is empty"):
        read_markers(write_excel(tmp_path / "f.xlsx", []))
    with pytest.raises(ValueError, match="T occur twice"):
        read_markers(write_excel(tmp_path / "g.xlsx", [["T", "T"], ["CD3E", "CD2"]]))


def test_no_file(tmp_path):
    for name in ("m.csv", "m.xlsx", "m.json"):
        with pytest.raises(ValueError, match="no such file of markers"):
            read_markers(str(tmp_path / name))


def test_markers_that_the_panel_lacks_are_named():
    found = find_in_panel({"T": ["CD3E", "XX", "YY"], "B": ["CD79A"]}, ["CD79A", "CD3E"], "m.csv")
    assert found.present == {"T": ["CD3E"], "B": ["CD79A"]}
    assert found.lines() == ["type 'T': 1 of 3 markers are in the panel; it lacks XX, YY"]
    with pytest.raises(ValueError, match=r"m\.csv: none of the 1 markers of type 'B'.*CD79B"):
        find_in_panel({"T": ["CD3E"], "B": ["CD79B"]}, ["CD3E"], "m.csv")
    with pytest.raises(ValueError, match="did you mean CD3E"):
        find_in_panel({"T": ["Cd3e"], "B": ["Cd79b"]}, ["CD3E"], "m.csv")
