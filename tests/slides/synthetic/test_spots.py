import csv
import dataclasses
import gzip
import json

import numpy as np
import pandas as pd
import pytest
import scipy.io

from scellst_ray.slides.synthetic import slide as synthetic
from scellst_ray.slides.synthetic.spots import make_spots, write_space_ranger, write_st_array
from tests.support.small_tissue import SMALL


@pytest.mark.parametrize("spot_layout", ["hex", "square"])
def test_spot_counts_equal_a_loop_over_cells(spot_layout):
    config = dataclasses.replace(
        SMALL, spot_layout=spot_layout, capture_efficiency=1.0, capture_sd=0.0, mpp=0.4537
    )
    tissue = synthetic.make_tissue(config)
    spots, nuclei = tissue.spots, tissue.layout.nuclei
    assert len(set(spots.barcode.tolist())) == len(spots)
    assert 0 < spots.in_tissue.sum() < len(spots)
    assert spots.num_cells.sum() > 100
    for s in range(len(spots)):
        total, num = np.zeros(config.num_genes), 0
        for i in range(len(nuclei)):
            x0, y0 = nuclei.centroid_um[i] / config.mpp
            if (x0 - spots.x0[s]) ** 2 + (y0 - spots.y0[s]) ** 2 <= (27.5 / config.mpp) ** 2:
                total += tissue.counts_NG[i]
                num += 1
        np.testing.assert_array_equal(spots.counts_SG[s], total)
        assert spots.num_cells[s] == num


def test_capture_loses_molecules(tissue):
    full = make_spots(
        dataclasses.replace(
            tissue.layout,
            config=dataclasses.replace(SMALL, capture_efficiency=1.0, capture_sd=0.0),
        ),
        tissue.counts_NG,
    )
    assert (tissue.spots.counts_SG <= full.counts_SG).all()
    assert tissue.spots.counts_SG.sum() / full.counts_SG.sum() == pytest.approx(0.7, abs=0.08)


def test_hexagonal_grid_is_visium_like(tissue):
    spots = tissue.spots
    points_um = np.stack([spots.x0, spots.y0], axis=1) * SMALL.mpp
    distance = np.hypot(*(points_um[:, None] - points_um[None]).transpose(2, 0, 1))
    distance += 1e9 * np.eye(len(spots))
    np.testing.assert_allclose(distance.min(axis=1), 100, atol=1.5)
    assert (distance < 102).sum(axis=1).max() == 6
    assert ((spots.array_row + spots.array_col) % 2 == 0).all()


@pytest.mark.parametrize("old", [False, True])
def test_space_ranger_folder(tmp_path, tissue, old):
    spots, genes = tissue.spots, tissue.programme.gene_names
    write_space_ranger(tmp_path, SMALL, spots, genes, old_positions=old)
    matrix = scipy.io.mmread(tmp_path / "filtered_feature_bc_matrix" / "matrix.mtx.gz").toarray()
    with gzip.open(tmp_path / "filtered_feature_bc_matrix" / "barcodes.tsv.gz", "rt") as file:
        barcodes = file.read().split()
    with gzip.open(tmp_path / "filtered_feature_bc_matrix" / "features.tsv.gz", "rt") as file:
        features = list(csv.reader(file, delimiter="\t"))
    assert [row[1] for row in features] == list(genes)
    assert {row[2] for row in features} == {"Gene Expression"}
    name = "tissue_positions_list.csv" if old else "tissue_positions.csv"
    with (tmp_path / "spatial" / name).open() as file:
        rows = list(csv.reader(file))
    if not old:
        assert rows.pop(0)[4:] == ["pxl_row_in_fullres", "pxl_col_in_fullres"]
    assert len(rows) == len(spots)
    assert max(float(row[5]) for row in rows) > SMALL.height0  # the last column is x
    position = {row[0]: row for row in rows}
    for column, barcode in enumerate(barcodes):
        row = position[barcode]
        assert row[1] == "1"
        s = spots.barcode.tolist().index(barcode)
        assert (float(row[5]), float(row[4])) == (spots.x0[s], spots.y0[s])
        np.testing.assert_array_equal(matrix[:, column], spots.counts_SG[s])
    assert len(barcodes) == sum(row[1] == "1" for row in rows)
    factors = json.loads((tmp_path / "spatial" / "scalefactors_json.json").read_text())
    assert factors["spot_diameter_fullres"] == pytest.approx(110)


def test_st_array_folder(tmp_path, tissue):
    counts_path, positions_path = write_st_array(
        tmp_path, "A1", tissue.spots, tissue.programme.gene_names
    )
    counts = pd.read_csv(counts_path, sep="\t", index_col=0)
    positions = pd.read_csv(positions_path, sep="\t")
    assert list(counts.columns) == list(tissue.programme.gene_names)
    assert list(positions.columns) == ["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"]
    assert (positions["x"].astype(str) + "x" + positions["y"].astype(str)).tolist() == list(
        counts.index
    )
    inside = tissue.spots.in_tissue
    np.testing.assert_array_equal(counts.to_numpy(), tissue.spots.counts_SG[inside])
    np.testing.assert_array_equal(positions["pixel_x"], tissue.spots.x0[inside])
    np.testing.assert_array_equal(positions["pixel_y"], tissue.spots.y0[inside])
