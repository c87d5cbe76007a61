"""The demo, smaller: the whole way, compared with the truth."""

import json

import pytest

from scellst_ray.commands.cli import main
from scellst_ray.commands.configs import DemoConfig

pytestmark = [pytest.mark.ray, pytest.mark.e2e]


def test_what_cannot_be_learnt_from_is_refused_at_once():
    with pytest.raises(ValueError, match="size_um is 100"):
        DemoConfig(size_um=100)
    with pytest.raises(ValueError, match="crops is 10; give at least 64"):
        DemoConfig(crops=10)


@pytest.mark.usefixtures("local_ray")
def test_demo_finds_nuclei_and_expression(tmp_path, capsys):
    assert main(["demo", f"--out={tmp_path}", "--size-um=900", "--crops=256"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["precision"] >= 0.95
    assert report["recall"] >= 0.95
    # Fifty spots teach less than the demo's own two hundred: its 0.5 is asked of those.
    assert report["cell_pearson"] > 0.25
    assert abs(report["cell_pearson_shuffled"]) < 0.05
    assert report["type_balanced_accuracy"] > 1.5 * report["type_chance"]
    page = (tmp_path / "report/slides/slide_b.html").read_text()
    assert "Spots measured, cells predicted" in page
    assert "H&amp;E" in page
    assert (tmp_path / "genes.png").stat().st_size > 20_000
    assert f"{report['cell_pearson']:.3f}" in capsys.readouterr().out
