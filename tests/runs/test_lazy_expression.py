"""A lazy frame of all slides holds what each slide gives, and reads no more than asked."""

import numpy as np
import polars as pl
import pytest

from scellst_ray import storage
from scellst_ray.runs import lazy_expression
from scellst_ray.runs.reading import open_run
from tests.support import cached, written_runs
from tests.support.written_runs import GENES, add_slide, make_run

cache, head = cached.cache, written_runs.head  # fixtures
pytestmark = pytest.mark.usefixtures("cache")
SLIDES = ["a", "bb", "ccc"]


@pytest.fixture(params=["{tmp}/run", "memory://lazy/run"])
def run(request, tmp_path, head):
    uri = request.param.format(tmp=tmp_path)
    folder = make_run(uri, head)
    for slide_id in SLIDES:
        add_slide(folder, slide_id, embedding=False, hidden=True)
    add_slide(folder, "none", num_tiles=1, cells_per_tile=0, embedding=False, hidden=True)
    yield open_run(uri)
    storage.remove_tree(uri)


@pytest.fixture
def opened(monkeypatch):
    """The columns that are read of EXPRESSION, by slide."""
    asked, original = [], lazy_expression._frames

    def frames(run, slide_id, digest, genes, rows):
        asked.append((slide_id, list(genes)))
        return original(run, slide_id, digest, genes, rows)

    monkeypatch.setattr(lazy_expression, "_frames", frames)
    return asked


def test_it_equals_reading_slide_by_slide(run):
    expected = pl.concat([run.expression(["KRT8", "CD3E"], slide_id) for slide_id in SLIDES])
    lazy = run.expression(["KRT8", "CD3E"])
    assert lazy.collect_schema() == expected.schema
    for engine in ("in-memory", "streaming"):
        found = lazy.collect(engine=engine)
        assert found.select("slide_id", "cell_id").equals(expected.select("slide_id", "cell_id"))
        genes = ["KRT8", "CD3E"]
        np.testing.assert_allclose(found[genes].to_numpy(), expected[genes].to_numpy(), rtol=1e-5)
    assert run.expression(None).collect().columns == ["slide_id", "cell_id", *GENES]


def test_a_query_computes_what_it_uses(run, opened):
    lazy = run.expression(None)
    mean = lazy.group_by("slide_id").agg(pl.col("ERBB2").mean()).sort("slide_id").collect()
    assert [genes for _, genes in opened] == [["ERBB2"]] * 4
    expected = [run.expression_numpy(["ERBB2"], slide_id).mean() for slide_id in SLIDES]
    np.testing.assert_allclose(mean["ERBB2"].to_numpy(), expected, rtol=1e-5)
    opened.clear()
    one = lazy.filter(pl.col("slide_id") == "bb").select("cell_id", "EPCAM").collect()
    assert opened == [("bb", ["EPCAM"])]
    assert one["cell_id"].to_list() == run.cells("bb")["cell_id"].to_pylist()
    opened.clear()
    assert lazy.head(3).select("cell_id").collect().height == 3
    assert opened == [("a", [])]
    high = lazy.filter((pl.col("EPCAM") > 1.0) & (pl.col("slide_id") != "a")).collect()
    whole = lazy.collect()
    assert high.equals(whole.filter((pl.col("EPCAM") > 1.0) & (pl.col("slide_id") != "a")))


def test_a_further_gene_unpacks_nothing(run, monkeypatch):
    run.expression(["EPCAM"]).collect()
    monkeypatch.setattr(lazy_expression, "row_groups", lambda *_: pytest.fail("unpacked again"))
    found = open_run(run.uri).expression(["KRT8"]).collect()
    expected = np.concatenate([run.expression_numpy(["KRT8"], slide_id) for slide_id in SLIDES])
    np.testing.assert_allclose(found["KRT8"].to_numpy(), expected[:, 0], rtol=1e-5)


def test_without_a_cache_it_is_read_all_the_same(run, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SCELLST_RAY_CACHE_DIR", str(tmp_path / "file"))
    assert run.expression(["EPCAM"]).collect().height == 90
    assert caplog.text.count("without the node's cache, which is slow") == 1


def test_another_table_is_never_taken_for_the_cached_one(run):
    run.expression(["EPCAM"]).collect()
    add_slide(run.folder, "a", num_tiles=3, embedding=False, hidden=True)
    again = open_run(run.uri)
    found = again.expression(["EPCAM"]).filter(pl.col("slide_id") == "a").collect()
    np.testing.assert_allclose(
        found["EPCAM"].to_numpy(), again.expression_numpy(["EPCAM"], "a")[:, 0], rtol=1e-5
    )


def test_unknown_genes_are_refused_at_once(run):
    with pytest.raises(ValueError, match="'ERBB3'; did you mean 'ERBB2'"):
        run.expression(["ERBB3"])
