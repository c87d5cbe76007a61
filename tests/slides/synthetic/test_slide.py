import dataclasses
import hashlib

import numpy as np
import pyarrow.parquet as pq
import shapely

from scellst_ray.core.geometry import Box
from scellst_ray.slides.synthetic import slide as synthetic
from tests.support.small_tissue import SMALL


def test_equal_configs_give_equal_files(tmp_path, written):
    again = synthetic.write_synthetic_slide(tmp_path, SMALL)
    folder, other = written.slide.parent, tmp_path
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    assert len(names) == 8
    assert not [name for name in names if name.name.startswith(".")]
    for name in names:
        digests = [hashlib.sha256((f / name).read_bytes()).digest() for f in (folder, other)]
        assert digests[0] == digests[1], name
    assert again.slide == tmp_path / "slide.tiff"


def test_seeds_change_only_what_they_name(tissue, image):
    other = synthetic.make_tissue(dataclasses.replace(SMALL, seed=5))
    assert len(other.layout.nuclei) != len(tissue.layout.nuclei)
    assert other.programme.gene_names == tissue.programme.gene_names
    np.testing.assert_array_equal(other.programme.log_rate_TG, tissue.programme.log_rate_TG)

    restained = synthetic.make_tissue(dataclasses.replace(SMALL, stain_seed=99))
    assert synthetic.truth_table(restained).equals(synthetic.truth_table(tissue))
    box = Box(300, 200, 400, 300)
    difference = synthetic.render_region(restained, box).astype(float) - image[200:500, 300:700]
    assert np.abs(difference.mean(axis=(0, 1))).max() > 2

    reprogrammed = synthetic.make_tissue(dataclasses.replace(SMALL, programme_seed=1))
    assert synthetic.truth_table(reprogrammed).equals(synthetic.truth_table(tissue))
    assert not np.allclose(reprogrammed.expected_NG, tissue.expected_NG)


def test_the_same_tissue_at_any_mpp(tissue):
    fine = synthetic.make_tissue(dataclasses.replace(SMALL, mpp=0.25))
    np.testing.assert_array_equal(fine.layout.nuclei.outline_um, tissue.layout.nuclei.outline_um)
    np.testing.assert_array_equal(fine.expected_NG, tissue.expected_NG)
    coarse_image = synthetic.render_region(tissue, Box(512, 256, 256, 256)).astype(float)
    fine_image = synthetic.render_region(fine, Box(1024, 512, 512, 512)).astype(float)
    halved = fine_image.reshape(256, 2, 256, 2, 3).mean(axis=(1, 3))
    correlation = np.corrcoef(coarse_image[..., 0].ravel(), halved[..., 0].ravel())[0, 1]
    assert correlation > 0.97


def test_truth_tables(written, tissue):
    truth = pq.read_table(written.truth)
    assert truth.equals(synthetic.truth_table(tissue))
    polygons = shapely.from_wkb(truth["polygon"].to_pylist())
    centroid = shapely.centroid(polygons)
    np.testing.assert_allclose(truth["x0"], shapely.get_x(centroid), atol=1e-6)
    np.testing.assert_allclose(truth["y0"], shapely.get_y(centroid), atol=1e-6)
    np.testing.assert_allclose(truth["area_um2"], shapely.area(polygons) * SMALL.mpp**2)
    expression = pq.read_table(written.truth_expression)
    assert expression.column_names == ["cell_id", *tissue.programme.gene_names]
    assert expression["cell_id"].equals(truth["cell_id"])
    np.testing.assert_array_equal(expression["KRT8"], tissue.expected_NG[:, 3])


def test_square_layout_writes_an_array(tmp_path):
    config = dataclasses.replace(SMALL, spot_layout="square", spot_pitch_um=200.0, num_genes=3)
    paths = synthetic.write_synthetic_slide(tmp_path, config, name="C2")
    assert paths.space_ranger is None
    assert paths.st_counts == tmp_path / "C2.tsv.gz"
    assert paths.st_positions == tmp_path / "C2_selection.tsv"


def test_no_cells_is_a_tissue_too(tmp_path):
    config = dataclasses.replace(SMALL, cells_per_mm2=0.0, width_um=200.0, height_um=150.0)
    paths = synthetic.write_synthetic_slide(tmp_path, config)
    assert pq.read_table(paths.truth).num_rows == 0
    assert paths.slide.exists()
