"""The commands of the README and of docs/figures.md run, as they stand, on a small cohort."""

import re
import shlex

import pytest

from scellst_ray.commands.cli import main
from scellst_ray.slides.synthetic.slide import SyntheticConfig, make_tissue, write_synthetic_slide
from scellst_ray.slides.synthetic.spots import write_space_ranger
from tests.support.pages import check_page
from tests.support.paths import ROOT

GENES = ["ERBB2", "CD3E", "EPCAM", "VIM", "KRT8", "CD8A"]
LOOSE = "--max-epochs 2 --min-gene-counts 1 --min-spot-counts 1 --no-check-alignment"
# Sizes for a test. Values of flags are added to a command; none of the README's is changed.
SMALL = {
    "plan": "--encoder none",  # the default downloads weights
    "extract": "--core-px 512",
    "pretrain": "--arch resnet18 --batch 32 --epochs 1 --warmup-epochs 0 --projector-dim 32",
    "train": f"--genes ERBB2,CD3E,EPCAM {LOOSE}",
    "predict": "--core-px 512",
    "simulate": "--num-types 2 --cells-per-cluster 40 --num-spots 40 --cells-per-spot 4 "
    "--num-variable 20 --num-markers 3 --embedding-dim 16 --max-epochs 2 --search-epochs 1 "
    "--learning-rates 0.001",
    "crossvalidate": f"--panels variable:3 --bootstraps 5 {LOOSE}",
    "evaluate": "--bootstraps 5",
}
# Weights that are not published with the project: another resolution finds other nuclei, too.
CELLVIT, INSTEAD = (
    "--segmenter cellvit --segmenter-weights CellViT-SAM-H-x40-AMP.pth",
    "--read-mpp 0.7",
)


def commands_in(text):
    """Return the words of the commands of a text."""
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    return [shlex.split(line.partition("#")[0])[1:] for line in lines if line.strip()]


def run_all(text):
    """Run the commands of a text; return the first word of each."""
    names = []
    for words in commands_in(text):
        extra = SMALL.get(words[0], "").split()
        given = [word for word in extra if word not in words]
        assert main([*words, *given]) == 0, words
        names.append(words[0])
    return names


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Return a folder with the manifests and slides that the README names."""
    folder = tmp_path_factory.mktemp("cohort")
    lines = []
    for number, slide_id in enumerate(("P1_A", "P1_B", "P2")):
        config = SyntheticConfig(
            seed=number, width_um=700.0, height_um=600.0, mpp=0.5, num_genes=len(GENES)
        )
        made = write_synthetic_slide(folder / slide_id, config)
        outs = folder / "visium" / slide_id / "outs"
        write_space_ranger(outs, config, make_tissue(config).spots, GENES)
        lines.append(f"{slide_id},{made.slide},,{outs},")
    header = "slide_id,uri,mpp,spots,spot_positions"
    for name, chosen in (("cohort", lines[:2]), ("spots", lines[:2]), ("held_out", lines[2:])):
        (folder / f"{name}.csv").write_text("\n".join([header, *chosen]) + "\n")
    (folder / "markers.csv").write_text("T cells,tumour\nCD3E,ERBB2\n")
    return folder


@pytest.fixture(scope="module")
def commands_of_the_readme(cohort):
    """Run the commands of the section "Use", from doctor to verify; return their names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cohort)
        return run_all(text[text.index("## Use") : text.index("## Weights")])


@pytest.mark.slow
@pytest.mark.ray
def test_the_commands_of_the_readme_run(cohort, commands_of_the_readme, monkeypatch, capsys):
    assert commands_of_the_readme == [
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
    monkeypatch.chdir(cohort)
    assert main(["status", "runs/cohort"]) == 0
    assert "2 slides: 2 done" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("commands_of_the_readme")
def test_the_commands_for_figures_run(cohort, monkeypatch):
    text = (ROOT / "docs/figures.md").read_text(encoding="utf-8")
    assert CELLVIT in text
    monkeypatch.chdir(cohort)
    names = run_all(text.replace(CELLVIT, INSTEAD))
    assert names == [
        *("simulate", "crossvalidate", "predict", "annotate", "evaluate", "report"),
        *("predict", "annotate", "report"),
    ]
    page = check_page((cohort / "figures/slides/P2.html").read_text())
    titles = set(re.findall(r'"(\w[^"]+)"', text.partition("| figure |")[2]))
    pages = " ".join(
        check_page(path.read_text()).text
        for folder in ("figures", "beside")
        for path in (cohort / folder).rglob("*.html")
    )
    # The segmenter of this cohort gives one type, which nothing sets apart.
    expected = titles - {"Differential genes of nucleus types", "Beside ..."}
    assert len(expected) >= 6
    assert [title for title in expected if title not in pages] == []
    assert "Beside held_out" in pages
    assert "100 highest ERBB2" in page.text
    assert (cohort / "simulation").is_dir()
    assert (cohort / "cv").is_dir()
