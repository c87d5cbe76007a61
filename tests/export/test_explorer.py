"""sopa writes folders for Xenium Explorer: outlines, genes and types of every cell, in um."""

import builtins
import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import shapely
import tifffile
import zarr
from zarr.storage import ZipStore

from scellst_ray.export.explorer import write_explorer
from scellst_ray.runs import compaction
from tests.support.absent import is_installed
from tests.support.exported_runs import GENES, MPP, make_run

pytestmark = [
    pytest.mark.skipif(not is_installed("sopa"), reason="needs sopa"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def read_group(path):
    with ZipStore(path, mode="r") as store:
        group = zarr.open_group(store, mode="r", zarr_format=2)
        arrays = {name: array[:] for name, array in group.members(None) if hasattr(array, "shape")}
        nested = next(group.groups(), (None, group))[1]
        return arrays, dict(nested.attrs)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Slide a of a run, exported."""
    folder = tmp_path_factory.mktemp("explorer")
    run = make_run(folder, head=True)
    out = folder / "out" / "a.explorer"
    assert write_explorer(run, str(out), "a") == 30
    assert [path.name for path in out.parent.iterdir()] == ["a.explorer"]
    return run, out


def test_files(written):
    _, out = written
    assert {path.name for path in out.iterdir()} == {
        *("experiment.xenium", "morphology.ome.tif", "cells.zarr.zip"),
        *("cell_feature_matrix.zarr.zip", "analysis.zarr.zip", "cell_ids.csv"),
    }
    experiment = json.loads((out / "experiment.xenium").read_text())
    assert (experiment["run_name"], experiment["num_cells"]) == ("a", 30)
    # um per px of the picture; sopa's own line would say 0.2125.
    assert experiment["pixel_size"] == 2 * MPP


def test_outlines_are_in_um(written):
    run, out = written
    arrays, _ = read_group(out / "cells.zarr.zip")
    cells = run.cells("a")
    assert arrays["cell_id"][:, 0].tolist() == list(range(30))
    for vertices, stored in zip(
        arrays["polygon_vertices"][1], shapely.from_wkb(cells["polygon"].to_numpy()), strict=True
    ):
        expected = np.unique(shapely.get_coordinates(stored) * MPP, axis=0)
        np.testing.assert_allclose(np.unique(vertices.reshape(-1, 2), axis=0), expected, rtol=1e-5)


def test_expression_is_multiplied_and_rounded(written):
    run, out = written
    arrays, attributes = read_group(out / "cell_feature_matrix.zarr.zip")
    assert attributes["feature_keys"][:3] == GENES
    data, indices = (arrays[f"cell_features/{name}"] for name in ("data", "indices"))
    starts = arrays["cell_features/indptr"]
    expected = np.rint(run.expression_numpy(None, "a") * 100)
    for number in range(len(GENES)):
        part = slice(starts[number], starts[number + 1])
        found = np.zeros(30)
        found[indices[part]] = data[part]
        np.testing.assert_array_equal(found, expected[:, number])


def test_types_and_ids(written):
    run, out = written
    arrays, attributes = read_group(out / "analysis.zarr.zip")
    types = np.array(run.cells("a")["nucleus_type"].to_pylist())
    place = attributes["grouping_names"].index("cell_type")
    names = attributes["group_names"][place]
    assert names == sorted(set(types))
    members = np.split(
        arrays[f"cell_groups/{place}/indices"], arrays[f"cell_groups/{place}/indptr"][1:]
    )
    for name, rows in zip(names, members, strict=True):
        assert (types[rows] == name).all()
    with (out / "cell_ids.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["cell_id"]) for row in rows] == run.cells("a")["cell_id"].to_pylist()
    assert [row["explorer_id"] for row in rows][:2] == ["aaaaaaaa-1", "aaaaaaab-1"]


def test_the_picture_is_the_slide(written):
    _, out = written
    with tifffile.TiffFile(out / "morphology.ome.tif") as file:
        levels = file.series[0].levels
        assert [level.shape for level in levels[:2]] == [(3, 224, 320), (3, 112, 160)]
        image = levels[0].asarray()
    assert np.abs(image[:, 100, 50].astype(int) - [200, 120, 180]).max() <= 2
    assert np.abs(image[:, 100, 250].astype(int) - [90, 60, 140]).max() <= 2
    assert image[:, 210, 50].min() >= 250


@pytest.mark.parametrize("asked", [None, 0])
def test_without_its_file_a_slide_has_a_white_picture(tmp_path, caplog, asked):
    run, out = make_run(tmp_path, head=True), tmp_path / "b.explorer"
    if asked is None:
        (tmp_path / "b.png").unlink()
    assert write_explorer(run, str(out), "b", ["CD3E"], picture_mpp=asked) == 40
    assert ("slide b is exported with a blank picture" in caplog.text) == (asked is None)
    with tifffile.TiffFile(out / "morphology.ome.tif") as file:
        assert file.series[0].levels[0].asarray().min() >= 250
    arrays, _ = read_group(out / "cells.zarr.zip")
    stored = shapely.from_wkb(run.cells("b")["polygon"].to_numpy())
    found = arrays["polygon_vertices"][1].reshape(40, -1, 2)
    np.testing.assert_allclose(found.max((0, 1)), shapely.total_bounds(stored)[2:] * MPP, rtol=1e-5)


def test_nuclei_without_expression(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "ROW_GROUP", 7)
    run, out = make_run(tmp_path, head=False), tmp_path / "a.explorer"
    assert write_explorer(run, str(out), "a", picture_mpp=0) == 30
    assert read_group(out / "cell_feature_matrix.zarr.zip")[1]["number_features"] == 1
    # An existing folder of the kind is replaced, another one is not.
    (out / "old").touch()
    assert write_explorer(run, f"{out}/", "a", picture_mpp=0) == 30
    assert not (out / "old").exists()
    (out / "experiment.xenium").unlink()
    with pytest.raises(ValueError, match="no folder for Xenium Explorer"):
        write_explorer(run, str(out), "a")


def test_the_command_exits_with_0(written, tmp_path):
    run, _ = written
    command = [sys.executable, "-m", "scellst_ray.commands.cli", "export", "--run", run.uri]
    command += ["--out", str(tmp_path / "a.explorer"), "--slides", "a", "--genes", "CD3E"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"wrote {tmp_path}/a.explorer: 30 cells\n"
    assert found.stderr == ""


def test_without_sopa_a_line_names_the_extra(written, tmp_path, monkeypatch):
    run, original = written[0], builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "sopa":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'scellst-ray\[explorer\]'"):
        write_explorer(run, str(tmp_path / "x.explorer"), "a")
    assert list(tmp_path.iterdir()) == []
