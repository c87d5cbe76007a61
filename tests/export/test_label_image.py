"""Images of outlines: each px belongs to the cell whose outline holds its centre."""

import warnings

import anndata as ad
import matplotlib as mpl
import numpy as np
import pytest
import shapely

from scellst_ray.export import pictures
from scellst_ray.export.anndata_file import write_anndata
from scellst_ray.export.label_image import label_image
from scellst_ray.runs import compaction
from tests.support.exported_runs import HEIGHT0, MPP, WIDTH0, make_run


def outlines(run, slide_id):
    return shapely.from_wkb(run.cells(slide_id, ["polygon"])["polygon"].to_numpy())


@pytest.mark.parametrize("ratio", [1, 0.5, 2])
def test_px_belong_to_the_outlines_that_hold_them(tmp_path, monkeypatch, ratio):
    monkeypatch.setattr(compaction, "ROW_GROUP", 7)
    run = make_run(tmp_path, head=False)
    shape = (round(HEIGHT0 / ratio), round(WIDTH0 / ratio))
    labels, lost = label_image(run, "b", shape, ratio)
    assert lost == 0
    assert np.array_equal(np.unique(labels), np.arange(41))
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    centres = shapely.points((columns.ravel() + 0.5) * ratio, (rows.ravel() + 0.5) * ratio)
    for number, outline in enumerate(outlines(run, "b"), 1):
        others = [o for n, o in enumerate(outlines(run, "b"), 1) if n != number]
        alone = shapely.difference(outline, shapely.union_all(others))
        inside = shapely.contains(alone, centres).reshape(shape)
        assert (labels[inside] == number).all()
        # OpenCV fills the px on the rim, too.
        near = shapely.dwithin(outline, centres, 1.01 * ratio).reshape(shape)
        assert near[labels == number].all()


def test_each_cell_has_a_px_as_long_as_there_are_enough(tmp_path):
    run = make_run(tmp_path, head=False)
    for side, fewest in ((60, 0), (12, 0), (4, 30)):
        labels, lost = label_image(run, "b", (side * HEIGHT0 // WIDTH0, side), WIDTH0 / side)
        assert len(np.setdiff1d(np.arange(1, 41), labels)) == lost
        assert lost >= fewest
        assert lost <= max(0, 40 - labels.size) + fewest


def test_a_slide_without_cells_has_no_label(tmp_path):
    run = make_run(tmp_path, head=False)
    run.records["a"]["tables"] = []
    labels, lost = label_image(run, "a", (4, 6), 100)
    assert (labels.max(), lost) == (0, 0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_squidpy_colours_the_outlines(tmp_path, suffix):
    mpl.use("Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        squidpy = pytest.importorskip("squidpy")
    import matplotlib.pyplot as plt

    run, out = make_run(tmp_path, head=True), tmp_path / f"x{suffix}"
    write_anndata(run, str(out), picture_px=WIDTH0, outlines=True)
    adata = (ad.read_h5ad if suffix == ".h5ad" else ad.read_zarr)(out)
    assert adata.obs["outline_id"].tolist() == [*range(1, 31), *range(1, 41)]
    for slide_id in ("a", "b"):
        images = adata.uns["spatial"][slide_id]["images"]
        assert images["segmentation"].shape == images["hires"].shape[:2] == (HEIGHT0, WIDTH0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            axis = squidpy.pl.spatial_segment(
                adata,
                color="CD3E",
                seg_cell_id="outline_id",
                library_key="region",
                library_id=[slide_id],
                return_ax=True,
            )
        axis = axis[0] if isinstance(axis, list) else axis
        drawn = np.asarray(max(axis.images, key=lambda image: image.zorder).get_array())
        cells = adata[adata.obs["region"] == slide_id]
        values = cells[:, "CD3E"].X.ravel()
        cmap = mpl.colormaps["viridis"]
        expected = cmap(mpl.colors.Normalize(values.min(), values.max())(values))
        for number, colour in zip(cells.obs["outline_id"], expected, strict=True):
            found = drawn[images["segmentation"] == number]
            assert np.abs(found[:, :3] - colour[:3]).max() < 0.01
        plt.close("all")


def test_size_by_default(tmp_path, monkeypatch, caplog):
    run, out = make_run(tmp_path, head=False), tmp_path / "x.h5ad"
    (tmp_path / "b.png").unlink()
    write_anndata(run, str(out), outlines=True)
    spatial = ad.read_h5ad(out).uns["spatial"]
    for slide_id, kind in (("a", "slide"), ("b", "blank")):
        images = spatial[slide_id]["images"]
        # 1 um per px
        shape = (HEIGHT0 * MPP, WIDTH0 * MPP)
        assert images["segmentation"].shape == images["hires"].shape[:2] == shape
        assert spatial[slide_id]["metadata"]["picture"] == kind
    monkeypatch.setattr(pictures, "OUTLINES_PX", 4)
    write_anndata(run, str(out), outlines=True)
    assert "slide b: 28 of its cells have no px in the image of outlines" in caplog.text
