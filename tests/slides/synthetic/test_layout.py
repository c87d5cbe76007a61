import numpy as np
import pytest
import shapely
from scipy.spatial import cKDTree

from scellst_ray.slides.synthetic import slide as synthetic
from scellst_ray.slides.synthetic.config import SyntheticConfig
from tests.support.small_tissue import SMALL


def test_no_nuclei_overlap_and_none_leaves_the_tissue(tissue):
    nuclei = tissue.layout.nuclei
    polygons = shapely.polygons(nuclei.outline_um)
    assert shapely.is_valid(polygons).all()
    i, j = shapely.STRtree(polygons).query(polygons, "dwithin", SMALL.min_gap_um * 0.999)
    assert (i == j).all()
    assert tissue.layout.edge_um.at(nuclei.outline_um.reshape(-1, 2)).min() > 0
    assert (nuclei.outline_um > 0).all()
    assert (nuclei.outline_um < (SMALL.width_um, SMALL.height_um)).all()


def test_types_differ_in_size_and_shape_and_density_is_as_asked():
    config = SyntheticConfig(seed=2, width_um=1500.0, height_um=1500.0)
    tissue = synthetic.make_tissue(config)
    table = synthetic.truth_table(tissue).to_pandas()
    area = table.groupby("nucleus_type")["area_um2"].mean()
    assert set(area.index) == set(synthetic.NUCLEUS_TYPES)
    assert 28 < area["Inflammatory"] < 38  # 6-7 um across
    assert 50 < area["Epithelial"] < 66  # 8-9 um
    assert 90 < area["Neoplastic"] < 130  # 11-13 um
    assert 38 < area["Connective"] < 55  # 13 x 4.5 um
    grid = np.stack(np.meshgrid(np.arange(5, 1500, 10.0), np.arange(5, 1500, 10.0)), axis=-1)
    share = (tissue.layout.edge_um.at(grid.reshape(-1, 2)) > 0).mean()
    assert 0.35 < share < 0.75
    assert len(table) / (share * 1.5**2) == pytest.approx(config.cells_per_mm2, rel=0.1)
    # Types come in regions: most nuclei have a nearest neighbour of their own type.
    nuclei = tissue.layout.nuclei
    nearest = cKDTree(nuclei.centroid_um).query(nuclei.centroid_um, k=2)[1][:, 1]
    same = (nuclei.type_index[nearest] == nuclei.type_index).mean()
    by_chance = (np.bincount(nuclei.type_index) / len(nuclei)) ** 2
    assert same > by_chance.sum() + 0.15
