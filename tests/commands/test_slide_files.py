"""Files that a manifest names besides its slides: each is found and can be read, or is named."""

import json

import anndata
import numpy as np
import pytest
from scipy import sparse

from scellst_ray.commands import slide_files
from scellst_ray.commands.cli import main
from scellst_ray.commands.slide_files import check_slide_files, files_to_check
from scellst_ray.slides.manifest import SlideRow

HEADER = {"width0": 720, "height0": 520, "mpp": 0.5}


def check(header=HEADER, **columns):
    slide = SlideRow("S", "s.tiff", None, columns={k: str(v) for k, v in columns.items()})
    return check_slide_files(files_to_check(slide, header))


def write_h5ad(path, xy0=((100.0, 100.0), (300.0, 300.0)), counts=((1, 2), (3, 4))):
    adata = anndata.AnnData(sparse.csr_matrix(np.array(counts, np.float32)))
    adata.var_names = ["EPCAM", "CD3E"]
    adata.obsm["spatial"] = np.array(xy0)
    adata.uns["spatial"] = {"ST": {"scalefactors": {"spot_diameter_fullres": 110.0}, "images": {}}}
    adata.write_h5ad(path)
    return path


@pytest.mark.parametrize(
    "column", ["spots", "spot_positions", "segmentation", "xenium", "xenium_alignment"]
)
@pytest.mark.parametrize("name", ["no_such", "no_such.h5ad", "nö such.geojson"])
def test_a_file_that_is_missing_is_named(tmp_path, column, name):
    (problem,) = check(**{column: tmp_path / name})["problems"]
    assert problem.startswith(f"{column}: {tmp_path / name}: no such file")


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.h5ad").touch()
    (problem,) = check(spots=tmp_path / "empty.h5ad")["problems"]
    assert problem.startswith(f"spots: {tmp_path}/empty.h5ad: the file is empty")


def test_what_can_be_read_has_no_problem(tmp_path, synthetic_slide):
    assert check(spots=synthetic_slide.space_ranger) == {"problems": [], "read": ["spots"]}
    good = write_h5ad(tmp_path / "s.h5ad")
    assert check(spots=good) == {"problems": [], "read": ["spots"]}
    assert check() == {"problems": [], "read": []}
    # A slide that cannot be opened has its own problem; its files are read all the same.
    assert check({}, spots=good) == {"problems": [], "read": ["spots"]}


def damaged(folder, kind):
    """Return a column and a file of it that exists and cannot be used."""
    path = folder / f"{kind.replace(' ', '_')}.h5ad"
    if kind == "a folder without a matrix":
        (folder / "outs").mkdir()
        (folder / "outs" / "web_summary.html").write_text("<html>")
        return "spots", folder / "outs"
    if kind == "a cut file":
        path.write_bytes(write_h5ad(path).read_bytes()[:3000])
    elif kind == "no counts":
        write_h5ad(path, counts=((0.5, 1.25), (0.1, 2.5)))
    elif kind == "no places":
        adata = anndata.read_h5ad(write_h5ad(path))
        del adata.obsm["spatial"]
        adata.write_h5ad(path)
    elif kind == "beside the slide":
        write_h5ad(path, xy0=((9000.0, 100.0), (8000.0, 300.0)))
    elif kind == "partly beside the slide":
        write_h5ad(path, xy0=((100.0, 100.0), (8000.0, 300.0)))
    elif kind == "no JSON":
        path = folder / "s.geojson"
        path.write_text("no JSON")
        return "segmentation", path
    elif kind == "nuclei beside the slide":
        path = folder / "s.geojson"
        ring = [[9000, 10], [9020, 10], [9020, 30], [9000, 30], [9000, 10]]
        feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}
        feature["properties"] = {}
        path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
        return "segmentation", path
    else:
        assert kind == "no cells"
        (folder / "xenium").mkdir()
        (folder / "xenium" / "experiment.xenium").write_text("{}")
        return "xenium", folder / "xenium"
    return "spots", path


@pytest.mark.parametrize(
    "kind",
    [
        *("a folder without a matrix", "a cut file", "no counts", "no places", "beside the slide"),
        *("partly beside the slide", "no JSON", "nuclei beside the slide", "no cells"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, kind):
    column, path = damaged(tmp_path, kind)
    found = check(**{column: path})
    (problem,) = found["problems"]
    assert problem.startswith(f"{column}: ")
    assert str(path) in problem
    assert "\n" not in problem
    assert found["read"] == [column]


def test_a_large_file_is_only_looked_up(tmp_path, monkeypatch):
    path = write_h5ad(tmp_path / "s.h5ad", counts=((0.5, 1.25), (0.1, 2.5)))
    monkeypatch.setattr(slide_files, "MAX_READ", 1000)
    assert check(spots=path) == {"problems": [], "read": []}


@pytest.mark.whole
def test_doctor_names_each_and_goes_on(synthetic_slide, tmp_path, capsys):
    good = write_h5ad(tmp_path / "good.h5ad")
    lines = [
        "slide_id,uri,spots,segmentation",
        f"a,{synthetic_slide.slide},no_such.h5ad,no_such.geojson",
        f"b,{synthetic_slide.slide},{good},",
        "c,gone.tiff,no_outs,",
    ]
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    assert main(["doctor", "--ray=false", f"--manifest={tmp_path}/m.csv"]) == 1
    shown = capsys.readouterr().out.splitlines()
    bad = [line for line in shown if line.startswith("bad")]
    assert [line.split(":")[0] for line in bad] == [f"bad slide {name}" for name in "aacc"]
    for line, part in zip(bad, ("no_such.h5ad", "no_such.geojson", "gone", "no_outs"), strict=True):
        assert part in line
    assert any("slide b: " in line and "spots read" in line for line in shown)


@pytest.mark.whole
def test_plan_notes_what_is_missing(synthetic_slide, tmp_path, capsys):
    (tmp_path / "m.csv").write_text(f"slide_id,uri,spots\na,{synthetic_slide.slide},no_such\n")
    words = ["plan", f"--manifest={tmp_path}/m.csv", "--encoder=none", "--processes=1"]
    assert main(words) == 0
    assert f"note: slide a: spots: {tmp_path}/no_such: no such file" in capsys.readouterr().out
