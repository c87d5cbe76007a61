"""Expression that is read equals what torch computes from the stored hidden factor."""

import tracemalloc

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from scellst_ray.models.mil import stored_head
from scellst_ray.models.mil.head import MilHead, formula_of
from scellst_ray.runs import compaction
from scellst_ray.runs.reading import open_run
from tests.support import written_runs
from tests.support.mil_heads import spread_from_hidden
from tests.support.written_runs import GENES, add_slide, make_run, torch_expression

head, predicted = written_runs.head, written_runs.predicted  # fixtures


def test_expression_equals_torch_for_any_genes_and_cells(predicted, head):
    uri, table = predicted
    run = open_run(uri)
    assert run.genes == GENES
    whole = torch_expression(head, table, GENES)
    np.testing.assert_allclose(run.expression_numpy(None, "a"), whole, rtol=1e-5)
    genes = ["KRT8", "EPCAM"]
    ids = table["cell_id"].to_numpy()
    some = np.random.default_rng(1).permutation(len(ids))[:11]
    some = np.append(some, some[3])  # one is repeated, in random order
    found = run.expression(genes, "a", ids[some])
    assert found.columns == ["slide_id", "cell_id", *genes]
    assert set(found.schema.values()) == {pl.String, pl.Int64, pl.Float32}
    assert found["cell_id"].to_list() == ids[some].tolist()
    expected = torch_expression(head, table, genes)[some]
    np.testing.assert_allclose(found.select(genes).to_numpy(), expected, rtol=1e-5)
    one = run.expression_numpy("KRT8", "a", ids[some])
    np.testing.assert_allclose(one, expected[:, :1], rtol=1e-5)
    assert run.expression(genes, "a", []).shape == (0, 4)


def test_an_ensemble_has_a_mean_and_a_deviation_for_every_cell(tmp_path):
    torch.manual_seed(0)
    head = MilHead(8, len(GENES), formula=formula_of("published", "nb", ensemble=3))
    folder = make_run(str(tmp_path / "run"), head)
    table = add_slide(folder, "a", embedding=False, hidden=3)
    run = open_run(folder.uri)
    hidden = torch.from_numpy(np.stack(table["hidden"].to_numpy()))
    assert hidden.shape[1] == 768
    with torch.no_grad():
        spread = spread_from_hidden(head, hidden).numpy()
    whole = torch_expression(head, table, GENES)
    np.testing.assert_allclose(run.expression_numpy(None, "a"), whole, rtol=1e-5)
    ids = table["cell_id"].to_numpy()[[7, 2]]
    found = run.expression_numpy(["KRT8", "EPCAM"], "a", ids, "sd")
    np.testing.assert_allclose(found, spread[[7, 2]][:, [4, 0]], rtol=1e-3, atol=1e-6)


def test_one_network_has_no_deviation(predicted):
    with pytest.raises(ValueError, match="this head is one network: for a deviation train"):
        open_run(predicted[0]).expression_numpy(None, "a", None, "sd")


def test_expression_in_blocks(predicted, head, monkeypatch):
    uri, table = predicted
    monkeypatch.setattr(stored_head, "BLOCK_VALUES", 3 * len(GENES))
    blocks = list(open_run(uri).iter_expression(None, "a"))
    sizes = [len(values) for _, values in blocks]
    assert sizes == [3, 3, 1] * 4 + [2]  # 30 cells in row groups of 7
    ids = pa.concat_tables([ids for ids, _ in blocks])
    assert ids.equals(table.select(["slide_id", "cell_id"]).cast(ids.schema))
    values = np.concatenate([values for _, values in blocks])
    np.testing.assert_allclose(values, torch_expression(head, table, GENES), rtol=1e-5)


def test_only_the_row_groups_needed_are_read(predicted, monkeypatch):
    uri, table = predicted
    read, original = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **kwargs: read.append(group) or original(self, group, **kwargs),
    )
    ids = table["cell_id"].to_numpy()
    open_run(uri).expression_numpy(None, "a", ids[[0, 1, 22]])
    assert read == [0, 3]


def test_memory_is_bounded_by_a_block(tmp_path, head, monkeypatch):
    monkeypatch.setattr(compaction, "ROW_GROUP", 500)
    monkeypatch.setattr(stored_head, "BLOCK_VALUES", 500 * len(GENES))
    folder = make_run(str(tmp_path / "run"), head)
    add_slide(folder, "a", num_tiles=20, cells_per_tile=800, embedding=False, hidden=True)
    run = open_run(folder.uri)
    whole = 16_000 * 256 * 2
    next(run.iter_expression(None, "a"))  # imports and caches
    start = pa.total_allocated_bytes()
    tracemalloc.start()
    peak = 0
    for _, values in run.iter_expression(None, "a"):
        peak = max(peak, pa.total_allocated_bytes() - start)
        assert values.shape == (500, len(GENES))
    _, numpy_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak + numpy_peak < whole / 4
