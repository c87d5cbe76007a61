"""Measure `annotate`: memory and time over a million cells, and types against a known truth.

    python benchmarks/annotation.py memory [--cells 1000000] [--slides 1 152] [--json FILE]
    python benchmarks/annotation.py truth [--folder FOLDER] [--encoder FILE] [--json FILE]

`memory` makes runs of 250 genes with equal slides. Memory is that of all processes together, Ray's
included; shared pages count once.

`truth` makes two synthetic slides with spots to train a head on, and two that it never saw. Types
of cells are scored from predicted expression by the genes that mark each type, and compared with
the true types. Next to it stand labels of a classifier that was taught the true types of the first
two slides on the same embeddings, as CellViT is taught types, and chance. Nuclei are the true ones
(`--segmenter imported`), so that the figures show types alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import shapely
from measuring import peak_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from questions import TYPES

from scellst_ray.commands.annotate import run_annotate
from scellst_ray.commands.configs import AnnotateConfig
from scellst_ray.commands.train import train
from scellst_ray.commands.training_configs import TrainConfig
from scellst_ray.core.logs import log_to_stderr
from scellst_ray.pipelines.extract import extract
from scellst_ray.pipelines.predict import predict
from scellst_ray.pipelines.session import ray_session
from scellst_ray.runs.reading import open_run
from scellst_ray.runs.scores import read_scores_info
from scellst_ray.slides.synthetic.expression import draw_programme
from scellst_ray.slides.synthetic.slide import (
    NUCLEUS_TYPES,
    SyntheticConfig,
    SyntheticPaths,
    write_synthetic_slide,
)
from scellst_ray.stages.config import ExtractConfig, PredictConfig

# Genes of the synthetic cohort: 12 of each role.
NUM_GENES = 84
TAUGHT, UNSEEN = ("taught_a", "taught_b"), ("unseen_a", "unseen_b")


def main() -> None:
    """Measure what the first word names, print the figures and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["memory", "truth"])
    parser.add_argument("--cells", type=int, default=1_000_000, help="memory: cells of each run")
    parser.add_argument("--slides", type=int, nargs="+", default=[1, 152], help="memory: slides")
    parser.add_argument("--folder", type=Path, help="truth: folder to keep slides and runs in")
    parser.add_argument("--encoder", default="random:0:resnet18", help="truth: encoder")
    parser.add_argument("--size-um", type=float, default=1200.0, help="truth: side of a slide")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if options.what == "memory":
            found = [measure_memory(folder, n, options.cells) for n in options.slides]
        else:
            found = [measure_truth(folder, options.encoder, options.size_um)]
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def measure_memory(folder: Path, num_slides: int, num_cells: int) -> dict[str, Any]:
    """Return seconds and highest memory of `annotate`, Ray's processes included."""
    uri = folder / f"run{num_slides}"
    if not uri.exists():
        # In a process of its own, whose memory does not count.
        words = f"from questions import *; make_run(Path({str(uri)!r}), {num_slides}, "
        command = [sys.executable, "-c", f"{words}{num_cells // num_slides})"]
        subprocess.run(command, check=True, cwd=Path(__file__).parent)
    markers = folder / "markers.json"
    sets = {name: [f"G{10 * n + i}" for i in range(10)] for n, name in enumerate(TYPES)}
    markers.write_text(json.dumps(sets))
    started = time.monotonic()
    with peak_memory([]) as peak:
        run_annotate(AnnotateConfig(run=str(uri), markers=str(markers)))
    count = sum(record["num_cells"] for record in open_run(uri).records.values())
    found = {
        "slides": num_slides,
        "cells": count,
        "seconds": round(time.monotonic() - started, 1),
        "peak_gib": round(peak() / 2**30, 2),
    }
    print(found, flush=True)
    return found


def measure_truth(folder: Path, encoder: str, size_um: float) -> dict[str, Any]:
    """Return balanced accuracies of types on the unseen slides."""
    log_to_stderr(20)
    paths = {
        name: write_synthetic_slide(
            folder / name,
            SyntheticConfig(seed=seed, width_um=size_um, height_um=size_um, num_genes=NUM_GENES),
        )
        for seed, name in enumerate((*TAUGHT, *UNSEEN))
    }
    taught, unseen = (write_manifest(folder, names, paths) for names in (TAUGHT, UNSEEN))
    genes, roles = (draw_programme(NUM_GENES, 0).gene_names, draw_programme(NUM_GENES, 0).roles)
    sets = {
        t: [g for g, role in zip(genes, roles, strict=True) if role == t] for t in NUCLEUS_TYPES
    }
    (folder / "markers.json").write_text(json.dumps(sets))
    with ray_session():
        cells = ExtractConfig(
            manifest=taught, out=str(folder / "cells"), encoder=encoder, segmenter="imported"
        )
        extract(cells, lambda _: None)
        head = str(folder / "head")
        if not Path(head).exists():
            spots = TrainConfig(
                manifest=taught,
                cells=cells.out,
                out=head,
                genes=",".join(genes),
                min_gene_counts=1,
                min_spot_share=0.0,
                min_spot_counts=1,
            )
            train(spots, print)
        predicted = PredictConfig(
            manifest=unseen,
            out=str(folder / "run"),
            head=head,
            encoder=encoder,
            segmenter="imported",
            store_embeddings=True,
        )
        predict(predicted, lambda _: None)
        run_annotate(AnnotateConfig(run=predicted.out, markers=str(folder / "markers.json")))
    run = open_run(predicted.out)
    info = read_scores_info(run.uri)
    assert info is not None
    agreement = info["agreement"]
    found = {
        "encoder": encoder,
        "cells": agreement["num_cells"],
        "chance": agreement["chance"],
        "scores": round(agreement["balanced_accuracy"], 3),
        "recall": {name: round(value, 3) for name, value in agreement["recall"].items()},
        "taught_labels": round(taught_labels(cells.out, run.uri), 3),
    }
    print(json.dumps(found), flush=True)
    return found


def write_manifest(folder: Path, names: tuple[str, ...], paths: dict[str, SyntheticPaths]) -> str:
    """Write a manifest of slides with their spots and the outlines of their true nuclei."""
    rows = []
    for name in names:
        truth = pl.read_parquet(paths[name].truth)
        outlines = shapely.from_wkb(truth["polygon"].to_list())
        features = [
            {
                "type": "Feature",
                "geometry": json.loads(shapely.to_geojson(outline)),
                "properties": {"objectType": "detection", "classification": {"name": kind}},
            }
            for outline, kind in zip(outlines, truth["nucleus_type"], strict=True)
        ]
        file = folder / f"{name}.geojson"
        file.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        row = {"slide_id": name, "uri": str(paths[name].slide.absolute())}
        rows.append(row | {"spots": str(paths[name].space_ranger), "segmentation": str(file)})
    manifest = folder / f"{names[0]}.csv"
    pl.DataFrame(rows).write_csv(manifest)
    return str(manifest)


def taught_labels(cells: str, predicted: str) -> float:
    """Return the balanced accuracy of a classifier that was taught the types of other slides."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = []
    for uri in (cells, predicted):
        run = open_run(uri)
        x = np.concatenate([run.embeddings(s) for s in run.choose()]).astype(np.float32)
        data.append((x, run.cells_frame(None, ["nucleus_type"])["nucleus_type"].to_numpy()))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    model.fit(*data[0])
    return float(balanced_accuracy_score(data[1][1], model.predict(data[1][0])))


if __name__ == "__main__":
    main()
