import dataclasses
import hashlib

import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest
import shapely
from scipy.spatial import cKDTree

from scellst_ray.core.geometry import Box
from scellst_ray.slides.synthetic import slide as synthetic
from scellst_ray.slides.synthetic.expression import gene_programme
from scellst_ray.slides.synthetic.layout import SyntheticNuclei
from scellst_ray.slides.synthetic.render import SlidePainter
from scellst_ray.slides.synthetic.slide import SyntheticConfig

SMALL = SyntheticConfig(seed=4, width_um=640.0, height_um=420.0, mpp=0.5)


@pytest.fixture(scope="module")
def tissue():
    return synthetic.make_tissue(SMALL)


@pytest.fixture(scope="module")
def image(tissue):
    return synthetic.render(tissue)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return synthetic.write_synthetic_slide(tmp_path_factory.mktemp("slide"), SMALL)


def _outside(tissue, points_um):
    """Tell which points lie in no nucleus."""
    polygons = shapely.STRtree(shapely.polygons(tissue.layout.nuclei.outline_um))
    hit = polygons.query(shapely.points(points_um), predicate="intersects")[0]
    return ~np.isin(np.arange(len(points_um)), hit)


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


@pytest.mark.parametrize("mpp", [0.25, 0.31, 0.4537, 0.5, 0.687])
def test_openslide_opens_it_with_its_mpp(tmp_path, mpp):
    config = dataclasses.replace(SMALL, width_um=310.0, height_um=170.0, mpp=mpp)
    paths = synthetic.write_synthetic_slide(tmp_path, config, name="s")
    with openslide.OpenSlide(paths.slide) as slide:
        assert slide.dimensions == (config.width0, config.height0)
        # OpenSlide holds the resolution tag as float32.
        for axis in "xy":
            assert float(slide.properties[f"openslide.mpp-{axis}"]) == pytest.approx(mpp, rel=1e-6)
        assert slide.level_count >= 2
        assert slide.properties["openslide.level[0].tile-width"] == "256"


def test_levels_hold_the_same_picture_and_axes_are_not_swapped(written, image):
    with openslide.OpenSlide(written.slide) as slide:
        assert slide.dimensions == (1280, 840)
        assert slide.level_dimensions == ((1280, 840), (320, 210), (80, 52))
        assert slide.level_downsamples[1] == 4
        whole = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        np.testing.assert_array_equal(whole, image)
        quarter = np.asarray(slide.read_region((0, 0), 1, (320, 210)).convert("RGB"))
        # The mean of 4 x 4 px, by reshaping; read_region pads nothing here.
        mean = image.reshape(210, 4, 320, 4, 3).mean(axis=(1, 3))
        assert np.abs(quarter - mean).max() <= 1


def test_a_region_has_the_pixels_of_the_whole(tissue, image):
    for box in (Box(0, 0, 40, 30), Box(500, 505, 70, 20), Box(1279, 839, 1, 1)):
        region = synthetic.render_region(tissue, box)
        expected = image[box.y0 : box.y0 + box.h0, box.x0 : box.x0 + box.w0]
        np.testing.assert_array_equal(region, expected)
    with pytest.raises(ValueError, match="beyond the slide"):
        synthetic.render_region(tissue, Box(1270, 0, 20, 20))


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


