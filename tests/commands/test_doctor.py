"""`scellst-ray doctor` says everything that is wrong, at once."""

import pytest

from scellst_ray import storage
from scellst_ray.commands.cli import main
from scellst_ray.commands.configs import DoctorConfig
from scellst_ray.commands.doctor import doctor
from scellst_ray.models.mil.head import MilHead, save_head
from scellst_ray.slides.reader import Slide
from tests.support import cellvit_weights

INFO = {
    "genes": ["A", "B"],
    "scaling": {},
    "embedding_dim": 8,
    "encoder_digest": "random:0",
    "training_slides": [],
    "metrics": {},
}


@pytest.fixture
def manifest(synthetic_slide, tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_text(f"slide_id,uri,mpp\ngood,{synthetic_slide.slide},\n")
    return path


@pytest.mark.parametrize("given", ["head", "head/head.safetensors"])
def test_all_well(synthetic_slide, manifest, tmp_path, capsys, given):
    save_head(str(tmp_path / "head" / "head.safetensors"), MilHead(8, 2), INFO)
    config = DoctorConfig(
        manifest=str(manifest),
        out=str(tmp_path / "out"),
        encoder="random:0",
        head=str(tmp_path / given),
        ray=False,
    )
    assert doctor(config) == 0
    shown = capsys.readouterr().out
    assert "bad" not in shown
    assert shown.endswith("all well\n")
    for part in ("scellst-ray 0", "ray 2", "manifest: 1 slides", "encoder: random:0", "2 genes"):
        assert part in shown
    with Slide(synthetic_slide.slide) as slide:
        size = f"{slide.width0} x {slide.height0} px"
    assert f"slide good: {size}, 0.5 um/px" in shown
    assert "ray:" not in shown
    # Nothing of the check is left behind.
    assert storage.list_files(str(tmp_path / "out")) == []


def test_all_problems_at_once(manifest, tmp_path, capsys):
    with manifest.open("a") as file:
        file.write("gone,gone [a].tiff,\nodd,gone.tiff,9\n")
    (tmp_path / "file").write_text("in the way")
    config = DoctorConfig(
        manifest=str(manifest),
        out=str(tmp_path / "file" / "out"),
        encoder=str(tmp_path / "no_weights.pt"),
        head=str(tmp_path / "no_head"),
        ray=False,
    )
    assert doctor(config) == 1
    shown = capsys.readouterr().out
    bad = [line for line in shown.splitlines() if line.startswith("bad")]
    names = [line.removeprefix("bad ").split(":")[0] for line in bad]
    assert names == ["encoder", "head", "output", "slide gone", "slide odd"]
    for line, part in zip(
        bad,
        ("no_weights.pt", "no_head", str(tmp_path / "file"), "gone [a].tiff", "mpp 9 is outside"),
        strict=True,
    ):
        assert part in line
    assert "ok  slide good: " in shown
    assert shown.endswith("5 problem(s)\n")


def test_an_unusable_manifest_is_one_problem(tmp_path, capsys):
    (tmp_path / "m.csv").write_text("slide,uri\na,b\n")
    assert main(["doctor", f"--manifest={tmp_path}/m.csv", "--ray=false"]) == 1
    shown = capsys.readouterr().out
    assert "bad manifest" in shown
    assert "slide_id" in shown
    assert shown.endswith("1 problem(s)\n")


def test_a_segmenter_is_opened(tmp_path, capsys):
    weights = cellvit_weights.write_checkpoint(tmp_path / "cellvit.pth")
    assert doctor(DoctorConfig(segmenter_weights=str(weights), ray=False)) == 0
    shown = capsys.readouterr().out
    assert "segmenter: CellViT-256, Neoplastic, Inflammatory, Connective" in shown
    weights.write_bytes(weights.read_bytes()[:10_000])
    assert doctor(DoctorConfig(segmenter_weights=str(weights), ray=False)) == 1
    assert "cut off" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a\n", "expected lines of `key: value`"),
        ("manifst: m.csv\n", "Did you mean 'manifest'?"),
        ("out: &a [*a]\n", "*a stands for another value"),
        ("manifest: [m.csv]\n", "manifest: expected one value"),
    ],
)
def test_a_jobs_file_that_cannot_be_used(tmp_path, capsys, text, reason):
    (tmp_path / "job.yaml").write_text(text)
    assert main(["doctor", "--ray=false", f"--job={tmp_path}/job.yaml"]) == 1
    shown = capsys.readouterr().err
    assert "job.yaml" in shown
    assert reason in shown
    assert shown.count("\n") == 1


def test_a_jobs_file_names_what_is_checked(manifest, tmp_path, capsys):
    (tmp_path / "job.yaml").write_text(f"manifest: {manifest}\ncrops: 100\nencoder: none\n")
    assert main(["doctor", "--ray=false", f"--job={tmp_path}/job.yaml"]) == 0
    assert "manifest: 1 slides" in capsys.readouterr().out
