"""Exports opened with anndata, scanpy and squidpy, and compared with what the run holds."""

import json
import warnings

import anndata as ad
import cv2
import fsspec
import h5py
import numpy as np
import pyarrow as pa
import pytest
import shapely
import torch

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.export.anndata import Thumbnail, read_thumbnail, to_anndata, write_anndata
from scellst_ray.models.mil.head import MilHead, save_head
from scellst_ray.runs import compaction
from scellst_ray.runs.documents import publish_document
from scellst_ray.runs.folder import begin_run
from scellst_ray.runs.known_slides import accept_slides
from scellst_ray.runs.reading import open_run
from scellst_ray.storage import node_cache
from tests.support.run_folders import Settings

GENES = ["EPCAM", "CD3E", "ERBB2"]
WIDTH0, HEIGHT0, MPP = 600, 400, 0.5


def vectors(values):
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def add_slide(folder, slide_id, count, *, embedding, hidden, missing_tiles=0):
    """Finish a slide of one tile with `count` cells, through the real writer."""
    rng = np.random.default_rng(count)
    xy = (rng.uniform(0, 1, (count, 2)) * (WIDTH0, HEIGHT0)).astype(np.float32)
    columns = {
        "slide_id": pa.repeat(slide_id, count),
        "cell_id": pa.array(np.arange(count)),
        "x0": xy[:, 0],
        "y0": xy[:, 1],
        "area_um2": rng.uniform(20, 90, count).astype(np.float32),
        "nucleus_type": rng.choice(["Neoplastic", "immune", "stroma"], count).tolist(),
        "type_prob": pa.nulls(count, pa.float32()),
        "polygon": shapely.to_wkb(shapely.box(*xy.T, *(xy.T + 5))).tolist(),
        "seam": np.zeros(count, np.uint8),
    }
    if embedding:
        columns["embedding"] = vectors(rng.normal(size=(count, 2048)).astype(np.float16))
    if hidden:
        columns["hidden"] = vectors(rng.uniform(0, 3, (count, 256)).astype(np.float16))
    storage.publish_table(folder.shard_uri(f"{slide_id}.parquet"), pa.table(columns))
    tile = {"slide_id": slide_id, "num_tiles": 1 + missing_tiles, "num_cells": 0, "mpp": MPP}
    tile |= {"width0": WIDTH0, "height0": HEIGHT0}
    rows = [
        tile | {"tile_id": 0, "num_cells": count, "shard": f"{slide_id}.parquet", "shard_row": 0}
    ]
    rows += [tile | {"tile_id": 1 + i, "error": "cut off"} for i in range(missing_tiles)]
    receipts = {f.name: pa.array([r.get(f.name) for r in rows], f.type) for f in schemas.RECEIPTS}
    compaction.finish_slide(folder, slide_id, pa.table(receipts, schema=schemas.RECEIPTS))


