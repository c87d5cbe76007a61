"""GENES hold the expression of the run, small, and only of this run and these genes."""

import duckdb
import numpy as np
import pytest

from scellst_ray import storage
from scellst_ray.export.genes import check_folder, genes_uri, is_written, write_genes
from scellst_ray.runs.reading import open_run
from tests.support import exported_runs
from tests.support.exported_runs import add_slide

predicted = exported_runs.predicted  # a fixture
WANTED = ["ERBB2", "EPCAM"]


@pytest.mark.parametrize("target", ["{tmp}/genes", "memory://genes/out"])
def test_columns_are_the_expression_of_the_run(predicted, tmp_path, target):
    out = target.format(tmp=tmp_path)
    assert write_genes(predicted, out, "b", WANTED) == 40
    found = storage.read_table(genes_uri(out, "b"))
    assert found.column_names == ["slide_id", "cell_id", *WANTED]
    expected = predicted.expression_arrow(WANTED, "b")
    assert found["cell_id"].equals(expected["cell_id"])
    for gene in WANTED:
        np.testing.assert_array_equal(found[gene].to_numpy(), expected[gene].to_numpy())
    storage.remove_tree(out)


def test_other_programs_read_it(predicted, tmp_path):
    for slide_id in ("a", "b"):
        write_genes(predicted, str(tmp_path / "out"), slide_id, WANTED)
    means = duckdb.sql(
        f"SELECT slide_id, avg(ERBB2) FROM '{tmp_path}/out/*.parquet' GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    for slide_id, mean in means:
        expected = predicted.expression_numpy(["ERBB2"], slide_id).mean()
        assert mean == pytest.approx(expected, rel=1e-5)


def test_a_value_takes_at_most_four_bytes(predicted, tmp_path):
    add_slide(predicted.folder, "c", 20_000, embedding=False, hidden=True)
    write_genes(open_run(predicted.uri), str(tmp_path), "c", ["EPCAM"])
    assert (tmp_path / "c.parquet").stat().st_size <= 4 * 20_000


def test_written_slides_are_known_while_their_expression_is_the_same(predicted, tmp_path):
    out = str(tmp_path / "out")
    assert not is_written(predicted, out, "a")
    write_genes(predicted, out, "a", WANTED)
    assert is_written(predicted, out, "a")
    add_slide(predicted.folder, "a", 31, embedding=False, hidden=True)
    again = open_run(predicted.uri)
    assert not is_written(again, out, "a")
    assert write_genes(again, out, "a", WANTED) == 31
    assert is_written(again, out, "a")


def test_a_folder_of_other_genes_runs_or_files_is_refused(predicted, tmp_path):
    out = str(tmp_path / "out")
    check_folder(predicted, out, WANTED)
    write_genes(predicted, out, "a", WANTED)
    check_folder(predicted, out, WANTED)
    with pytest.raises(ValueError, match=r"a\.parquet: holds other genes, or is of another run"):
        check_folder(predicted, out, ["CD3E"])
    with pytest.raises(ValueError, match=r"cells/a\.parquet: holds other genes"):
        check_folder(predicted, f"{predicted.uri}/cells", WANTED)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt: is no Parquet file of `genes`"):
        check_folder(predicted, out, WANTED)
