"""The SQL that FORMAT.md prints gives the expression that the product reads."""

import re

import duckdb
import numpy as np
import pytest
import torch

from scellst_ray import storage
from scellst_ray.models.mil.head import MilHead, formula_of
from scellst_ray.runs.last_layer import check_last_layer, last_layer_table, write_last_layer
from scellst_ray.runs.reading import open_run
from tests.support.written_runs import GENES, add_slide, make_run
from tests.test_format import TEXT

ONE_GENE, UNPACK, FURTHER_GENE = re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)


def write_run(folder, predictor="ours", loss="mse", ensemble=1):
    torch.manual_seed(0)
    formula = formula_of(predictor, loss, ensemble=ensemble)
    head = MilHead(8, len(GENES), formula=formula)
    folder = make_run(str(folder), head)
    for slide_id in ("a", "bb"):
        add_slide(folder, slide_id, embedding=False, hidden=ensemble)
    run = open_run(folder.uri)
    write_last_layer(run.uri, run.last_layer, run.folder.digest)
    return run


@pytest.fixture
def database(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")  # FORMAT.md names files from there
    with duckdb.connect() as connection:
        yield connection


def check(found, run):
    for slide_id in ("a", "bb"):
        rows = sorted((row[1], row[2]) for row in found if row[0] == slide_id)
        expected = run.expression(["ERBB2"], slide_id).sort("cell_id")
        assert [row[0] for row in rows] == expected["cell_id"].to_list()
        values = expected["ERBB2"].to_numpy()
        np.testing.assert_allclose([row[1] for row in rows], values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("predictor", "loss", "ensemble"),
    [("ours", "mse", 1), ("published", "mse", 3), ("ours", "nb", 1), ("published", "nb_total", 2)],
)
def test_sql_alone_computes_a_gene(tmp_path, database, predictor, loss, ensemble):
    run = write_run(tmp_path / "run", predictor, loss, ensemble)
    check(database.sql(ONE_GENE).fetchall(), run)


@pytest.mark.parametrize(("predictor", "loss"), [("ours", "mse"), ("published", "nb")])
def test_unpacked_factors_serve_further_genes(tmp_path, database, predictor, loss):
    run = write_run(tmp_path / "run", predictor, loss)
    database.execute(UNPACK)
    set_gene, ask = FURTHER_GENE.split(";", 1)
    database.execute(set_gene)
    check(database.sql(ask).fetchall(), run)


def test_another_heads_layer_is_noticed(tmp_path):
    run = write_run(tmp_path / "run")
    check_last_layer(run.uri, run.last_layer, run.folder.digest)
    table = last_layer_table(run.last_layer, run.folder.digest)
    for other in (table.slice(1), last_layer_table(run.last_layer, "another run")):
        storage.publish_table(f"{run.uri}/last_layer.parquet", other)
        with pytest.raises(storage.DamagedFileError, match="not the last layer of the run's head"):
            check_last_layer(run.uri, run.last_layer, run.folder.digest)
    (tmp_path / "run/last_layer.parquet").unlink()
    check_last_layer(run.uri, run.last_layer, run.folder.digest)
