"""`scellst-ray evaluate expression`: predicted expression against measured spots and cells.

This module reads the files and brings predictions and measurements to the same units. scores.py
computes the scores; commands/evaluate_expression.py prints and writes them.

Shape letters: S spots, N cells, G genes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scellst_ray.core.resolution import CONFIRMED
from scellst_ray.evaluation.expression.colour_baseline import (
    ColourRidge,
    colours_around,
    fit_colour_ridge,
    slide_colours,
    slide_mpp,
)
from scellst_ray.evaluation.expression.config import EvaluateExpressionConfig
from scellst_ray.evaluation.expression.measured_cells import cell_truth, pair_cells
from scellst_ray.evaluation.expression.scores import (
    OURS,
    Bootstrap,
    ModelScores,
    Truth,
    measured_columns,
    score_models,
)
from scellst_ray.runs.reading import Run, open_run
from scellst_ray.runs.records import known_mpp
from scellst_ray.slides.manifest import SlideRow, read_manifest
from scellst_ray.spots.links import Links, link_cells
from scellst_ray.spots.panel import CountFilter, make_targets
from scellst_ray.spots.read import read_spots
from scellst_ray.spots.xenium import read_xenium

MEAN, COLOUR = "mean", "colour_ridge"


@dataclass(frozen=True)
class Comparison:
    """Scores of one slide at one level.

    Attributes:
        level: "spots" or "cells".
        genes: Genes that were compared.
        about: Numbers for the reader: rows, genes left out, ...
        scores: Scores by model.
    """

    level: str
    genes: list[str]
    about: dict[str, Any]
    scores: dict[str, ModelScores]


@dataclass(frozen=True)
class Units:
    """Conversion of a head's predictions to scaled log-normalised expression.

    Attributes:
        scale_G: Mean over training slides of the divisors that scaled log-normalised expression.
        per_rate: Counts per 10,000 that correspond to one count at size factor 1. None if the head
            was trained on expression.
        limits: Filters of genes and spots in training.
    """

    scale_G: NDArray[np.float64]
    per_rate: float | None
    limits: CountFilter

    def predicted(
        self, values_SG: NDArray[np.floating], columns: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return predictions of the genes at `columns` of the panel in scaled units."""
        if self.per_rate is None:
            return values_SG.astype(np.float64)
        return np.asarray(np.log1p(values_SG * self.per_rate) / self.scale_G[columns])


