import anndata as ad
import numpy as np
import scanpy as sc

from scellst_ray.annotation.normalised import (
    merge_types,
    normalise,
    normalised_blocks,
    slide_moments,
)
from scellst_ray.models.mil import stored_head
from tests.support.exported_runs import make_run


def test_a_cell_has_the_total_that_scanpy_gives_it():
    x = np.random.default_rng(0).gamma(1, 1, (50, 7)).astype(np.float32)
    adata = ad.AnnData(x.copy())
    sc.pp.normalize_total(adata, target_sum=1e4)
    np.testing.assert_allclose(normalise(x), adata.X, rtol=1e-6)
    x[3] = 0
    assert not normalise(x)[3].any()


def test_a_cell_that_is_not_finite_has_no_values():
    x = np.ones((3, 4), np.float32)
    x[1, 2], x[2, 0] = np.nan, np.inf
    assert np.isfinite(normalise(x)).all(axis=1).tolist() == [True, False, False]
    assert np.isnan(normalise(x)[1:]).all()


def test_moments_by_type_are_those_of_all_cells(tmp_path, monkeypatch):
    run = make_run(tmp_path, head=True)
    monkeypatch.setattr(stored_head, "BLOCK_VALUES", 30)  # blocks of 10 cells
    assert len(list(normalised_blocks(run, "a"))) == 3
    slides = [slide_moments(run, slide_id) for slide_id in ("a", "b")]
    found = merge_types(slides)
    values = np.concatenate([normalise(run.expression_numpy(None, s)) for s in ("a", "b")])
    types = run.cells_frame(["a", "b"], ["nucleus_type"])["nucleus_type"].to_numpy()
    assert list(found) == sorted(set(types))
    for name, moments in found.items():
        x = values[types == name]
        assert moments.num_cells == len(x)
        np.testing.assert_allclose(moments.mean_G, x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(moments.variance_G, x.var(axis=0, ddof=1), rtol=1e-9)
