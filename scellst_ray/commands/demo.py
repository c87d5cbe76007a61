"""`scellst-ray demo`: all steps on two synthetic slides, compared with the truth."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from scellst_ray import storage
from scellst_ray.commands.annotate import run_annotate
from scellst_ray.commands.configs import AnnotateConfig, DemoConfig, ReportConfig
from scellst_ray.commands.pretrain import ENCODER_FILE, pretrain_encoder
from scellst_ray.commands.progress import shown_progress
from scellst_ray.commands.report import run_report
from scellst_ray.commands.reports import framed_table
from scellst_ray.commands.train import train
from scellst_ray.commands.training_configs import PretrainConfig, TrainConfig
from scellst_ray.evaluation.expression.metrics import pearson_by_column
from scellst_ray.evaluation.maps import gene_map
from scellst_ray.evaluation.synthetic_truth import (
    Matching,
    balanced_accuracy,
    cell_correlation,
    match_nuclei,
)
from scellst_ray.models.mil.stored_head import HEAD_FILE
from scellst_ray.pipelines.extract import extract
from scellst_ray.pipelines.predict import predict
from scellst_ray.pipelines.session import ray_session
from scellst_ray.runs.reading import Run, open_run
from scellst_ray.runs.scores import read_scores, score_types
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.synthetic.expression import draw_programme
from scellst_ray.slides.synthetic.slide import (
    NUCLEUS_TYPES,
    SyntheticConfig,
    SyntheticPaths,
    write_synthetic_slide,
)
from scellst_ray.spots.links import link_cells
from scellst_ray.spots.panel import log_normalise
from scellst_ray.spots.space_ranger import read_space_ranger
from scellst_ray.stages.config import ExtractConfig, PredictConfig

BATCH = 64


TRAINED, UNSEEN = "slide_a", "slide_b"


def demo(config: DemoConfig) -> int:
    """Run the demo, print its scores, write `report.json`; return 0."""
    console, started = Console(), time.monotonic()
    out = Path(config.out)
    console.rule("1. two synthetic slides")
    paths = {
        name: write_synthetic_slide(
            out / name,
            SyntheticConfig(
                seed=config.seed + i, width_um=config.size_um, height_um=config.size_um
            ),
        )
        for i, name in enumerate((TRAINED, UNSEEN))
    }
    for name, files in paths.items():
        row = {"slide_id": name, "uri": str(files.slide.absolute()), "mpp": None}
        row["spots"] = str(files.space_ranger and files.space_ranger.absolute())
        pl.DataFrame([row]).write_csv(out / f"{name}.csv")
    with ray_session(dashboard=True):
        encoder = _pretrain_encoder(out, config.crops, console)
        console.rule(f"4. extract {TRAINED}: nuclei and their embeddings")
        cells = ExtractConfig(
            manifest=str(out / f"{TRAINED}.csv"), out=str(out / "extract"), encoder=encoder
        )
        with shown_progress() as report:
            extract(cells, report)
        console.rule(f"5. train on its spots ({TRAINED})")
        head = out / "head"
        if not (head / HEAD_FILE).exists():
            train(
                TrainConfig(
                    manifest=cells.manifest,
                    cells=cells.out,
                    out=str(head),
                    genes="variable:24",
                    # A small slide has few counts of each gene.
                    min_gene_counts=1,
                    min_spot_share=0.0,
                    min_spot_counts=1,
                ),
                lambda text: console.print(text, highlight=False),
            )
        console.rule(f"6. predict {UNSEEN}, whose spots the head never saw")
        expression = PredictConfig(
            manifest=str(out / f"{UNSEEN}.csv"), out=str(out / "predict"), head=str(head)
        )
        with shown_progress() as report:
            predict(expression, report)
    scores = _score(expression.out, paths[UNSEEN], out, console)
    console.rule("9. a report: pages to look at")
    run_report(
        ReportConfig(run=expression.out, out=str(out / "report"), manifest=expression.manifest)
    )
    scores["seconds"] = round(time.monotonic() - started, 1)
    storage.publish_json(str(out / "report.json"), scores)
    _show(console, scores, out)
    return 0


def _pretrain_encoder(out: Path, num_crops: int, console: Console) -> str:
    """Pretrain an encoder on crops of both slides for 2 epochs; return its file."""
    console.rule("2. crops of cells of both slides")
    both = pl.concat([pl.read_csv(out / f"{name}.csv") for name in (TRAINED, UNSEEN)])
    both.write_csv(out / "both.csv")
    crops = ExtractConfig(
        manifest=str(out / "both.csv"), out=str(out / "crops"), encoder="none", crops=num_crops
    )
    with shown_progress() as report:
        extract(crops, report)
    console.rule("3. pretrain an encoder on them, briefly (real cohorts take hours)")
    config = PretrainConfig(
        crops=[crops.out],
        out=str(out / "encoder"),
        arch="resnet18",
        batch=BATCH,
        epochs=2,
        warmup_epochs=1,
        optimiser="adamw",
        base_lr=4e-3,
        weight_decay=0.05,
        temperature=0.2,
        projector_dim=512,
        flips=True,
        cpus_per_worker=1,
    )
    pretrain_encoder(config, partial(console.print, highlight=False))
    return str(out / "encoder" / ENCODER_FILE)


def _score(predicted: str, paths: SyntheticPaths, out: Path, console: Console) -> dict[str, Any]:
    """Score cells for types, and compare all with the truth; return what `compare` returns."""
    console.rule("7. cell types from predicted genes")
    markers = _write_markers(out, open_run(predicted).genes)
    run_annotate(AnnotateConfig(run=predicted, markers=markers))
    console.rule("8. against the truth")
    return compare(open_run(predicted), paths, out / "genes.png")


def _write_markers(out: Path, panel: list[str]) -> str:
    """Write the genes of the panel that mark each type of nucleus; return the file."""
    programme = draw_programme(SyntheticConfig.num_genes, SyntheticConfig.programme_seed)
    roles = dict(zip(programme.gene_names, programme.roles, strict=True))
    sets = {name: [gene for gene in panel if roles[gene] == name] for name in NUCLEUS_TYPES}
    file = str(out / "markers.json")
    storage.publish_json(file, {name: genes for name, genes in sets.items() if genes})
    return file


def compare(run: Run, paths: SyntheticPaths, picture: Path) -> dict[str, Any]:
    """Compare a prediction with the truth of its synthetic slide, and draw a gene map.

    Returns:
        Precision and recall of nuclei; mean Pearson r over genes for cells (and with the truth
        shuffled over cells) and for spots; balanced accuracy of types, and of chance.
    """
    genes = run.genes
    cells = run.cells(UNSEEN)
    predicted_NG = run.expression_numpy(genes, UNSEEN)
    truth = pq.read_table(paths.truth)
    expected = pq.read_table(paths.truth_expression)
    expected_NG = np.column_stack([expected[gene].to_numpy() for gene in expected.column_names[1:]])
    names = expected.column_names[1:]
    matching = match_nuclei(cells["polygon"].to_pylist(), truth["polygon"].to_pylist())
    columns = [names.index(gene) for gene in genes]
    # As with spots, rates are normalised over all genes before the panel is selected.
    pairs = predicted_NG[matching.found], expected_NG[matching.true]
    by_gene = cell_correlation(*pairs, columns)
    shuffled = cell_correlation(*pairs, columns, seed=0)
    with Slide(paths.slide) as slide:
        image, _ = slide.overview(4.0)
        size0, mpp = (slide.width0, slide.height0), slide.mpp
    xy0 = np.column_stack([cells["x0"].to_numpy(), cells["y0"].to_numpy()])
    assert paths.space_ranger is not None
    spots = read_space_ranger(str(paths.space_ranger), mpp)
    links = link_cells(xy0, spots)
    filled = np.flatnonzero(links.num_cells)
    bags = links.select(filled)
    sums_SG = np.add.reduceat(predicted_NG[bags.cell_index], bags.offsets[:-1], axis=0)
    measured_SG = log_normalise(spots.counts)[filled][:, [spots.genes.index(g) for g in genes]]
    by_spot = pearson_by_column(sums_SG / bags.num_cells[:, None], measured_SG)
    clearest = int(np.nanargmax(by_gene))
    true_xy0 = np.column_stack([truth["x0"].to_numpy(), truth["y0"].to_numpy()])
    true_values = log_normalise(expected_NG)[:, columns[clearest]]
    panels = [
        (
            f"{genes[clearest]} predicted, r = {by_gene[clearest]:.2f}",
            xy0,
            predicted_NG[:, clearest],
        ),
        (f"{genes[clearest]} true", true_xy0, true_values),
    ]
    gene_map(picture, panels, size0, mpp, image)
    types = _compare_types(run, matching, truth)
    return _report(matching, genes, by_gene, shuffled, by_spot) | types


def _compare_types(run: Run, matching: Matching, truth: pa.Table) -> dict[str, float]:
    """Return the balanced accuracy of the best types of matched nuclei, and that of chance."""
    best = read_scores(run, UNSEEN, ["best_type"])
    assert best is not None
    found = best["best_type"].take(pa.array(matching.found)).to_pylist()
    true = truth["nucleus_type"].take(pa.array(matching.true)).to_pylist()
    return {
        "type_balanced_accuracy": balanced_accuracy(found, true),
        "type_chance": 1 / len(score_types(run)),
    }


def _report(
    matching: Matching,
    genes: list[str],
    by_gene: np.ndarray,
    shuffled: np.ndarray,
    by_spot: np.ndarray,
) -> dict[str, Any]:
    return {
        "num_true_nuclei": matching.num_true,
        "num_found_nuclei": matching.num_found,
        "precision": matching.precision,
        "recall": matching.recall,
        "cell_pearson": float(np.nanmean(by_gene)),
        "cell_pearson_shuffled": float(np.nanmean(shuffled)),
        "spot_pearson": float(np.nanmean(by_spot)),
        "cell_pearson_by_gene": {g: float(r) for g, r in zip(genes, by_gene, strict=True)},
    }


def _show(console: Console, scores: dict[str, Any], out: Path) -> None:
    rows = [
        ("nuclei found / true", f"{scores['num_found_nuclei']} / {scores['num_true_nuclei']}"),
        ("precision, recall", f"{scores['precision']:.3f}, {scores['recall']:.3f}"),
        ("cell-level Pearson r, mean over genes", f"{scores['cell_pearson']:.3f}"),
        ("the same, truth shuffled over cells", f"{scores['cell_pearson_shuffled']:.3f}"),
        ("spot-level Pearson r, mean over genes", f"{scores['spot_pearson']:.3f}"),
        (
            "types of cells by markers, balanced accuracy (chance)",
            f"{scores['type_balanced_accuracy']:.3f} ({scores['type_chance']:.3f})",
        ),
        ("seconds", f"{scores['seconds']}"),
    ]
    title = f"{UNSEEN}: prediction against the truth"
    console.print(framed_table(("measure", "value"), rows, title))
    for name in (
        "report/index.html",
        "genes.png",
        "report.json",
        "encoder",
        "extract/cells",
        "head",
        "predict/expression",
    ):
        console.print(f"  {out / name}", highlight=False)
    folder = json.dumps(str(out / "predict"))
    command = f"import scellst_ray; print(scellst_ray.open_run({folder}).slides)"
    console.print(f"  python -c '{command}'", highlight=False, soft_wrap=True)
