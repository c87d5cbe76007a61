"""AnnData in memory has the layout that scanpy and squidpy read, and what the run holds."""

import numpy as np
import pytest

from scellst_ray.export.anndata import to_anndata
from scellst_ray.runs.known_slides import accept_slides
from scellst_ray.runs.reading import open_run
from tests.support import exported_runs
from tests.support.exported_runs import MPP, add_slide

predicted = exported_runs.predicted  # a fixture


def test_layout_is_that_of_the_convention(predicted):
    adata = to_anndata(predicted, ["b", "a"], ["ERBB2", "EPCAM"])
    cells = predicted.cells_frame(["b", "a"])
    assert adata.X.dtype == np.float32
    assert adata.var_names.tolist() == ["ERBB2", "EPCAM"]
    assert adata.obs_names[0] == "b_0"
    assert adata.obs_names[-1] == "a_29"
    assert adata.obs_names.is_unique
    columns = ["cell_id", "region", "cell_type", "area", "slide_id", "x_um", "y_um"]
    assert list(adata.obs) == columns
    np.testing.assert_allclose(adata.obs["x_um"], cells["x0"].to_numpy() * MPP, rtol=1e-6)
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


def test_partial_slides_are_said_to_be_so(predicted, caplog):
    accept_slides(predicted.folder, {"c": {"uri": "c.png", "mpp": MPP}}, {})
    add_slide(predicted.folder, "c", 5, embedding=False, hidden=True, missing_tiles=2)
    adata = to_anndata(open_run(predicted.uri), ["c"])
    assert adata.n_obs == 5
    assert "slide c is partial" in caplog.text
    assert [record.slide_id for record in caplog.records] == ["c"]


def test_what_cannot_be_exported_is_refused(predicted):
    with pytest.raises(ValueError, match="'ERBB3'; did you mean 'ERBB2'"):
        to_anndata(predicted, genes=["ERBB3"])
    with pytest.raises(ValueError, match="have no cells; choose slides"):
        to_anndata(predicted, [])


def test_ids_of_genes_that_the_head_knows(predicted):
    assert "gene_ids" not in to_anndata(predicted).var
    layer = predicted.last_layer
    layer.info["gene_ids"] = ["ENSG1", None, "ENSG3"]
    assert to_anndata(predicted).var["gene_ids"].to_dict() == {
        "EPCAM": "ENSG1",
        "CD3E": "",
        "ERBB2": "ENSG3",
    }
    assert to_anndata(predicted, genes=["ERBB2"]).var["gene_ids"].tolist() == ["ENSG3"]
    layer.info["gene_ids"] = ["ENSG1"]
    assert "gene_ids" not in to_anndata(predicted).var
