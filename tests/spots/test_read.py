import pytest

from scellst_ray.spots import read
from scellst_ray.spots.read import read_spots


@pytest.fixture
def calls(monkeypatch):
    seen = []
    monkeypatch.setattr(read, "read_space_ranger", lambda *given: seen.append(("visium", *given)))
    monkeypatch.setattr(read, "read_h5ad", lambda *given: seen.append(("h5ad", *given)))
    monkeypatch.setattr(read, "read_st_array", lambda *given: seen.append(("st", *given)))
    return seen


@pytest.mark.parametrize(
    ("row", "mpp", "call"),
    [
        ({"spots": "s3://b/outs", "mpp": 0.5}, None, ("visium", "s3://b/outs", 0.5, 55.0)),
        ({"spots": "outs", "mpp": 0.5}, 0.25, ("visium", "outs", 0.25, 55.0)),
        (
            {"spots": "outs", "mpp": "0.5", "spot_diameter_um": 65, "spot_positions": float("nan")},
            None,
            ("visium", "outs", 0.5, 65.0),
        ),
        (
            {"spots": "c.tsv.gz", "spot_positions": "p.tsv", "mpp": 0.5, "spot_diameter_um": None},
            None,
            ("st", "c.tsv.gz", "p.tsv", 0.5, 100.0),
        ),
        ({"spots": "s.h5ad", "mpp": 0.5}, None, ("h5ad", "s.h5ad", 0.5, None)),
        (
            {"spots": "s.h5ad", "mpp": 0.5, "spot_diameter_um": "65"},
            None,
            ("h5ad", "s.h5ad", 0.5, 65.0),
        ),
    ],
)
def test_dispatch_on_manifest_columns(calls, row, mpp, call):
    read_spots(row, mpp)
    assert calls == [call]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"spots": None, "mpp": 0.5}, "slide A: the manifest's `spots` is empty"),
        ({"spots": float("nan"), "mpp": 0.5}, "`spots` is empty"),
        ({"spots": "outs", "mpp": float("nan")}, "`mpp`"),
        ({"spots": "outs", "mpp": "half"}, "`mpp` is 'half', expected a number"),
        ({"spots": "c.tsv", "mpp": 0.5}, "`spot_positions`"),
    ],
)
def test_rows_that_lack_something_are_refused(row, words):
    with pytest.raises(ValueError, match=words):
        read_spots({"slide_id": "A"} | row)
