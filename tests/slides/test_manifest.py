import gzip
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scellst_ray.core.geometry import check_mpp
from scellst_ray.slides.manifest import PATH_COLUMNS, absolute, read_manifest


def manifest(folder, text, name="m.csv"):
    path = Path(folder) / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_reads_rows_in_order_and_keeps_further_columns(tmp_path):
    text = "slide_id,uri,mpp,patient_id,stain\n007,a.tif,0.25,p1,\nb-1,/x/b.svs,,p2,H&E\n"
    first, second = read_manifest(manifest(tmp_path, text))
    assert (first.slide_id, first.uri, first.mpp) == ("007", f"{tmp_path}/a.tif", 0.25)
    assert first.columns == {"patient_id": "p1"}
    assert (second.uri, second.mpp, second.mpp_error) == ("/x/b.svs", None, None)
    assert second.columns == {"patient_id": "p2", "stain": "H&E"}


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("slide_id,path,wsi_mpp", "a,x.tif,0.5"),
        ("slide_id,wsi,mpp", "a,x.tif,0.5"),
        ("slide_id,path,wsi,wsi_mpp", "a,x.tif,ignored,0.5"),
        ("slide_id,uri,path,mpp,wsi_mpp", "a,x.tif,ignored,0.5,7"),
    ],
)
def test_aliases_and_the_first_of_them_wins(tmp_path, header, row):
    (slide,) = read_manifest(manifest(tmp_path, f"{header}\n{row}\n"))
    assert (slide.uri, slide.mpp) == (f"{tmp_path}/x.tif", 0.5)


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfslide_id,uri\na,x.tif\n",
        b"slide_id,uri\r\na,x.tif\r\n",
        b"slide_id,uri\n\na,x.tif\n\n,\n",
        b'slide_id,uri\n" a ",  x.tif\n',
    ],
    ids=["byte order mark", "windows", "empty lines", "spaces"],
)
def test_csv_as_spreadsheets_write_it(tmp_path, text):
    (slide,) = read_manifest(manifest(tmp_path, text))
    assert (slide.slide_id, slide.uri) == ("a", f"{tmp_path}/x.tif")


def test_parquet_with_numbers_as_ids(tmp_path):
    frame = pl.DataFrame({"slide_id": [1, 2], "uri": ["a", "b"], "mpp": [None, 0.5]})
    frame.write_parquet(tmp_path / "m.parquet")
    rows = read_manifest(str(tmp_path / "m.parquet"))
    assert [(row.slide_id, row.mpp) for row in rows] == [("1", None), ("2", 0.5)]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("a/b.tif", "base/a/b.tif"),
        ("/a.tif", "/a.tif"),
        ("s3://b/a.tif", "s3://b/a.tif"),
        ("", ""),
    ],
)
def test_absolute(uri, expected):
    assert absolute(uri, "base") == expected


def test_a_uri_does_not_depend_on_how_the_manifest_is_named(tmp_path, monkeypatch):
    path = manifest(tmp_path, "slide_id,uri\na,x.tif\n")
    monkeypatch.chdir(tmp_path)
    named = [path, "m.csv", "./m.csv", f"file://{path}"]
    assert {read_manifest(name)[0].uri for name in named} == {f"{tmp_path}/x.tif"}


@pytest.mark.parametrize(
    "mpp", ["0", "-0.5", "0.05", "5", "inf", "1e400", "0,05", "1.234,5", "half", "true"]
)
def test_a_bad_mpp_is_the_slides_own_error(tmp_path, mpp):
    text = f'slide_id,uri,mpp\nbad,x.tif,"{mpp}"\ngood,y.tif,0.5\n'
    bad, good = read_manifest(manifest(tmp_path, text))
    assert bad.mpp is None
    assert "bad" in bad.mpp_error
    assert "manifest" in bad.mpp_error
    assert (good.mpp, good.mpp_error) == (0.5, None)


