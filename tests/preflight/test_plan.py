"""`scellst-ray plan`: its settings, and its output for people and machines."""

import json

import pytest
import yaml

from scellst_ray.commands.cli import main
from scellst_ray.models.mil.head import MilHead, save_head
from scellst_ray.preflight.config import PlanConfig
from scellst_ray.preflight.costs import PlannedCluster
from scellst_ray.preflight.plan import make_plan
from scellst_ray.stages.config import ExtractConfig, PredictConfig
from tests.support.commands import capture_settings
from tests.support.paths import ROOT

plan_config = PlanConfig.from_flags
INFO = {
    "genes": ["A", "B"],
    "scaling": {},
    "embedding_dim": 512,
    "encoder": "random:0:resnet18",
    "encoder_digest": "random:0:resnet18",
    "training_slides": [],
    "metrics": {},
}


@pytest.fixture
def manifest(synthetic_slide, tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_text(f"slide_id,uri\ngood,{synthetic_slide.slide}\ngone,gone.tiff\n")
    return path


@pytest.mark.parametrize("job", ["extract", "predict"])
def test_takes_the_jobs_files_as_they_are(job, monkeypatch, tmp_path):
    seen = capture_settings(monkeypatch)
    example = ROOT / "jobs" / f"{job}.example.yaml"
    whole = example.read_text() + "gpus: true\nworkers: 3\n"
    (tmp_path / "job.yaml").write_text(whole)
    assert main(["plan", "--config", str(tmp_path / "job.yaml"), "--gpus", "4"]) == 0
    (config,) = seen
    assert config.cluster() == PlannedCluster(cpus=32, gpus=4, workers=32)
    kind = {"extract": ExtractConfig, "predict": PredictConfig}[job]
    values = yaml.safe_load(whole)
    assert config.job == kind(**values)
    assert main(["plan", "--config", str(tmp_path / "job.yaml")]) == 0
    assert seen[1].num_gpus == 1


def test_tells_people_and_machines(manifest, tmp_path, capsys):
    words = ["plan", f"--manifest={manifest}", "--core-px=96", "--halo-px=32", "--workers=4"]
    words += ["--encoder=none", "--cpu-price=0.5", f"--json={tmp_path}/plan.json"]
    assert main([*words, "--processes=1"]) == 1  # a slide is gone
    shown = capsys.readouterr().out
    document = json.loads((tmp_path / "plan.json").read_text())
    good, gone = document["slides"]
    assert good["num_tiles"] == document["total"]["tiles"] > 20
    assert "no such file" in gone["error"]
    assert document["price"] == pytest.approx(4 * 0.5 * document["wall_s"] / 3600, rel=0.01)
    assert document["cluster"] == {"cpus": 4, "gpus": 0, "workers": 4}
    assert document["rates"]["segment"] == {"value": 0.25, "source": "default"}
    assert document["rates"]["stored_cell_bytes"]["value"] is None
    lines = shown.splitlines()
    assert lines[0].split()[:2] == ["slide", "tiles"]
    assert lines[1].split()[:2] == ["good", str(good["num_tiles"])]
    assert lines[2].split()[:2] == ["all", str(good["num_tiles"])]
    assert lines[3].startswith("cannot be planned: gone: FileNotFoundError")
    assert any(line.startswith("extract of 2 slides, 1 of which") for line in lines)
    assert any("not calibrated, defaults of this package: open, read, segment" in x for x in lines)
    assert any("on 4 CPUs (4 workers): about" in line and "; price" in line for line in lines)


def test_with_a_head_it_is_predict_with_the_heads_encoder(manifest, tmp_path):
    save_head(str(tmp_path / "head.safetensors"), MilHead(512, 2), INFO)
    head = str(tmp_path / "head.safetensors")
    sizes = {}
    for store in (None, True):
        config = plan_config(
            manifest=str(manifest), head=head, processes=1, store_embeddings=store, gpus=1
        )
        plan = make_plan(config)
        assert plan.job == "predict"
        assert plan.total.gpu_s["embed"] > 0
        assert plan.price is None
        sizes[store] = plan.total.bytes_kept / plan.total.cells
    assert sizes[True] - sizes[None] == pytest.approx(1.9 * 512)
    assert sizes[None] == pytest.approx(160 + 1.9 * 257)
    assert any("embed_gpu" in note for note in plan.notes)