def make_run(tmp_path, *, head):
    """A run of slides b (40 cells) and a (30), with their images."""
    uri = str(tmp_path / "run")
    identity = {"store_embeddings": not head}
    folder = begin_run(uri, "predict" if head else "extract", Settings(identity), {})
    if head:
        torch.manual_seed(0)
        info = {"genes": GENES, "scaling": {}, "embedding_dim": 8, "encoder_digest": "e"}
        info |= {"training_slides": [], "metrics": {}}
        save_head(f"{uri}/head.safetensors", MilHead(8, len(GENES)), info)
    slides = {}
    for slide_id, count in (("b", 40), ("a", 30)):
        add_slide(folder, slide_id, count, embedding=not head, hidden=head)
        image = np.full((HEIGHT0, WIDTH0, 3), (200, 120, 180), np.uint8)
        image[:, WIDTH0 // 2 :] = (90, 60, 140)
        cv2.imwrite(str(tmp_path / f"{slide_id}.png"), image[..., ::-1])
        slides[slide_id] = {"uri": str(tmp_path / f"{slide_id}.png"), "mpp": MPP}
    accept_slides(folder, slides, {})
    return open_run(uri)


@pytest.fixture
def predicted(tmp_path):
    return make_run(tmp_path, head=True)


def test_layout_is_that_of_the_convention(predicted):
    adata = to_anndata(predicted, ["b", "a"], ["ERBB2", "EPCAM"])
    cells = predicted.cells_frame(["b", "a"])
    assert adata.X.dtype == np.float32
    assert adata.var_names.tolist() == ["ERBB2", "EPCAM"]
    assert adata.obs_names[0] == "b_0"
    assert adata.obs_names[-1] == "a_29"
    assert adata.obs_names.is_unique
    assert list(adata.obs) == ["cell_id", "region", "cell_type", "area", "slide_id"]
    assert adata.obs["cell_id"].tolist() == cells["cell_id"].to_list()
    assert adata.obs["area"].tolist() == cells["area_um2"].to_list()
    assert adata.obs["cell_type"].tolist() == cells["nucleus_type"].to_list()
    assert adata.obs["region"].cat.categories.tolist() == ["b", "a"]
    np.testing.assert_array_equal(adata.obsm["spatial"], cells.select("x0", "y0").to_numpy())
    expected = [predicted.expression_numpy(["ERBB2", "EPCAM"], slide) for slide in ("b", "a")]
    np.testing.assert_array_equal(adata.X, np.concatenate(expected))
    # Neoplastic has its own colour. Other types take spare ones, in the order of categories.
    assert adata.obs["cell_type"].cat.categories.tolist() == ["Neoplastic", "immune", "stroma"]
    assert list(adata.uns["cell_type_colors"]) == ["#ff0000", "#1f77b4", "#9467bd"]
    library = adata.uns["spatial"]["a"]
    area_um2 = predicted.cells("a")["area_um2"].to_numpy()
    diameter = np.mean([2 * (area / MPP**2 / np.pi) ** 0.5 for area in area_um2])
    assert library["scalefactors"]["spot_diameter_fullres"] == pytest.approx(diameter, rel=1e-5)
    assert library["metadata"]["source_image_path"].endswith("a.png")


def test_pictures_lie_where_the_slide_lies(predicted):
    thumbnail = read_thumbnail(predicted, "a", longest_px=150)
    assert thumbnail.image.shape == (100, 150, 3)
    assert thumbnail.ratio == 4
    assert thumbnail.image[50, 70].tolist() == [200, 120, 180]
    assert thumbnail.image[50, 80].tolist() == [90, 60, 140]
    assert read_thumbnail(predicted, "a", 5000).image.shape == (HEIGHT0, WIDTH0, 3)
    given = {"a": thumbnail, "b": Thumbnail(np.zeros((80, 120, 3), np.uint8), 5.0)}
    spatial = to_anndata(predicted, thumbnails=given).uns["spatial"]
    assert spatial["a"]["scalefactors"]["tissue_hires_scalef"] == 0.25
    assert spatial["b"]["images"]["hires"].shape == (80, 120, 3)


@pytest.mark.parametrize("target", ["{tmp}/out/cells.h5ad", "{tmp}/out/cells.zarr"])
def test_files_round_trip_and_replace(predicted, tmp_path, target):
    out = target.format(tmp=tmp_path)
    write_anndata(predicted, out, ["a"], ["CD3E"])
    adata = write_anndata(predicted, out, thumbnail_px=120)
    read = ad.read_h5ad if out.endswith("h5ad") else ad.read_zarr
    found = read(out)
    np.testing.assert_array_equal(found.X, adata.X)
    assert found.var_names.tolist() == GENES
    assert found.obs.equals(adata.obs)
    assert list(found.uns["cell_type_colors"]) == list(adata.uns["cell_type_colors"])
    for slide_id in ("a", "b"):
        stored, made = (x.uns["spatial"][slide_id] for x in (found, adata))
        np.testing.assert_array_equal(stored["images"]["hires"], made["images"]["hires"])
        assert stored["images"]["hires"].shape == (80, 120, 3)
        assert stored["scalefactors"] == made["scalefactors"]
        assert stored["metadata"]["picture"] == "slide"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [out.rsplit("/", 1)[1]]


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_export_to_a_remote_filesystem(predicted, tmp_path, suffix):
    out = f"memory://export/cells.{suffix}"
    fs, path = fsspec.core.url_to_fs(out)
    for _ in range(2):  # the second replaces the first
        adata = write_anndata(predicted, out, thumbnail_px=None)
    fs.get(path, str(tmp_path / f"back.{suffix}"), recursive=True)
    found = (ad.read_h5ad if suffix == "h5ad" else ad.read_zarr)(tmp_path / f"back.{suffix}")
    np.testing.assert_array_equal(found.X, adata.X)
    fs.rm("/export", recursive=True)


def test_a_failed_write_leaves_what_was_there(predicted, tmp_path, monkeypatch):
    for suffix in ("h5ad", "zarr"):
        out = tmp_path / "out" / f"cells.{suffix}"
        write_anndata(predicted, str(out), ["a"], thumbnail_px=None)

        def fail(*_):
            message = "disk full"
            raise OSError(message)

        with monkeypatch.context() as patch:
            patch.setattr(ad.AnnData, f"write_{suffix}", fail)
            with pytest.raises(OSError, match="disk full"):
                write_anndata(predicted, str(out), thumbnail_px=None)
        read = ad.read_h5ad if suffix == "h5ad" else ad.read_zarr
        assert read(out).n_obs == 30
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_moved_slide_costs_only_its_picture(predicted, tmp_path, caplog):
    (tmp_path / "a.png").unlink()
    adata = write_anndata(predicted, str(tmp_path / "x.h5ad"))
    assert "a.png is gone" in caplog.text
    assert [record.slide_id for record in caplog.records] == ["a"]
    library = adata.uns["spatial"]["a"]
    assert library["metadata"]["picture"] == "blank"
    assert library["images"]["hires"].shape == (333, 500, 3)
    assert library["images"]["hires"].min() == 255
    assert library["scalefactors"]["tissue_hires_scalef"] == pytest.approx(500 / WIDTH0)
    assert adata.uns["spatial"]["b"]["metadata"]["picture"] == "slide"
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.png: neither OpenSlide nor Pillow"):
        write_anndata(predicted, str(tmp_path / "x.h5ad"))


def test_the_picture_is_that_of_the_file_in_which_the_cells_were_found(predicted, tmp_path, caplog):
    source = f"{node_cache.fingerprint(str(tmp_path / 'a.png'))}-rest0000"
    record = predicted.records["a"] | {"source": source}
    publish_document(predicted.folder.record_uri("a"), record)
    assert read_thumbnail(open_run(predicted.uri), "a") is not None
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes() + b"x")
    assert read_thumbnail(open_run(predicted.uri), "a") is None
    assert "a.png is another file now; it is exported with a blank picture" in caplog.text