@given(st.floats(0.1, 1.2))
def test_check_mpp_returns_what_is_plausible(mpp):
    assert check_mpp(mpp, "x") == mpp


@pytest.mark.parametrize("mpp", [None, float("nan"), 0.0, -1.0, 0.0999, 1.201, float("inf")])
def test_check_mpp_refuses_the_rest_with_name_and_remedy(mpp):
    with pytest.raises(ValueError, match=r"slide.svs: .*mpp.*manifest's mpp column"):
        check_mpp(mpp, "slide.svs")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("slide,uri\na,b\n", r"slide_id not found.*did you mean 'slide'"),
        ("slide_id,uri\n", "no rows"),
        ("", "cannot be read as a manifest"),
        ("slide_id,uri\na,b,c\n", "cannot be read as a manifest"),
        ("slide_id,uri\na,x\na,y\n", r"row 2: slide_id 'a' occurs twice"),
        ("slide_id,uri\n,x\n", r"row 1: slide_id '' is empty"),
        ("slide_id,uri\nNA,x\n", r"row 1: slide_id '' is empty, or a text for missing values such"),
        ("slide_id,uri\na,NA\n", r"row 1: slide 'a' has no uri"),
        (f"slide_id,uri\n{'a' * 201},x\n", r"row 1: slide_id a{40}\.\.\. has 201 characters"),
        ("slide_id,uri\np1,x\n\nP1,y\n", r"row 3: slide_id 'P1' differs from 'p1' only in case"),
        ("slide_id;uri;mpp;mpp\na;x;1;1\n", r"column\(s\) mpp occur twice"),
        ("slide_id,uri\na,\n", r"row 1: slide 'a' has no uri"),
        ("slide_id,uri\na/b,x\n", "a/b"),
        ("slide_id,uri\n..,x\n", "cannot name a file"),
        ("slide_id,uri\na..b,x\n", "cannot name a file"),
        ("slide_id,uri\na\\b,x\n", "cannot name a file"),
        ("slide_id,uri\n.hidden,x\n", "cannot name a file"),
        ("slide_id,uri\na\u0000b,x\n", "bytes of value 0"),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path, text, match):
    path = manifest(tmp_path, text)
    with pytest.raises(ValueError, match=match) as caught:
        read_manifest(path)
    assert path in str(caught.value)


def test_all_problems_are_listed_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"row 1: .*row 2: .*row 3: ") as caught:
        read_manifest(manifest(tmp_path, "slide_id,uri\na/b,x\nok,\nok,y\n"))
    assert str(caught.value).count("row ") == 3


def test_a_column_a_job_needs(tmp_path):
    path = manifest(tmp_path, "slide_id,uri,spot\na,x,y\n")
    assert read_manifest(path, required=("spot",))
    with pytest.raises(ValueError, match=r"spots not found.*did you mean 'spot'"):
        read_manifest(path, required=("spots",))


