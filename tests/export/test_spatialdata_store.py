"""SpatialData stores: spatialdata reads every element, queries them and draws a gene."""

import builtins
import json
import logging
import tracemalloc

import cv2
import geopandas as gpd
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import shapely
import spatialdata as sd
import spatialdata_plot  # noqa: F401 - adds `.pl`
from spatialdata.transformations import get_transformation

from scellst_ray.export import slide_picture, spatial_elements, spatialdata_store
from scellst_ray.export.anndata import to_anndata
from scellst_ray.export.spatialdata_store import write_spatialdata
from scellst_ray.runs import compaction
from scellst_ray.runs.reading import open_run
from tests.support.exported_runs import GENES, MPP, WIDTH0, add_slide, make_run
from tests.support.paths import ROOT

# Of the readers: nothing of these reaches a user's terminal through this package.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:spatialdata"),
    pytest.mark.filterwarnings("ignore::UserWarning:zarr"),
]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Slide a in a store of its own."""
    folder = tmp_path_factory.mktemp("one")
    run = make_run(folder, head=True)
    out = folder / "out" / "a.sdata.zarr"
    assert write_spatialdata(run, str(out), ["a"]) == 30
    assert [path.name for path in out.parent.iterdir()] == ["a.sdata.zarr"]
    return run, sd.read_zarr(out)


def test_the_image_is_the_slide(one):
    _, store = one
    assert list(store.images) == ["he"]
    for number, scale in enumerate(("scale0", "scale1")):
        image = store["he"][scale].image
        assert image.dims == ("c", "y", "x")
        assert image.dtype == np.uint8
        assert image.shape == (3, 200 // 2**number, 300 // 2**number)
        half = image.shape[2] // 2
        # White beyond the slide reaches into the px of its rim.
        inner = image.values[:, 1:-1]
        assert (inner[:, :, 1 : half - 1] == np.array([200, 120, 180])[:, None, None]).all()
        assert (inner[:, :, half + 1 : -1] == np.array([90, 60, 140])[:, None, None]).all()
    assert store["he"]["scale0"].image.c.values.tolist() == ["r", "g", "b"]


def test_the_outlines_are_those_of_the_run(one):
    run, store = one
    cells = run.cells("a")
    assert store["cells"].index.tolist() == cells["cell_id"].to_pylist()
    stored = shapely.from_wkb(cells["polygon"].to_numpy())
    assert shapely.equals(store["cells"].geometry.to_numpy(), stored).all()


def test_coordinate_systems(one):
    _, store = one
    assert sorted(store.coordinate_systems) == ["global", "um"]
    for name, ratio in (("he", 2), ("cells", 1)):
        for system, factor in (("global", ratio), ("um", ratio * MPP)):
            matrix = get_transformation(store[name], system).to_affine_matrix(
                ("x", "y"), ("x", "y")
            )
            np.testing.assert_allclose(matrix, np.diag([factor, factor, 1]))
    # The picture and the slide end at the same place.
    extent = sd.get_extent(store["he"], coordinate_system="um")
    assert extent["x"] == (0, WIDTH0 * MPP)


def test_the_table_annotates_the_outlines(one):
    run, store = one
    table = store["table"]
    keys = table.uns["spatialdata_attrs"]
    assert keys == {"region": "cells", "region_key": "region", "instance_key": "cell_id"}
    outlines, matched = sd.join_spatialelement_table(
        sdata=store, spatial_element_names="cells", table_name="table", how="inner"
    )
    assert len(outlines["cells"]) == matched.n_obs == 30
    assert table.var_names.tolist() == GENES
    np.testing.assert_allclose(table.X, run.expression_numpy(None, "a"), rtol=1e-6)
    # Columns are those of the export to AnnData, but `region` names the outlines.
    expected = to_anndata(run, ["a"])
    assert table.obs_names.tolist() == expected.obs_names.tolist()
    assert list(table.obs) == list(expected.obs)
    for column in set(expected.obs) - {"region"}:
        assert table.obs[column].tolist() == expected.obs[column].tolist(), column
    np.testing.assert_array_equal(table.obsm["spatial"], expected.obsm["spatial"])
    assert table.uns["scellst_ray"] == expected.uns["scellst_ray"]
    assert "spatial" not in table.uns


@pytest.mark.parametrize("box", [(100, 50, 350, 300), (0, 0, 600, 400), (250, 10, 260, 20)])
def test_a_bounding_box_holds_what_cx_holds(one, box):
    run, store = one
    x0, y0, x1, y1 = box
    frame = gpd.read_parquet(f"{run.uri}/cells/a.parquet")
    expected = frame.set_index("cell_id").cx[x0:x1, y0:y1].index.tolist()
    for system, factor in (("global", 1), ("um", MPP)):
        found = sd.bounding_box_query(
            store["cells"],
            axes=("x", "y"),
            min_coordinate=[x0 * factor, y0 * factor],
            max_coordinate=[x1 * factor, y1 * factor],
            target_coordinate_system=system,
        )
        # spatialdata 0.8 gives them in another order.
        assert ([] if found is None else sorted(found.index.tolist())) == expected
    assert expected or box[0] == 250


def test_spatialdata_plot_draws_a_gene(one, tmp_path):
    _, store = one
    mpl.use("Agg")
    pictures = []
    for gene in GENES[:2]:
        _, axes = plt.subplots(figsize=(6, 4))
        plot = store.pl.render_images("he").pl.render_shapes("cells", color=gene)
        plot.pl.show(coordinate_systems="um", ax=axes)
        assert axes.get_xlim()[1] == pytest.approx(WIDTH0 * MPP, abs=5)
        plt.savefig(tmp_path / "x.png", dpi=50)
        plt.close()
        pictures.append(cv2.imread(str(tmp_path / "x.png")))
    # The slide's two halves, and cells in colours of the gene.
    for colour in ((180, 120, 200), (140, 60, 90)):
        close = np.abs(pictures[0].astype(int) - colour).max(axis=2) < 12
        assert close.mean() > 0.05
    assert (pictures[0] != pictures[1]).any()


def test_slides_in_one_store_have_elements_of_their_own(tmp_path, caplog):
    run = make_run(tmp_path, head=True)
    add_slide(run.folder, "A+b", 20, embedding=False, hidden=True, missing_tiles=1)
    add_slide(run.folder, "empty", 0, embedding=False, hidden=True)
    run, out = open_run(run.uri), tmp_path / "x.sdata.zarr"
    assert write_spatialdata(run, str(out)) == 90
    store = sd.read_zarr(out)
    assert sorted(store.shapes) == ["A_b_cells", "a_cells", "b_cells"]
    assert sorted(store.images) == ["a_he", "b_he"]
    assert "slide A+b: its elements are named A_b_cells" in caplog.text
    assert "slide A+b is exported without a picture: slides.json" in caplog.text
    assert "slide A+b is partial" in caplog.text
    assert "1 slide(s) without cells are left out: empty" in caplog.text
    table = store["table"]
    assert table.uns["spatialdata_attrs"]["region"] == ["A_b_cells", "a_cells", "b_cells"]
    assert table.obs["slide_id"].value_counts().to_dict() == {"b": 40, "a": 30, "A+b": 20}
    for name, slide_id in (("A_b_cells", "A+b"), ("a_cells", "a"), ("b_cells", "b")):
        own = table[table.obs["region"] == name]
        assert own.obs["cell_id"].tolist() == store[name].index.tolist()
        assert set(own.obs["slide_id"]) == {slide_id}
        np.testing.assert_allclose(own.X, run.expression_numpy(None, slide_id), rtol=1e-6)
    alone = store.filter_by_coordinate_system("b_um")
    assert sorted(alone.images) + sorted(alone.shapes) == ["b_he", "b_cells"]
    assert {"global", "um", "a_px", "A_b_um"} <= set(store.coordinate_systems)


def test_genes_and_slides_are_in_the_order_asked_for(tmp_path):
    run, out = make_run(tmp_path, head=True), tmp_path / "x.sdata.zarr"
    assert write_spatialdata(run, str(out), ["b", "a"], ["ERBB2", "EPCAM"], picture_mpp=0) == 70
    store = sd.read_zarr(out)
    assert list(store.images) == []
    assert store["table"].var_names.tolist() == ["ERBB2", "EPCAM"]
    expected = [run.expression_numpy(["ERBB2", "EPCAM"], slide_id) for slide_id in ("b", "a")]
    np.testing.assert_allclose(store["table"].X, np.concatenate(expected), rtol=1e-6)


@pytest.mark.parametrize("why", ["gone", "other", "damaged"])
def test_an_archived_slide_has_no_picture(tmp_path, caplog, monkeypatch, why):
    run, out, path = make_run(tmp_path, head=True), tmp_path / "x.sdata.zarr", tmp_path / "a.png"
    if why == "gone":
        path.unlink()
    elif why == "other":
        run.records["a"]["source"] = "0" * 16 + "-" + "0" * 8 + "-" + "0" * 8
    else:

        def fail(*_):
            message = "tile 3 is damaged"
            raise ValueError(message)

        monkeypatch.setattr("scellst_ray.slides.reader.Slide.read", fail)
    assert write_spatialdata(run, str(out), ["a"]) == 30
    store = sd.read_zarr(out)
    assert list(store.images) == []
    assert len(store["cells"]) == 30
    assert "slide a is exported without a picture" in caplog.text
    assert {"gone": "is gone", "other": "another one", "damaged": "tile 3"}[why] in caplog.text
    assert list(out.glob("images/*/*")) == []


def test_a_run_without_expression_has_its_embeddings(tmp_path):
    run, out = make_run(tmp_path, head=False), tmp_path / "x.sdata.zarr"
    assert write_spatialdata(run, str(out)) == 70
    table = sd.read_zarr(out)["table"]
    assert table.shape == (70, 0)
    expected = np.concatenate([run.embeddings(slide_id) for slide_id in ("a", "b")])
    np.testing.assert_array_equal(table.obsm["X_embedding"], expected)


def test_a_run_of_the_first_release(tmp_path):
    run = open_run(ROOT / "tests" / "archives" / "v1" / "run")
    count = write_spatialdata(run, str(tmp_path / "x.sdata.zarr"))
    store = sd.read_zarr(tmp_path / "x.sdata.zarr")
    assert count == store["table"].n_obs == sum(len(shapes) for shapes in store.shapes.values())


def test_x_is_written_in_blocks_of_whole_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "ROW_GROUP", 7)
    monkeypatch.setattr(spatialdata_store, "CHUNK_VALUES", 33)
    run, out = make_run(tmp_path, head=True), tmp_path / "x.sdata.zarr"
    write_spatialdata(run, str(out), picture_mpp=0)
    matrix = json.loads((out / "tables/table/X/zarr.json").read_text())
    assert matrix["chunk_grid"]["configuration"]["chunk_shape"] == [11, 3]
    expected = np.concatenate([run.expression_numpy(None, slide_id) for slide_id in ("a", "b")])
    np.testing.assert_allclose(sd.read_zarr(out)["table"].X, expected, rtol=1e-6)


def test_many_slides_have_no_pictures_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(spatialdata_store, "MOST_PICTURES", 1)
    run, out = make_run(tmp_path, head=False), tmp_path / "x.sdata.zarr"
    write_spatialdata(run, str(out))
    assert list(sd.read_zarr(out).images) == []
    write_spatialdata(run, str(out), picture_mpp=0.5)
    assert sd.read_zarr(out)["b_he"]["scale0"].image.shape == (3, 400, 600)


def test_memory_does_not_grow_with_the_picture(tmp_path, helpers, monkeypatch):
    monkeypatch.setattr(slide_picture, "MOST_READ_PX", 128)
    monkeypatch.setattr(spatial_elements, "CHUNK_PX", 128)
    run = make_run(tmp_path, head=False)
    run.records["a"].pop("source", None)
    run.sources["a"]["uri"] = str(tmp_path / "a.tif")
    peaks = []
    for side in (256, 256, 1024):  # the first brings the imports
        image = np.full((side, side, 3), 200, np.uint8)
        helpers.write_pyramid(tmp_path / "a.tif", [image], MPP)
        tracemalloc.start()
        write_spatialdata(run, str(tmp_path / "x.sdata.zarr"), ["a"], picture_mpp=MPP)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The larger picture has 2.9 MB more.
    assert peaks[2] < peaks[1] + 1e6


def test_nothing_is_said_of_a_healthy_export(tmp_path, caplog, capfd, recwarn):
    caplog.set_level(logging.INFO)
    write_spatialdata(make_run(tmp_path, head=True), str(tmp_path / "x.sdata.zarr"))
    said = capfd.readouterr()
    assert (said.out, said.err, caplog.text) == ("", "", "")
    assert [str(warning.message) for warning in recwarn] == []


def test_failures_leave_what_was_there(tmp_path):
    run, out = make_run(tmp_path, head=True), tmp_path / "x.sdata.zarr"
    write_spatialdata(run, str(out), ["a"], picture_mpp=0)
    path = tmp_path / "run/expression/a.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"expression/a\.parquet"):
        write_spatialdata(open_run(run.uri), str(out), ["a"], picture_mpp=0)
    assert sd.read_zarr(out)["table"].n_obs == 30
    assert sorted(path.name for path in tmp_path.iterdir() if "sdata" in path.name) == [out.name]


def test_what_cannot_be_exported_is_refused(tmp_path):
    run = make_run(tmp_path, head=True)
    add_slide(run.folder, "c", 0, embedding=False, hidden=True)
    run = open_run(run.uri)
    with pytest.raises(ValueError, match="local folder only"):
        write_spatialdata(run, "s3://bucket/x.sdata.zarr")
    with pytest.raises(ValueError, match="have no cells"):
        write_spatialdata(run, str(tmp_path / "x.sdata.zarr"), ["c"])
    with pytest.raises(ValueError, match="NOPE"):
        write_spatialdata(run, str(tmp_path / "x.sdata.zarr"), None, ["NOPE"])
    assert not (tmp_path / "x.sdata.zarr").exists()


def test_without_spatialdata_a_line_names_the_extra(tmp_path, monkeypatch):
    run, original = make_run(tmp_path, head=True), builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "spatialdata":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'scellst-ray\[spatialdata\]'"):
        write_spatialdata(run, str(tmp_path / "x.sdata.zarr"))