def test_partial_slides_are_said_to_be_so(predicted, caplog):
    accept_slides(predicted.folder, {"c": {"uri": "c.png", "mpp": MPP}}, {})
    add_slide(predicted.folder, "c", 5, embedding=False, hidden=True, missing_tiles=2)
    adata = to_anndata(open_run(predicted.uri), ["c"])
    assert adata.n_obs == 5
    assert "slide c is partial" in caplog.text
    assert [record.slide_id for record in caplog.records] == ["c"]


def test_what_cannot_be_exported_is_refused(predicted, tmp_path):
    for out in ("cells.csv", "cells"):
        with pytest.raises(ValueError, match=r"end the name in \.h5ad or \.zarr"):
            write_anndata(predicted, str(tmp_path / out))
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "thesis.doc").touch()
    with pytest.raises(ValueError, match="exists and is no Zarr store"):
        write_anndata(predicted, str(tmp_path / "mine.zarr"))
    assert (tmp_path / "mine.zarr" / "thesis.doc").exists()
    with pytest.raises(ValueError, match="'ERBB3'; did you mean 'ERBB2'"):
        to_anndata(predicted, genes=["ERBB3"])
    with pytest.raises(ValueError, match="'zz'"):
        write_anndata(predicted, str(tmp_path / "x.h5ad"), ["zz"])
    with pytest.raises(ValueError, match="have no cells; choose slides"):
        to_anndata(predicted, [])