@pytest.mark.parametrize("name", ["gone.csv", "."])
def test_no_such_manifest(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no such manifest"):
        read_manifest(str(tmp_path / name))


def test_a_damaged_parquet_manifest(tmp_path):
    path = manifest(tmp_path, b"PAR1 but not really", "m.parquet")
    with pytest.raises(ValueError, match=r"m.parquet: cannot be read as a manifest"):
        read_manifest(path)


MISSING = ["NA", "N/A", "n/a", "nan", "NaN", "None", "NULL", "null", "#N/A", "-", "<NA>", "", " "]


@pytest.mark.parametrize("text", [*MISSING, *(f'"{text}"' for text in MISSING)])
def test_texts_for_missing_values_are_empty_fields(tmp_path, text):
    """As R, pandas, SQL and spreadsheets write them, in every column."""
    names = ["mpp", *PATH_COLUMNS, "patient_id", "spot_diameter_um", "mpp_confirmed"]
    row = ",".join([text] * len(names))
    (slide,) = read_manifest(manifest(tmp_path, f'"slide_id",uri,{",".join(names)}\n"S",s,{row}\n'))
    assert (slide.slide_id, slide.mpp, slide.mpp_error, slide.columns) == ("S", None, None, {})


@pytest.mark.parametrize(
    "content",
    [
        '"slide_id","uri","mpp"\n"1","a","s.svs",0.25\n',
        '"","slide_id","uri","mpp"\n"1","a","s.svs",0.25\n',
        "slide_id;uri;mpp\na;s.svs;0,25\n",
        "sep=;\nslide_id;uri;mpp\r\na;s.svs;0,25\r\n;;\r\n",
        "slide_id\turi\tmpp\na\ts.svs\t0.25\n",
        "slide_id,uri,mpp,,\na,s.svs,0.25,,\n\n,,,,\n",
        "slide_id,uri,mpp\ra,s.svs,0.25\r",
        "slide_id\turi\tmpp\na\ts.svs\t0,25\n".encode("utf-16"),
        "slide_id,uri,mpp\na,s.svs,0.25\n".encode("utf-16-le"),
        gzip.compress(b"slide_id,uri,mpp\na,s.svs,0.25\n"),
    ],
    ids=["R", "R and pandas", "decimal comma", "sep", "tabs", "commas", "mac", "excel", "16", "gz"],
)
def test_tables_of_other_programs(tmp_path, content):
    (slide,) = read_manifest(manifest(tmp_path, content))
    assert (slide.slide_id, slide.uri) == ("a", f"{tmp_path}/s.svs")
    assert (slide.mpp, slide.mpp_error, slide.columns) == (0.25, None, {})


def rows_or_message(path):
    try:
        return len(read_manifest(path))
    except ValueError as error:
        return str(error)


def test_a_parquet_manifest_with_a_damaged_page_or_a_doubled_column(tmp_path):
    table = pa.table({"slide_id": ["a", "b"], "uri": ["a.svs", "b.svs"]})
    pq.write_table(table, tmp_path / "m.parquet", compression="zstd")
    content = (tmp_path / "m.parquet").read_bytes()
    for at in range(4, len(content) - 16, 8):
        path = manifest(tmp_path, content[:at] + bytes(16) + content[at + 16 :], "d.parquet")
        answer = rows_or_message(path)
        assert answer == 2 or path in str(answer)
    pq.write_table(table.append_column("uri", table["uri"]), tmp_path / "m.parquet")
    with pytest.raises(ValueError, match=r"m\.parquet: .*column\(s\) uri occur twice"):
        read_manifest(str(tmp_path / "m.parquet"))


def test_parquet_of_pandas(tmp_path):
    frame = pd.DataFrame(
        {
            "slide_id": ["a", "b", None],
            "uri": pd.Categorical(["x.svs", "y.svs", None]),
            "mpp": [0.25, np.nan, np.nan],
            "spots": ["NA", "outs", None],
            "taken": pd.to_datetime(["2026-01-01", None, None]),
            "frozen": [True, None, None],
        },
        index=[5, 7, 9],
    )
    frame.to_parquet(tmp_path / "m.parquet")
    first, second = read_manifest(str(tmp_path / "m.parquet"))
    assert (first.slide_id, first.uri, first.mpp) == ("a", f"{tmp_path}/x.svs", 0.25)
    assert first.columns == {"taken": datetime(2026, 1, 1), "frozen": True}
    assert (second.mpp, second.mpp_error) == (None, None)
    assert second.columns == {"spots": f"{tmp_path}/outs"}


@pytest.mark.parametrize("value", [True, date(2026, 1, 1), [0.5]])
def test_an_mpp_of_parquet_that_is_no_number(tmp_path, value):
    pl.DataFrame({"slide_id": ["a"], "uri": ["b"], "mpp": [value]}).write_parquet(tmp_path / "m.pq")
    (row,) = read_manifest(str(tmp_path / "m.pq"))
    assert row.mpp is None
    assert "is not a number" in row.mpp_error
