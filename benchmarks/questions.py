"""Measure questions to a cohort and its exports, on a run of many slides that is made here.

    python benchmarks/questions.py [--slides 300] [--cells 6586] [--folder FOLDER] [--json FILE]

Each question runs in a process of its own, whose highest memory is measured. `slide by slide` is a
loop of `run.expression(gene, slide)`. Seconds are those of the wall clock.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import shapely

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.export.anndata_file import write_anndata
from scellst_ray.export.genes import genes_uri, write_genes
from scellst_ray.export.geojson import write_geojson
from scellst_ray.report.cohort import outline_of, view_cohort
from scellst_ray.report.genes import choose_shown_genes
from scellst_ray.report.render import INDEX, page_name, render_cohort, render_slide
from scellst_ray.report.slide import Asked, view_slide
from scellst_ray.runs import compaction
from scellst_ray.runs.folder import begin_run
from scellst_ray.runs.known_slides import accept_slides
from scellst_ray.runs.last_layer import write_last_layer
from scellst_ray.runs.reading import Run, open_run
from scellst_ray.runs.thumbnails import Origin, publish_thumbnail
from tests.support.run_folders import Settings

NUM_GENES, HIDDEN = 250, 256
WIDTH0, HEIGHT0, MPP = 20_000, 16_000, 0.5
TYPES = ("Neoplastic", "Inflammatory", "Connective", "Epithelial")


def main() -> None:
    """Make the run, ask all questions, print the figures and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--slides", type=int, default=300)
    parser.add_argument("--cells", type=int, default=6_586)
    parser.add_argument("--folder", type=Path, help="folder of an earlier call, to use its run")
    parser.add_argument("--ask", help="ask one question (for internal use)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.ask:
        figures = QUESTIONS[options.ask](open_run(options.folder / "run"), options.folder)
        status = Path("/proc/self/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        figures["peak_gib"] = int(peak.split()[1]) / 2**20
        print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "run").exists():
            make_run(folder / "run", options.slides, options.cells)
        environment = os.environ | {"SCELLST_RAY_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        found: dict[str, Any] = {"slides": options.slides, "cells": options.slides * options.cells}
        for name in QUESTIONS:
            command = [sys.executable, __file__, "--ask", name, "--folder", str(folder)]
            result = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            found[name] = json.loads(result.stdout.splitlines()[-1])
            print(name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n")


def make_run(folder: Path, num_slides: int, num_cells: int) -> None:
    """Write a run of `predict` whose slides have equal cells; compaction is the product's own."""
    import torch

    from scellst_ray.models.mil.head import MilHead, save_head

    run = begin_run(str(folder), "predict", Settings({"store_embeddings": False}), {})
    torch.manual_seed(0)
    info: dict[str, Any] = {"genes": [f"G{n}" for n in range(NUM_GENES)], "scaling": {}}
    info |= {"embedding_dim": 8, "encoder_digest": "e", "training_slides": [], "metrics": {}}
    save_head(f"{folder}/head.safetensors", MilHead(8, NUM_GENES), info)
    opened = open_run(folder)
    write_last_layer(run.uri, opened.last_layer, run.digest)
    cells = _cells(num_cells)
    slides = [f"S{number:04d}" for number in range(num_slides)]
    accept_slides(run, {s: {"uri": f"/nowhere/{s}.svs", "mpp": None} for s in slides}, {})
    for slide_id in slides:
        table = pa.table({"slide_id": pa.repeat(slide_id, num_cells)} | cells)
        storage.publish_table(run.shard_uri(f"{slide_id}.parquet"), table)
        row = {"slide_id": slide_id, "num_tiles": 1, "num_cells": num_cells, "tile_id": 0}
        row |= {"mpp": MPP, "read_mpp": MPP, "width0": WIDTH0, "height0": HEIGHT0}
        row |= {"shard": f"{slide_id}.parquet", "shard_row": 0}
        receipts = pa.Table.from_pylist([row], schema=schemas.RECEIPTS)
        compaction.finish_slide(run, slide_id, receipts)
        storage.remove_tree(run.shard_uri(f"{slide_id}.parquet"))


def _cells(count: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    xy = (rng.uniform(0, 1, (count, 2)) * (WIDTH0, HEIGHT0)).astype(np.float32)
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ring = 9 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    hidden = np.maximum(rng.normal(0, 1, (count, HIDDEN)), 0).astype(np.float16)
    return {
        "cell_id": np.arange(count),
        "x0": xy[:, 0],
        "y0": xy[:, 1],
        "area_um2": rng.uniform(20, 90, count).astype(np.float32),
        "nucleus_type": rng.choice(TYPES, count).tolist(),
        "type_prob": rng.uniform(0.5, 1, count).astype(np.float32),
        "polygon": shapely.to_wkb(shapely.polygons(np.round(xy[:, None] + ring, 1))).tolist(),
        "seam": np.zeros(count, np.uint8),
        "hidden": pa.FixedSizeListArray.from_arrays(pa.array(hidden.reshape(-1)), HIDDEN),
        "distance": rng.uniform(0.5, 2, count).astype(np.float16),
    }


def slide_by_slide(run: Run, _: Path) -> dict[str, float]:
    """Ask one gene of one slide after another, twice."""
    slides = run.choose()
    return _per_cell(run, lambda gene: [run.expression([gene], slide) for slide in slides])


def lazy(run: Run, _: Path) -> dict[str, float]:
    """Ask the mean of one gene of all slides, then those of two further genes."""
    return _per_cell(run, lambda gene: run.expression([gene]).select(gene).mean().collect())


def sql(run: Run, folder: Path) -> dict[str, float]:
    """Ask DuckDB, by the SQL that FORMAT.md prints: unpack once, then two genes."""
    import re

    import duckdb

    text = (Path(schemas.__file__).parents[1] / "FORMAT.md").read_text()
    _, unpack, ask = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    os.chdir(run.uri)
    with duckdb.connect(folder / "factors.duckdb") as database:
        seconds = {"unpack_us_a_cell": _seconds(lambda: database.execute(unpack))}

        def mean(gene: str) -> None:
            set_gene, select = ask.replace("ERBB2", gene).strip().rstrip(";").split(";", 1)
            database.execute(set_gene)
            database.sql(f"SELECT avg(expression) FROM ({select})").fetchall()

        count = _num_cells(run)
        figures = {name: 1e6 * value / count for name, value in seconds.items()}
        figures |= _per_cell(run, mean)
    (folder / "factors.duckdb").unlink()
    return figures


def genes(run: Run, folder: Path) -> dict[str, float]:
    """Write one gene of all slides, and eight, without Ray."""
    figures = {}
    for number in (1, 8):
        names, out = run.genes[:number], str(folder / f"genes{number}")
        seconds = _seconds(lambda names=names, out=out: _write_genes(run, out, names))  # type: ignore[misc]
        size = sum(Path(genes_uri(out, s)).stat().st_size for s in run.choose())
        figures[f"bytes_a_value_{number}"] = size / _num_cells(run) / number
        figures[f"us_a_cell_{number}"] = 1e6 * seconds / _num_cells(run)
    return figures


def _write_genes(run: Run, out: str, names: list[str]) -> None:
    for slide_id in run.choose():
        write_genes(run, out, slide_id, names)


def export_one_gene(run: Run, folder: Path) -> dict[str, float]:
    """Export one gene of all slides to one .h5ad."""
    return _export(run, folder, run.genes[:1])


def export_all_genes(run: Run, folder: Path) -> dict[str, float]:
    """Export the whole panel of all slides to one .h5ad."""
    return _export(run, folder, None)


def _export(run: Run, folder: Path, names: list[str] | None) -> dict[str, float]:
    out = folder / "cells.h5ad"
    seconds = _seconds(lambda: write_anndata(run, str(out), None, names))
    size = out.stat().st_size / 1e6
    out.unlink()
    return {"seconds": seconds, "mb": size}


def geojson(run: Run, folder: Path) -> dict[str, float]:
    """Export the first slide to GeoJSON with one gene."""
    slide_id, out = run.choose()[0], folder / "slide.geojson.gz"
    seconds = _seconds(lambda: write_geojson(run, str(out), slide_id, run.genes[:1]))
    count = run.records[slide_id]["num_cells"]
    return {"us_a_cell": 1e6 * seconds / count, "bytes_a_cell": out.stat().st_size / count}


def report(run: Run, folder: Path) -> dict[str, float]:
    """Write the pages of all slides in this process, with a thumbnail of each."""
    noise = np.random.default_rng(0).normal(200, 20, (800, 1000, 3))
    image = cv2.GaussianBlur(noise, (0, 0), 2).clip(0, 255).astype(np.uint8)
    for slide_id in run.records:
        origin: Origin = {"slide_id": slide_id, "source": None, "ratio": WIDTH0 / 1000}
        publish_thumbnail(run.folder.thumbnail_uri(slide_id), image, origin)
    started = time.process_time()
    genes, how_chosen = choose_shown_genes(run, None)
    outlines, largest = {}, 0
    for slide_id in run.choose():
        view = view_slide(run, slide_id, Asked(tuple(genes)))
        page = render_slide(view, "run")
        storage.publish_text(str(folder / "report" / page_name(slide_id)), page)
        outlines[slide_id], largest = outline_of(view), max(largest, len(page))
    view_of_all = view_cohort(run, run.choose(), outlines, (genes, how_chosen), None)
    index = render_cohort(view_of_all)
    storage.publish_text(str(folder / "report" / INDEX), index)
    figures = {"cpu_seconds": time.process_time() - started, "largest_slide_mb": largest / 1e6}
    return figures | {"cohort_mb": len(index) / 1e6}


def _per_cell(run: Run, ask: Callable[[str], object]) -> dict[str, float]:
    """Return microseconds a cell of a first, a second and a third gene."""
    names = ("first_gene", "second_gene", "third_gene")
    return {
        f"{name}_us_a_cell": 1e6 * _seconds(lambda gene=gene: ask(gene)) / _num_cells(run)  # type: ignore[misc]
        for name, gene in zip(names, run.genes[:3], strict=True)
    }


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _num_cells(run: Run) -> int:
    return sum(record["num_cells"] for record in run.records.values())


QUESTIONS: dict[str, Callable[[Run, Path], dict[str, float]]] = {
    "slide by slide": slide_by_slide,
    "lazy": lazy,
    "sql": sql,
    "genes": genes,
    "export one gene": export_one_gene,
    "export all genes": export_all_genes,
    "geojson": geojson,
    "report": report,
}


if __name__ == "__main__":
    main()
