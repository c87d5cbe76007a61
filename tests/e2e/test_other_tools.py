"""The commands and the code of docs/other-tools.md run as they stand, one after the other."""

import re
import shlex
import warnings

import matplotlib as mpl
import numpy as np
import pytest

from scellst_ray.commands.cli import main
from tests.support.exported_runs import make_run
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/other-tools.md").read_text(encoding="utf-8")


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_page_runs(tmp_path, monkeypatch):
    mpl.use("Agg")
    for package in ("squidpy", "spatialdata", "spatialdata_plot", "sopa", "duckdb"):
        pytest.importorskip(package)
    (tmp_path / "runs").mkdir()
    make_run(tmp_path, head=True, names=("P2", "P1_A"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename(tmp_path / "runs" / "cohort")
    (tmp_path / "markers.csv").write_text(
        re.search(r"^```\n(type,gene\n.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1]
    )
    for line in blocks("sh")[0].splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks("python"):
            exec(block, names)
    run = names["run"]
    assert names["cells"].obs["best_type"].notna().all()
    assert 0 < len(names["corner"]) < names["cells"].n_obs
    assert names["by_slide"] == [
        (s, pytest.approx(run.expression_numpy(["ERBB2"], s).mean(), rel=1e-5), n)
        for s, n in (("P1_A", 30), ("P2", 40))
    ]
    for slide_id, count in names["high"].iter_rows():
        erbb2, cd3e = run.expression_numpy(["ERBB2", "CD3E"], slide_id).T
        assert count == np.count_nonzero(erbb2 > cd3e)
    assert 0 < len(names["window"]) < 30
