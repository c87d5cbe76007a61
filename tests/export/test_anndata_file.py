"""AnnData files opened with anndata, scanpy and squidpy, and compared with what the run holds."""

import json
import warnings

import anndata as ad
import fsspec
import h5py
import numpy as np
import pytest

from scellst_ray.export import anndata_file
from scellst_ray.export.anndata import to_anndata
from scellst_ray.export.anndata_file import write_anndata
from scellst_ray.export.pictures import slide_picture
from tests.support import exported_runs
from tests.support.exported_runs import GENES, WIDTH0, make_run

predicted = exported_runs.predicted  # a fixture


@pytest.mark.parametrize("target", ["{tmp}/out/cells.h5ad", "{tmp}/out/cells.zarr"])
def test_files_round_trip_and_replace(predicted, tmp_path, target):
    out = target.format(tmp=tmp_path)
    write_anndata(predicted, out, ["a"], ["CD3E"])
    assert write_anndata(predicted, out, picture_px=120) == 70
    pictures = {name: slide_picture(predicted, name, 120) for name in "ab"}
    adata = to_anndata(predicted, thumbnails=pictures)
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
        write_anndata(predicted, out, picture_px=0)
    fs.get(path, str(tmp_path / f"back.{suffix}"), recursive=True)
    found = (ad.read_h5ad if suffix == "h5ad" else ad.read_zarr)(tmp_path / f"back.{suffix}")
    np.testing.assert_array_equal(found.X, to_anndata(predicted).X)
    fs.rm("/export", recursive=True)


def test_a_failed_write_leaves_what_was_there(predicted, tmp_path, monkeypatch):
    for suffix in ("h5ad", "zarr"):
        out = tmp_path / "out" / f"cells.{suffix}"
        write_anndata(predicted, str(out), ["a"], picture_px=0)

        def fail(*_):
            message = "disk full"
            raise OSError(message)

        with monkeypatch.context() as patch:
            patch.setattr(anndata_file, "expression_of", fail)
            with pytest.raises(OSError, match="disk full"):
                write_anndata(predicted, str(out), picture_px=0)
        read = ad.read_h5ad if suffix == "h5ad" else ad.read_zarr
        assert read(out).n_obs == 30
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_moved_slide_costs_only_its_picture(predicted, tmp_path, caplog):
    (tmp_path / "a.png").unlink()
    write_anndata(predicted, str(tmp_path / "x.h5ad"))
    adata = ad.read_h5ad(tmp_path / "x.h5ad")
    assert "a.png is gone" in caplog.text
    assert [record.slide_id for record in caplog.records] == ["a"]
    library = adata.uns["spatial"]["a"]
    assert library["metadata"]["picture"] == "blank"
    assert library["images"]["hires"].shape == (33, 50, 3)
    assert library["images"]["hires"].min() == 255
    assert library["scalefactors"]["tissue_hires_scalef"] == pytest.approx(50 / WIDTH0)
    assert adata.uns["spatial"]["b"]["metadata"]["picture"] == "slide"
    (tmp_path / "b.png").write_bytes(b"no image")
    write_anndata(predicted, str(tmp_path / "x.h5ad"))
    assert "b.png: neither OpenSlide nor Pillow" in caplog.text
    assert ad.read_h5ad(tmp_path / "x.h5ad").uns["spatial"]["b"]["metadata"]["picture"] == "blank"


def test_what_cannot_be_exported_is_refused(predicted, tmp_path):
    for out in ("cells.csv", "cells"):
        with pytest.raises(ValueError, match=r"end the name in \.h5ad or \.zarr"):
            write_anndata(predicted, str(tmp_path / out))
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "thesis.doc").touch()
    with pytest.raises(ValueError, match="exists and is no Zarr store"):
        write_anndata(predicted, str(tmp_path / "mine.zarr"))
    assert (tmp_path / "mine.zarr" / "thesis.doc").exists()
    with pytest.raises(ValueError, match="'zz'"):
        write_anndata(predicted, str(tmp_path / "x.h5ad"), ["zz"])


def test_a_run_without_expression_exports_embeddings(tmp_path):
    run = make_run(tmp_path, head=False)
    write_anndata(run, str(tmp_path / "x.h5ad"), picture_px=0)
    found = ad.read_h5ad(tmp_path / "x.h5ad")
    assert found.shape == (70, 0)
    assert found.obsm["X_embedding"].dtype == np.float32
    expected = np.concatenate([run.embeddings("a"), run.embeddings("b")])
    np.testing.assert_array_equal(found.obsm["X_embedding"], expected)
    with pytest.raises(ValueError, match="run predict"):
        to_anndata(run, genes=["EPCAM"])


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_blocks_of_any_size_join(tmp_path, monkeypatch, head, suffix):
    """Chunks smaller than a slide, than a table's block, and of few values."""
    run, out = make_run(tmp_path, head=head), str(tmp_path / f"x.{suffix}")
    expected = to_anndata(run)
    read = ad.read_h5ad if suffix == "h5ad" else ad.read_zarr
    for chunk, waiting in (((7, 512), 2**24), ((16_384, 32), 100), ((70, 256), 1)):
        monkeypatch.setattr(anndata_file, "CHUNK", chunk)
        monkeypatch.setattr(anndata_file, "MOST_WAITING", waiting)
        assert write_anndata(run, out, picture_px=0) == 70
        found = read(out)
        np.testing.assert_array_equal(found.X, expected.X)
        assert set(found.obsm) == set(expected.obsm)
        for name in expected.obsm:
            np.testing.assert_array_equal(found.obsm[name], expected.obsm[name])


def test_embeddings_are_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    run = make_run(tmp_path, head=False)
    monkeypatch.setattr(anndata_file, "MOST_WAITING", 8 * 2048)
    monkeypatch.setattr(
        type(run), "embeddings", lambda *_: pytest.fail("all embeddings of a slide were read")
    )
    write_anndata(run, str(tmp_path / "x.h5ad"), picture_px=0)
    with h5py.File(tmp_path / "x.h5ad") as file:
        made = file["obsm/X_embedding"]
        assert (made.shape, made.chunks, made.dtype) == ((70, 2048), (8, 2048), np.float32)


@pytest.mark.parametrize("picture_px", [300, 0])
def test_scanpy_and_squidpy_work_on_the_file(predicted, tmp_path, picture_px):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    with warnings.catch_warnings():
        # These two libraries warn of deprecations, on import and when they plot.
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", kind)
        scanpy, squidpy = pytest.importorskip("scanpy"), pytest.importorskip("squidpy")
        write_anndata(predicted, str(tmp_path / "x.h5ad"), picture_px=picture_px)
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