def test_a_run_without_expression_exports_embeddings(tmp_path):
    run = make_run(tmp_path, head=False)
    write_anndata(run, str(tmp_path / "x.h5ad"), thumbnail_px=None)
    found = ad.read_h5ad(tmp_path / "x.h5ad")
    assert found.shape == (70, 0)
    assert found.obsm["X_embedding"].dtype == np.float32
    expected = np.concatenate([run.embeddings("a"), run.embeddings("b")])
    np.testing.assert_array_equal(found.obsm["X_embedding"], expected)
    with pytest.raises(ValueError, match="run predict"):
        to_anndata(run, genes=["EPCAM"])


@pytest.mark.parametrize("thumbnail_px", [300, None])
def test_scanpy_and_squidpy_work_on_the_file(predicted, tmp_path, thumbnail_px):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    with warnings.catch_warnings():
        # These two libraries warn of deprecations, on import and when they plot.
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", kind)
        scanpy, squidpy = pytest.importorskip("scanpy"), pytest.importorskip("squidpy")
        write_anndata(predicted, str(tmp_path / "x.h5ad"), thumbnail_px=thumbnail_px)
        adata = ad.read_h5ad(tmp_path / "x.h5ad")
        one = adata[adata.obs["slide_id"] == "a"].copy()
        axes = scanpy.pl.spatial(one, library_id="a", color="EPCAM", show=False)
        assert len(axes[0].get_images()) == 1
        scanpy.pl.embedding(adata, basis="spatial", color=["cell_type", "CD3E"], show=False)
        squidpy.pl.spatial_scatter(adata, library_key="region", color=["cell_type", "CD3E"])
        matplotlib.pyplot.close("all")
        squidpy.gr.spatial_neighbors(adata, coord_type="generic", library_key="region", n_neighs=6)
    graph = adata.obsp["spatial_connectivities"]
    region = adata.obs["region"].to_numpy()
    rows, columns = graph.nonzero()
    assert len(rows) >= 6 * adata.n_obs
    assert (region[rows] == region[columns]).all()


OLD_ENCODINGS = {
    *("anndata", "array", "categorical", "dataframe", "dict", "numeric-scalar", "string"),
    "string-array",
}


@pytest.mark.parametrize("head", [False, True])
def test_stores_hold_only_encodings_that_older_readers_know(tmp_path, head):
    """Those of anndata 0.10, which knows neither "null" nor "nullable-string-array"."""
    run = make_run(tmp_path, head=head)
    write_anndata(run, str(tmp_path / "a.zarr"))
    write_anndata(run, str(tmp_path / "a.h5ad"))
    found = [json.loads(path.read_text()) for path in (tmp_path / "a.zarr").rglob(".zattrs")]
    consolidated = json.loads((tmp_path / "a.zarr" / ".zmetadata").read_text())["metadata"]
    found += [value for name, value in consolidated.items() if name.endswith(".zattrs")]
    with h5py.File(tmp_path / "a.h5ad") as file:
        file.visititems(lambda _, item: found.append(dict(item.attrs)))
    assert {attributes["encoding-type"] for attributes in found} <= OLD_ENCODINGS
    assert "raw/.zattrs" not in consolidated
    assert "X/.zattrs" in consolidated
    assert len(ad.read_zarr(tmp_path / "a.zarr")) == len(ad.read_h5ad(tmp_path / "a.h5ad"))
