"""The top genes of each nucleus type stand on the page of the cohort."""

import numpy as np
import pytest

from scellst_ray.annotation.differential import differential_genes
from scellst_ray.annotation.moments import block_moments
from scellst_ray.commands.annotate import run_annotate
from scellst_ray.commands.configs import AnnotateConfig
from scellst_ray.report.cells import NUM_TYPES
from scellst_ray.report.differential import NUM_GENES, differential_table, top_genes
from scellst_ray.runs.reading import open_run
from scellst_ray.runs.scores import read_differential_genes, read_scores_info, table_uri
from tests.support.exported_runs import make_run


def moments_of(counts, num_genes=30, seed=0):
    """Return moments of types, each of which has more of the gene of its own number."""
    rng = np.random.default_rng(seed)
    found = {}
    for number, (name, count) in enumerate(counts.items()):
        values = rng.gamma(2, 1, (count, num_genes))
        values[:, number % num_genes] += 4
        found[name] = block_moments(values)
    return found


@pytest.mark.parametrize(
    "counts",
    [{"a": 30, "b": 90}, {"x": 5, "y": 400, "z": 60}, {f"t{n}": 20 + n for n in range(15)}],
)
def test_genes_of_highest_t_of_the_commonest_types(counts):
    genes = [f"G{n}" for n in range(30)]
    found = top_genes(differential_genes(moments_of(counts), genes, "d"))
    order = sorted(counts, key=lambda name: -counts[name])[:NUM_TYPES]
    assert found.headings == [f"{name}: {counts[name]:,} cells" for name in order]
    assert len(found.rows) == NUM_GENES
    for name, text in zip(order, found.rows[0], strict=True):
        assert text.startswith(f"G{list(counts).index(name)} (")


def test_genes_that_are_lower_are_left_out():
    values = np.random.default_rng(0).gamma(2, 1, (40, 3))
    lower = block_moments(values * (0.1, 0.1, 9.0))
    table = differential_genes({"a": lower, "b": block_moments(values)}, ["X", "Y", "Z"], "d")
    found = top_genes(table)
    columns = {h[0]: [row[i] for row in found.rows] for i, h in enumerate(found.headings)}
    assert [text.split()[0] for text in columns["a"] if text] == ["Z"]
    assert sorted(text.split()[0] for text in columns["b"] if text) == ["X", "Y"]


def test_those_of_a_run(tmp_path):
    run = make_run(tmp_path, head=True)
    assert differential_table(run, None) == (None, "")
    markers = tmp_path / "m.csv"
    markers.write_text("type,gene\nT,CD3E\ntumour,ERBB2\n")
    run_annotate(AnnotateConfig(run=run.uri, markers=str(markers)))
    run = open_run(run.uri)
    info = read_scores_info(run.uri)
    table, problem = differential_table(run, info)
    assert problem == ""
    assert table == top_genes(read_differential_genes(run))
    path = tmp_path / "run/scores/cohort/differential_genes.parquet"
    assert str(path) == table_uri(run.uri, "DIFFERENTIAL_GENES")
    path.write_bytes(path.read_bytes()[:-9])
    table, problem = differential_table(run, info)
    assert table is None
    assert problem.startswith("differential genes: ")
    assert "differential_genes.parquet" in problem
