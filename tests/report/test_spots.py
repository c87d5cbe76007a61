import numpy as np
import pytest

from scellst_ray.report.cells import read_cells
from scellst_ray.report.maps import squares_over
from scellst_ray.report.spots import predict_spots, spot_rows
from scellst_ray.spots.read import read_spots
from tests.support.exported_runs import make_run
from tests.support.pages import decode
from tests.support.reported_runs import write_spots


@pytest.fixture
def cells(tmp_path):
    from dataclasses import replace

    run = make_run(tmp_path, head=True)
    return replace(read_cells(run, "a"), values_NG=run.expression_numpy(run.genes, "a"))


def row_of(tmp_path, genes):
    write_spots(tmp_path, genes)
    row = {"slide_id": "a", "mpp_confirmed": "yes", "spot_diameter_um": 45.0}
    return row | {"spots": f"{tmp_path}/a.tsv", "spot_positions": f"{tmp_path}/a_positions.tsv"}


def test_a_spot_is_the_mean_of_its_cells(cells, tmp_path):
    spots = read_spots(row_of(tmp_path, ["EPCAM"]), cells.mpp)
    found = predict_spots(cells, spots)
    for row, centre in zip(found, spots.xy0, strict=True):
        inside = np.hypot(*(cells.xy0_N2 - centre).T) <= spots.radius0
        expected = cells.values_NG[inside].mean(axis=0) if inside.any() else np.full(3, np.nan)
        assert row == pytest.approx(expected, nan_ok=True)
    assert np.isfinite(found).any()
    assert np.isnan(found).any()


def test_each_measured_gene_has_three_maps(cells, tmp_path):
    squares = squares_over(cells.xy0_N2, cells.size0)
    row = row_of(tmp_path, ["ERBB2", "EPCAM"])
    rows = spot_rows(cells, squares, ["EPCAM", "CD3E", "ERBB2"], row, "u")
    assert [found.name for found in rows] == ["EPCAM", "ERBB2"]
    for found in rows:
        assert [one.scale.unit for one in found.maps] == ["log(1 + counts per 10,000)", "u", "u"]
        assert all(decode(one.picture.uri).std() > 0 for one in found.maps)
        assert "Pearson r over" in found.about


def test_spots_that_share_no_gene(cells, tmp_path):
    squares = squares_over(cells.xy0_N2, cells.size0)
    with pytest.raises(ValueError, match="none of CD3E was measured"):
        spot_rows(cells, squares, ["CD3E"], row_of(tmp_path, ["ERBB2"]), "u")
