"""The README's chain of commands runs end to end, as it stands, on a small cohort of its names."""

import re
import shlex

import pytest

from scellst_ray.commands.cli import main
from scellst_ray.slides.synthetic.slide import SyntheticConfig, make_tissue, write_synthetic_slide
from scellst_ray.slides.synthetic.spots import write_space_ranger
from tests.support.paths import ROOT

GENES = ["ERBB2", "CD3E", "EPCAM", "VIM", "KRT8", "CD8A"]
# Sizes for a test. Values of flags are added to a command; none of the README's is changed.
SMALL = {
    "plan": "--encoder none",  # the default downloads weights
    "extract": "--core-px 512",
    "pretrain": "--arch resnet18 --batch 32 --epochs 1 --warmup-epochs 0 --projector-dim 32",
    "train": "--genes ERBB2,CD3E,EPCAM --max-epochs 2 --min-gene-counts 1 --min-spot-counts 1 "
    "--no-check-alignment",
    "predict": "--core-px 512",
}


def commands():
    """Return the words of the commands of the section "Use", from doctor to gc."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    use = text[text.index("## Use") : text.index("## Weights")]
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", use, re.DOTALL)).splitlines()
    return [shlex.split(line.partition("#")[0])[1:] for line in lines if line.strip()]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Return a folder with the manifests and slides that the README names."""
    folder = tmp_path_factory.mktemp("cohort")
    lines = []
    for number, slide_id in enumerate(("P1_A", "P1_B")):
        config = SyntheticConfig(
            seed=number, width_um=700.0, height_um=600.0, mpp=0.5, num_genes=len(GENES)
        )
        made = write_synthetic_slide(folder / slide_id, config)
        outs = folder / "visium" / slide_id / "outs"
        write_space_ranger(outs, config, make_tissue(config).spots, GENES)
        lines.append(f"{slide_id},{made.slide},,{outs},")
    header = "slide_id,uri,mpp,spots,spot_positions"
    for name in ("cohort.csv", "spots.csv"):
        (folder / name).write_text("\n".join([header, *lines]) + "\n")
    (folder / "markers.csv").write_text("T cells,tumour\nCD3E,ERBB2\n")
    return folder


@pytest.mark.slow
@pytest.mark.ray
def test_the_commands_of_the_readme_run(cohort, monkeypatch, capsys):
    monkeypatch.chdir(cohort)
    names = []
    for words in commands():
        extra = SMALL.get(words[0], "").split()
        given = [word for word in extra if word not in words]
        assert main([*words, *given]) == 0, (words, capsys.readouterr())
        names.append(words[0])
    assert names == [
        *("doctor", "plan", "extract", "pretrain", "extract", "train", "predict", "export"),
        *("genes", "pseudobulk", "annotate", "report", "export", "export", "status", "retry", "gc"),
        "verify",
    ]
    for name in (
        "cohort.h5ad",
        "genes/P1_A.parquet",
        "slides.h5ad",
        "runs/cohort/scores/P1_A.parquet",
        "report/index.html",
        "P1_A.geojson.gz",
        "P1_A.sdata.zarr",
    ):
        assert (cohort / name).exists()
    assert "2 slides: 2 done" in capsys.readouterr().out
