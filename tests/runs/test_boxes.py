"""Boxes hold their outlines, and readers of GeoParquet find windows by them."""

import duckdb
import geopandas
import numpy as np
import pyarrow as pa
import pytest
import shapely

from scellst_ray.runs import compaction
from scellst_ray.runs.boxes import SIDES, with_boxes
from tests.support.written_runs import add_slide, make_run


def test_an_outline_lies_within_its_box():
    rng = np.random.default_rng(0)
    corners = np.concatenate(
        [rng.uniform(0, 2e5, (500, 2)), 16_777_217 + rng.integers(0, 9, (9, 2)), [[-0.1, 0.3]]]
    )
    outlines = shapely.box(*corners.T, *(corners + rng.uniform(0.01, 30, corners.shape)).T)
    cells = with_boxes(pa.table({"polygon": pa.array(shapely.to_wkb(outlines))}))
    boxes = np.stack([cells["bbox"].combine_chunks().field(side) for side in SIDES], axis=1)
    assert boxes.dtype == np.float32
    bounds = shapely.bounds(outlines)
    assert (boxes[:, :2] <= bounds[:, :2]).all()
    assert (boxes[:, 2:] >= bounds[:, 2:]).all()
    # Rounded by no more than a step of float32.
    assert (np.abs(boxes - bounds) <= np.spacing(np.abs(bounds).astype(np.float32))).all()
    assert len(with_boxes(cells.select(["polygon"]).slice(0, 0))) == 0


@pytest.fixture
def cells_uri(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "ROW_GROUP", 16)
    folder = make_run(str(tmp_path / "run"))
    add_slide(folder, "a", num_tiles=20, embedding=False, hidden=False)
    return folder.cells_uri("a")


def test_geopandas_reads_a_window(cells_uri):
    whole = geopandas.read_parquet(cells_uri)
    window = (200, 100, 600, 500)
    found = geopandas.read_parquet(cells_uri, bbox=window)
    expected = whole.cx[window[0] : window[2], window[1] : window[3]]
    assert 5 < len(found) < len(whole)
    assert found["cell_id"].tolist() == expected["cell_id"].tolist()


def test_duckdb_reads_a_window(cells_uri):
    found = duckdb.sql(
        f"SELECT cell_id FROM '{cells_uri}' WHERE bbox.xmax >= 200 AND bbox.xmin <= 600 "
        "AND bbox.ymax >= 100 AND bbox.ymin <= 500 ORDER BY cell_id"
    ).fetchnumpy()["cell_id"]
    expected = geopandas.read_parquet(cells_uri).cx[200:600, 100:500]["cell_id"]
    assert found.tolist() == expected.tolist()
