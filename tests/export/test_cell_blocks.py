"""Blocks of cells hold what whole tables hold, wherever row groups are cut."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from scellst_ray import storage
from scellst_ray.export.cell_blocks import cell_blocks, in_rows
from scellst_ray.models.mil import stored_head
from scellst_ray.runs import compaction
from scellst_ray.runs.reading import open_run
from tests.support import written_runs
from tests.support.exported_runs import make_run as make_small_run
from tests.support.written_runs import GENES, add_slide, make_run

head = written_runs.head  # a fixture
COLUMNS = ["cell_id", "x0", "polygon"]


@pytest.mark.parametrize(("rows", "values"), [(7, 1 << 20), (7, 15), (1000, 15), (1, 5)])
def test_blocks_join_both_tables(tmp_path, head, monkeypatch, rows, values):
    monkeypatch.setattr(compaction, "ROW_GROUP", rows)
    monkeypatch.setattr(stored_head, "BLOCK_VALUES", values)
    folder = make_run(str(tmp_path / "run"), head)
    add_slide(folder, "a", embedding=False, hidden=True)
    run = open_run(folder.uri)
    blocks = list(cell_blocks(run, "a", COLUMNS, GENES))
    assert pa.concat_tables([b.cells for b in blocks]).equals(run.cells("a", COLUMNS))
    found = np.concatenate([block.values_NG for block in blocks])
    np.testing.assert_array_equal(found, run.expression_numpy(None, "a"))
    assert all(block.distance_N is None for block in blocks)  # these shards have none
    without = list(cell_blocks(run, "a", COLUMNS))
    assert pa.concat_tables([b.cells for b in without]).equals(run.cells("a", COLUMNS))
    assert all(block.values_NG.shape == (len(block.cells), 0) for block in without)


@pytest.mark.parametrize("change", ["one less", "one more", "another one"])
def test_tables_of_other_cells_are_refused(tmp_path, head, change):
    folder = make_run(str(tmp_path / "run"), head)
    add_slide(folder, "a", embedding=False, hidden=True)
    run = open_run(folder.uri)
    uri = folder.expression_uri("a")
    table = storage.read_table(uri)
    ids = table["cell_id"].to_numpy().copy()
    ids[-1] += 1
    other = table.set_column(1, table.schema.field(1), pa.array(ids))
    changed = {
        "one less": table.slice(0, len(table) - 1),
        "one more": pa.concat_tables([table, other.slice(len(table) - 1)]),
        "another one": other,
    }[change]
    storage.publish_table(uri, changed.replace_schema_metadata(table.schema.metadata))
    # Records of earlier releases hold neither stamps nor counts that would tell sooner.
    old = {"slide_id": "a", "status": "done", "tables": ["CELLS", "EXPRESSION"]}
    run = dataclasses.replace(run, records={"a": old})
    with pytest.raises(ValueError, match="CELLS and EXPRESSION of slide 'a' have different cells"):
        list(cell_blocks(run, "a", COLUMNS, GENES))


def test_a_run_without_expression_has_blocks_of_cells(tmp_path):
    run = make_small_run(tmp_path, head=False)
    assert sum(len(b.cells) for b in cell_blocks(run, "b", ["cell_id"])) == 40
    with pytest.raises(ValueError, match="run predict"):
        list(cell_blocks(run, "b", ["cell_id"], ["EPCAM"]))


@pytest.mark.parametrize("sizes", [[], [3], [4, 4], [1, 9, 2], [12], [5, 0, 7]])
def test_in_rows(sizes):
    rows = np.arange(sum(sizes) * 2).reshape(-1, 2)
    blocks = np.split(rows, np.cumsum(sizes)[:-1]) if sizes else []
    found = list(in_rows(iter(blocks), 4))
    assert all(len(block) == 4 for block in found[:-1])
    assert all(0 < len(block) <= 4 for block in found)
    np.testing.assert_array_equal(np.concatenate([*found, rows[:0]]), rows)