def test_nuclei_are_dark_where_the_polygons_are(tissue, image):
    y, x = np.random.default_rng(0).integers(0, image.shape[:2], (40_000, 2)).T
    points_um = (np.stack([x, y], axis=1) + 0.5) * SMALL.mpp
    density = -np.log(np.maximum(image[y, x], 1) / 243.0).sum(axis=1)
    outside = _outside(tissue, points_um)
    edge_um = tissue.layout.edge_um.at(points_um)
    ground = density[outside & (edge_um > 10)].mean()
    assert density[~outside].mean() > 1.6 * ground
    background = image[y, x][edge_um < -10]
    assert len(background) > 0.2 * len(x)
    assert (background.mean(axis=0) > 235).all()
    assert 0.3 < background.std() < 5


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("mpp", [0.25, 0.687])
def test_a_lone_nucleus_lies_where_its_polygon_is(kind, mpp):
    config = dataclasses.replace(SMALL, mpp=mpp)
    layout = synthetic.make_tissue(config).layout
    index = int(np.flatnonzero(layout.nuclei.type_index == kind)[0])
    x0, y0 = layout.nuclei.centroid_um[index] / mpp

    def painted(chosen):
        columns = dataclasses.asdict(layout.nuclei)
        nuclei = SyntheticNuclei(**{name: values[chosen] for name, values in columns.items()})
        box = Box(int(x0) - 60, int(y0) - 60, 120, 120)
        region = SlidePainter(dataclasses.replace(layout, nuclei=nuclei)).region(box)
        return -np.log(region.sum(axis=2) / 730.0), box

    bare, box = painted([])
    alone, _ = painted([index])
    darker = alone - bare
    half_the_px = int(layout.nuclei.area_um2[index] / mpp**2 / 2)
    mask = darker > 0.5 * np.median(np.sort(darker.ravel())[-half_the_px:])
    row, column = np.nonzero(mask)
    assert column.mean() + 0.5 + box.x0 == pytest.approx(x0, abs=0.5)
    assert row.mean() + 0.5 + box.y0 == pytest.approx(y0, abs=0.5)
    assert mask.sum() * mpp**2 == pytest.approx(layout.nuclei.area_um2[index], rel=0.15)


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


def test_expression_follows_what_can_be_seen():
    tissue = synthetic.make_tissue(SyntheticConfig(seed=1, width_um=1200.0, height_um=1200.0))
    nuclei, programme = tissue.layout.nuclei, tissue.programme
    one_hot = np.eye(4)[nuclei.type_index]
    visible = np.concatenate(
        [one_hot, one_hot * np.log(nuclei.area_um2)[:, None], one_hot * nuclei.stain[:, None]],
        axis=1,
    )
    fitted = visible @ np.linalg.lstsq(visible, tissue.expected_NG, rcond=None)[0]
    varying = [g for g, role in enumerate(programme.roles) if role != "constant"]
    unexplained = (tissue.expected_NG - fitted).var(axis=0) / tissue.expected_NG.var(axis=0)
    assert (1 - unexplained)[varying].min() > 0.7
    constant = programme.gene_names.index("ACTB")
    assert np.ptp(tissue.expected_NG[:, constant]) == 0
    by_type = [
        tissue.expected_NG[nuclei.type_index == k, programme.gene_names.index("COL1A1")].mean()
        for k in range(4)
    ]
    assert np.argmax(by_type) == 2
    proliferation = tissue.expected_NG[:, programme.gene_names.index("MKI67")]
    neoplastic = nuclei.type_index == 0
    assert np.corrcoef(np.log(proliferation[neoplastic]), nuclei.area_um2[neoplastic])[0, 1] > 0.5
    # Counts are draws around the rates: their mean is rate x E[library] = rate x exp(sd^2 / 2).
    ratio = tissue.counts_NG.mean(axis=0) / tissue.expected_NG.mean(axis=0)
    np.testing.assert_allclose(ratio, np.exp(0.2**2 / 2), rtol=0.08)


def test_programmes_of_different_lengths_agree():
    short, long = gene_programme(9, 3), gene_programme(64, 3)
    assert long.gene_names[:9] == short.gene_names
    np.testing.assert_array_equal(long.log_rate_TG[:, :9], short.log_rate_TG)
    assert len(set(long.gene_names)) == 64
    assert long.gene_names[-1] == "GENE64"


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


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"mpp": 0.0}, "mpp=0.0 is outside"),
        ({"mpp": float("nan")}, "mpp=nan is outside"),
        ({"num_genes": 0}, "num_genes=0"),
        ({"capture_efficiency": 1.5}, "capture_efficiency"),
        ({"spot_layout": "line"}, "expected 'hex' or 'square'"),
    ],
)
def test_impossible_configs_are_refused(values, expected):
    with pytest.raises(ValueError, match=expected):
        SyntheticConfig(**values)
