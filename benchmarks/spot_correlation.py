"""Predicted against measured expression on held-out spots, beside a colour-only model.

    python benchmarks/spot_correlation.py --run runs/pred --manifest held_out.csv \
        --train-manifest train.csv --slides C4 [--json results/spot_correlation.json]

The run holds `predict` results of the held-out slides; both manifests name their spots. The named
peer sees no cell: ridge regression on 18 colour statistics of each spot's disc (mean, deviation and
four quantiles of red, green and blue), trained on the same training slides and scaled targets. A
model that does not beat it has learnt little more than stain and density; hence also the
correlation with the log of a spot's total counts partialled out.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

import scellst_ray
from scellst_ray.analysis.metrics import partial_pearson_by_column, pearson_by_column
from scellst_ray.cohort import SlideRow, read_manifest
from scellst_ray.geometry import Box
from scellst_ray.node_cache import hold
from scellst_ray.slides.reader import Slide
from scellst_ray.spots.links import link_cells
from scellst_ray.spots.panel import panel_targets, robust_scale
from scellst_ray.spots.read import read_spots
from scellst_ray.spots.table import Spots


def main() -> None:
    """Print the comparison for each held-out slide and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", required=True)
    parser.add_argument("--manifest", required=True)
    parser.add_argument("--train-manifest", required=True)
    parser.add_argument("--slides", nargs="+", required=True)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/spots.json"))
    options = parser.parse_args()
    run = scellst_ray.open_run(options.run)
    trained = [row for row in read_manifest(options.train_manifest) if row.columns.get("spots")]
    held_out = {row.slide_id: row for row in read_manifest(options.manifest)}
    ridge, scaler = colour_model(trained, run.genes)
    results = {}
    for slide_id in options.slides:
        results[slide_id] = compare(run, held_out[slide_id], ridge, scaler)
        print(slide_id, json.dumps(results[slide_id], indent=2))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2) + "\n")


def compare(
    run: scellst_ray.Run, row: SlideRow, ridge: RidgeCV, scaler: StandardScaler
) -> dict[str, Any]:
    """Compare both models with the spots of one held-out slide that hold cells."""
    spots, kept, measured_KP, colours_KF = supervision(row, run.genes)
    cells = run.cells(row.slide_id, ["x0", "y0"])
    xy0 = np.column_stack([cells["x0"].to_numpy(), cells["y0"].to_numpy()])
    links = link_cells(xy0, spots).select(kept)
    filled = np.flatnonzero(links.num_cells)
    links = links.select(filled)
    predicted_NP = run.expression_numpy(run.genes, row.slide_id)
    sums = np.add.reduceat(predicted_NP[links.cell_index], links.offsets[:-1], axis=0)
    ours_KP = sums / links.num_cells[:, None]
    colour_KP = ridge.predict(scaler.transform(colours_KF[filled]))
    totals = np.log1p(np.asarray(spots.counts.sum(axis=1)).ravel()[kept][filled])
    truth_KP = measured_KP[filled]
    shuffled = np.random.default_rng(0).permutation(len(truth_KP))
    return {
        "num_spots": len(filled),
        "num_genes": len(run.genes),
        "cells": len(xy0),
        "cells_per_spot": float(links.num_cells.mean()),
        "ours": correlations(ours_KP, truth_KP, totals),
        "colour_ridge": correlations(colour_KP, truth_KP, totals),
        "ours_shuffled_spots": correlations(ours_KP[shuffled], truth_KP, totals),
    }


def correlations(
    predicted: NDArray[np.floating], truth: NDArray[np.floating], totals: NDArray[np.floating]
) -> dict[str, float]:
    """Return the mean over genes of Pearson's r, and with log total counts partialled out."""
    plain = pearson_by_column(predicted, truth)
    partial = partial_pearson_by_column(predicted, truth, totals)
    return {
        "pearson": round(float(np.nanmean(plain)), 4),
        "pearson_given_total_counts": round(float(np.nanmean(partial)), 4),
        "share_of_genes_above_0": round(float(np.nanmean(plain > 0)), 3),
    }


def colour_model(rows: Sequence[SlideRow], genes: list[str]) -> tuple[RidgeCV, StandardScaler]:
    """Fit the colour-only peer on the training slides."""
    parts = [supervision(row, genes) for row in rows]
    colours = np.concatenate([part[3] for part in parts])
    targets = np.concatenate([robust_scale(part[2])[0] for part in parts])
    scaler = StandardScaler().fit(colours)
    ridge = RidgeCV(alphas=np.logspace(-1, 5, 13)).fit(scaler.transform(colours), targets)
    return ridge, scaler


def supervision(
    row: SlideRow, genes: list[str]
) -> tuple[Spots, NDArray[np.int64], NDArray[np.float32], NDArray[np.float64]]:
    """Return a slide's spots, which of them pass, their expression and their colours."""
    with hold(row.uri) as held, Slide(held.path, held.name, row.mpp) as slide:
        spots = read_spots({**row.columns, "slide_id": row.slide_id}, slide.mpp)
        kept, values = panel_targets(spots, genes, row.slide_id)
        colours = np.stack([disc_colours(slide, xy0, spots.radius0) for xy0 in spots.xy0[kept]])
    return spots, kept, values, colours


def disc_colours(slide: Slide, xy0: NDArray[np.float64], radius0: float) -> NDArray[np.float64]:
    """Return mean, deviation and the 10, 25, 75 and 90 % quantiles of each colour in a disc."""
    side = round(2 * radius0)
    box = Box(round(xy0[0] - radius0), round(xy0[1] - radius0), side, side)
    image, frame = slide.read(box, max(1.0, slide.mpp))
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    centres = frame.to_level0(np.column_stack([x.ravel(), y.ravel()]))
    inside = ((centres - xy0) ** 2).sum(axis=1) <= radius0**2
    pixels = image.reshape(-1, 3)[inside].astype(np.float64)
    quantiles = np.percentile(pixels, (10, 25, 75, 90), axis=0)
    return np.concatenate([pixels.mean(axis=0), pixels.std(axis=0), quantiles.ravel()])


if __name__ == "__main__":
    main()
