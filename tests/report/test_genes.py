import numpy as np
import pytest

from scellst_ray.report.genes import NUM_GENES, choose_shown_genes
from tests.support.exported_runs import make_run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, head=True)


def by_spread(run):
    values = np.concatenate([run.expression_numpy(None, s) for s in "ab"])
    spread = values.var(axis=0) / values.mean(axis=0)
    return [run.genes[i] for i in np.argsort(-spread)[:NUM_GENES]]


def test_the_most_variable_genes_come_first(run):
    genes, how = choose_shown_genes(run, None)
    assert genes == by_spread(run)
    assert "PROFILES of 2 slide(s)" in how


def test_runs_without_profiles_are_looked_at_cell_by_cell(run):
    for record in run.records.values():
        del record["files"]["PROFILES"]
    genes, how = choose_shown_genes(run, None)
    assert genes == by_spread(run)
    assert "cells of 2 slide(s)" in how


def test_damaged_profiles_are_left_to_the_other_slides(run, tmp_path):
    (tmp_path / "run/profiles/a.parquet").write_bytes(b"PAR1")
    assert "PROFILES of 1 slide(s)" in choose_shown_genes(run, None)[1]


def test_no_slide_can_be_read(run, tmp_path):
    for name in ("profiles", "expression"):
        for slide in "ab":
            (tmp_path / f"run/{name}/{slide}.parquet").write_bytes(b"PAR1")
    assert choose_shown_genes(run, None)[0] == run.genes


def test_genes_that_are_asked_for(run):
    assert choose_shown_genes(run, ["ERBB2"])[0] == ["ERBB2"]
    with pytest.raises(ValueError, match="did you mean 'CD3E'"):
        choose_shown_genes(run, ["CD3D"])


def test_a_run_of_extract_has_no_genes(tmp_path):
    run = make_run(tmp_path / "nuclei", head=False)
    assert choose_shown_genes(run, None) == ([], "the run has no expression")
    with pytest.raises(ValueError, match="run predict"):
        choose_shown_genes(run, ["CD3E"])