@dataclass
class Baselines:
    """Baselines, which predict expression without seeing cells.

    Attributes:
        mean_G: Mean scaled expression of the training spots.
        ridge: Colour baseline fitted on the training spots; None if not asked for.
        radius_um: Radius of the spots' discs. A disc of this radius around a cell gives its
            colours.
    """

    mean_G: NDArray[np.float64]
    ridge: ColourRidge | None = None
    radius_um: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """Comparisons by slide, at one level or both, and notes for the reader."""

    slides: dict[str, list[Comparison]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def evaluate_expression(config: EvaluateExpressionConfig) -> Evaluation:
    """Score the predictions of a run.

    Raises:
        ValueError: files cannot be read or compared; the message names them.
        FileNotFoundError: a file or run does not exist.
    """
    run = open_run(config.run)
    rows = _rows(config)
    info = run.last_layer.info
    training_rows = _training_rows(config, info)
    notes = []
    seen_slides = sorted(set(rows) & set(info["training_slides"]))
    if seen_slides:
        notes.append(
            f"the head was trained on {', '.join(seen_slides)}: these scores do not hold for "
            "unseen slides"
        )
    units, baselines = _learn(run, training_rows, colour=config.colour)
    evaluation = Evaluation(notes=notes)
    for slide_id, row in rows.items():
        evaluation.slides[slide_id] = []
        if row.columns.get("spots"):
            comparison = compare_spots(run, row, units, baselines, config.bootstrap())
            evaluation.slides[slide_id].append(comparison)
        if row.columns.get("xenium"):
            comparison = compare_cells(run, row, units, baselines, config)
            evaluation.slides[slide_id].append(comparison)
    return evaluation


def _spots_row(row: SlideRow) -> dict[str, Any]:
    """Return a row of the manifest as the spot readers take it."""
    return {**row.columns, "slide_id": row.slide_id, CONFIRMED: row.mpp_confirmed}


def compare_spots(
    run: Run, row: SlideRow, units: Units, baselines: Baselines, bootstrap: Bootstrap
) -> Comparison:
    """Compare predictions with the spots of one slide that pass the filters and have cells."""
    slide_id = row.slide_id
    spots = read_spots(_spots_row(row), _mpp(run, slide_id))
    columns = measured_columns(run.genes, spots.genes, f"slide {slide_id}: spots")
    genes = [run.genes[column] for column in columns]
    targets = make_targets(spots, genes, f"slide {slide_id}", units.limits)
    cells = run.cells(slide_id, ["cell_id", "x0", "y0"])
    xy0 = np.column_stack([cells["x0"].to_numpy(), cells["y0"].to_numpy()])
    links = link_cells(xy0, spots).select(targets.kept)
    filled = np.flatnonzero(links.num_cells)
    if not len(filled):
        message = (
            f"slide {slide_id}: none of its {len(targets.kept)} spots that pass the filters has a "
            "cell. Check the mpp and the spot positions."
        )
        raise ValueError(message)
    kept, links = targets.kept[filled], links.select(filled)
    rates_SG = spot_means(run, slide_id, genes, cells["cell_id"].to_numpy(), links)
    scaled = targets.values_KP[filled] / units.scale_G[columns]
    depth_S = np.log1p(np.asarray(spots.counts[kept].sum(axis=1)).ravel())
    models = {
        OURS: units.predicted(rates_SG, columns),
        MEAN: np.tile(baselines.mean_G[columns], (len(kept), 1)),
    }
    if baselines.ridge is not None:
        colours_SC = slide_colours(row, spots.select(kept), _source(run, slide_id))
        models[COLOUR] = baselines.ridge.predict(colours_SC)[:, columns]
    about = {
        "spots": len(kept),
        "spots_without_cells": len(targets.kept) - len(kept),
        "cells": len(xy0),
        "cells_per_spot": round(float(links.num_cells.mean()), 2),
        "genes_not_measured": len(run.genes) - len(genes),
    }
    scores = score_models(models, Truth(scaled, depth_S, genes), bootstrap)
    return Comparison("spots", genes, about, scores)


def _source(run: Run, slide_id: str) -> str | None:
    """Return what the run read a slide from; None if its record does not say."""
    return run.records[slide_id].get("source")


def spot_means(
    run: Run, slide_id: str, genes: list[str], cell_ids: NDArray[np.int64], links: Links
) -> NDArray[np.float64]:
    """Return the mean prediction over each spot's cells [S, G]; every spot must have a cell."""
    index, place = np.unique(links.cell_index, return_inverse=True)
    values_NG = run.expression_numpy(genes, slide_id, cell_ids[index])
    sums = np.add.reduceat(values_NG[place].astype(np.float64), links.offsets[:-1], axis=0)
    return np.asarray(sums / links.num_cells[:, None])


def compare_cells(
    run: Run, row: SlideRow, units: Units, baselines: Baselines, config: EvaluateExpressionConfig
) -> Comparison:
    """Compare predictions with the single cells measured on one slide."""
    slide_id, mpp = row.slide_id, _mpp(run, row.slide_id)
    alignment = row.columns.get("xenium_alignment") or None
    outs = str(row.columns["xenium"])
    measured = read_xenium(outs, None if alignment else mpp, alignment)
    cells = run.cells(slide_id, ["cell_id", "x0", "y0"])
    xy0 = np.column_stack([cells["x0"].to_numpy(), cells["y0"].to_numpy()]).astype(np.float64)
    pairs = pair_cells(xy0, measured.xy0, config.radius_um / mpp)
    truth, kept = cell_truth(measured, pairs.measured, run.genes)
    columns = measured_columns(run.genes, truth.genes, f"slide {slide_id}: xenium")
    paired = pairs.found[kept]
    ids = cells["cell_id"].to_numpy()[paired]
    values_NG = run.expression_numpy(truth.genes, slide_id, ids)
    models = {
        OURS: units.predicted(values_NG, columns),
        MEAN: np.tile(baselines.mean_G[columns], (len(ids), 1)),
    }
    if baselines.ridge is not None:
        radius0 = baselines.radius_um / mpp
        colours_NC = colours_around(row, xy0[paired], radius0, _source(run, slide_id))
        models[COLOUR] = baselines.ridge.predict(colours_NC)[:, columns]
    scaled = Truth(truth.values_SG / units.scale_G[columns], truth.log_depth_S, truth.genes)
    about = {
        "cells": len(xy0),
        "cells_measured": len(measured),
        "pairs": len(ids),
        "median_distance_um": round(float(np.median(pairs.distance0[kept]) * mpp), 2),
        "genes_not_measured": len(run.genes) - len(truth.genes),
    }
    return Comparison("cells", truth.genes, about, score_models(models, scaled, config.bootstrap()))


def _rows(config: EvaluateExpressionConfig) -> dict[str, SlideRow]:
    """Return the slides to evaluate, by slide_id.

    Raises:
        ValueError: a slide has neither spots nor xenium, or no slide has.
    """
    rows = {row.slide_id: row for row in read_manifest(config.manifest)}
    truths = {s for s, r in rows.items() if r.columns.get("spots") or r.columns.get("xenium")}
    chosen = [s for s in rows if s in truths] if config.slides is None else config.slides
    missing_slides = [slide_id for slide_id in chosen if slide_id not in truths]
    if missing_slides or not chosen:
        what = f"slides {missing_slides}" if missing_slides else "any slide"
        message = f"{config.manifest}: no spots and no xenium for {what}; add the column and a path"
        raise ValueError(message)
    return {slide_id: rows[slide_id] for slide_id in chosen}


def _training_rows(config: EvaluateExpressionConfig, info: Mapping[str, Any]) -> list[SlideRow]:
    """Return the training slides of the head, from the training manifest.

    Raises:
        ValueError: the manifest lacks a training slide or its spots.
    """
    rows = {row.slide_id: row for row in read_manifest(config.train_manifest)}
    training_slides = list(info["training_slides"])
    missing_slides = [
        slide_id
        for slide_id in training_slides
        if slide_id not in rows or not rows[slide_id].columns.get("spots")
    ]
    if missing_slides:
        message = (
            f"{config.train_manifest}: no spots for {', '.join(missing_slides)}, which the head "
            "was trained on; give the manifest it was trained with"
        )
        raise ValueError(message)
    return [rows[slide_id] for slide_id in training_slides]


def _learn(run: Run, rows: list[SlideRow], *, colour: bool) -> tuple[Units, Baselines]:
    """Read the training slides once; return the units of the head and the fitted baselines."""
    info = run.last_layer.info
    filters = info.get("supervision", {}).get("filters")
    limits = CountFilter(**filters) if filters else CountFilter()
    scaled, colours, libraries, radii_um = [], [], [], []
    for row in rows:
        mpp = slide_mpp(row)
        spots = read_spots(_spots_row(row), mpp)
        radii_um.append(spots.radius0 * mpp)
        targets = make_targets(spots, run.genes, f"slide {row.slide_id}", limits)
        scaled.append(targets.values_KP / np.asarray(info["scaling"][row.slide_id]))
        libraries.append(float(np.median(targets.library_K)))
        if colour:
            colours.append(slide_colours(row, spots.select(targets.kept)))
    targets_SG = np.concatenate(scaled)
    counts = run.last_layer.formula.counts
    per_rate = 1e4 / float(np.mean(libraries)) if counts else None
    scale_G = np.mean([info["scaling"][row.slide_id] for row in rows], axis=0)
    ridge = fit_colour_ridge(np.concatenate(colours), targets_SG) if colour else None
    baselines = Baselines(targets_SG.mean(axis=0), ridge, float(np.mean(radii_um)))
    return Units(scale_G, per_rate, limits), baselines


def _mpp(run: Run, slide_id: str) -> float:
    """Return um per level-0 px of a slide of the run."""
    run.choose([slide_id])
    return known_mpp(run.records[slide_id])
