"""PROFILES equal what numpy and DuckDB compute from all cells."""

import duckdb
import numpy as np
import polars as pl
import pytest

from scellst_ray import storage
from scellst_ray.runs import compaction
from scellst_ray.runs.profiles import QUANTILES, ProfileTotals
from scellst_ray.runs.reading import open_run
from scellst_ray.runs.verify import verify_run
from tests.support import exported_runs
from tests.support.exported_runs import GENES, make_run

predicted = exported_runs.predicted  # a fixture


@pytest.mark.parametrize("rows", [7, 16_384])
def test_every_type_and_gene_is_that_of_its_cells(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(compaction, "ROW_GROUP", rows)
    run = make_run(tmp_path, head=True)
    found = run.profiles()
    assert found.columns == ["slide_id", "nucleus_type", "gene", "n", "mean", "sd", *QUANTILES]
    for slide_id in ("a", "b"):
        types = run.cells(slide_id)["nucleus_type"].to_numpy(zero_copy_only=False)
        values_NG = run.expression_numpy(None, slide_id).astype(np.float64)
        for name in (None, *np.unique(types)):
            part = values_NG if name is None else values_NG[types == name]
            rows_of = found.filter(
                (pl.col("slide_id") == slide_id) & pl.col("nucleus_type").eq_missing(name)
            )
            assert rows_of["gene"].to_list() == GENES
            assert rows_of["n"].unique().to_list() == [len(part)]
            np.testing.assert_allclose(rows_of["mean"], part.mean(axis=0), rtol=1e-5)
            np.testing.assert_allclose(rows_of["sd"], part.std(axis=0), rtol=1e-4, atol=1e-7)
            for column, share in QUANTILES.items():
                exact = np.quantile(part, share, axis=0, method="inverted_cdf")
                np.testing.assert_allclose(rows_of[column], exact, rtol=0.0157)


def test_blocks_of_any_size_give_the_same():
    values = np.random.default_rng(0).gamma(2, 3, (1_000, 4)).astype(np.float32)
    values[:, 3] = 0
    whole, parts = ProfileTotals(4), ProfileTotals(4)
    whole.add(values)
    for part in np.array_split(values, 13):
        parts.add(part)
    for name, expected in whole.columns().items():
        np.testing.assert_allclose(parts.columns()[name], expected, rtol=1e-6)
    np.testing.assert_array_equal(parts.histogram_GB, whole.histogram_GB)
    assert whole.columns()["q95"][3] < 1e-6  # nothing


def test_numbers_beyond_the_histogram_are_at_its_ends():
    totals = ProfileTotals(1)
    totals.add(np.array([[0.0], [1e-30], [1e30]], np.float32))
    assert totals.columns()["q05"][0] < 1e-6
    assert totals.columns()["q95"][0] > 1e6


def test_duckdb_asks_one_gene_of_all_slides(predicted):
    found = duckdb.sql(
        f"SELECT slide_id, n, mean FROM '{predicted.uri}/profiles/*.parquet' "
        "WHERE gene = 'CD3E' AND nucleus_type IS NULL ORDER BY slide_id"
    ).fetchall()
    expected = predicted.expression(["CD3E"]).group_by("slide_id").mean().sort("slide_id").collect()
    assert [row[0] for row in found] == expected["slide_id"].to_list()
    np.testing.assert_allclose([row[2] for row in found], expected["CD3E"], rtol=1e-5)


def test_slides_without_profiles_say_so(predicted, tmp_path):
    record = storage.read_json(predicted.folder.record_uri("a"))
    del record["files"]["PROFILES"], record["checksum"]
    storage.publish_json(predicted.folder.record_uri("a"), record)
    run = open_run(predicted.uri)
    assert run.profiles(["b"])["n"].max() == 40
    with pytest.raises(ValueError, match=r"slide 'a' .* has no PROFILES: an earlier release"):
        run.profiles()
    nuclei = make_run(tmp_path / "nuclei", head=False)
    with pytest.raises(ValueError, match="the run has no expression"):
        nuclei.profiles()


def test_damage_is_noticed(predicted):
    path = predicted.folder.profiles_uri("a")
    content = bytearray(storage.read_bytes(path))
    content[60] ^= 4
    storage.publish_bytes(path, bytes(content))
    with pytest.raises(storage.DamagedFileError, match=r"profiles/a\.parquet"):
        open_run(predicted.uri).profiles()
    assert "profiles/a.parquet" in {finding.path for finding in verify_run(predicted.uri).findings}
