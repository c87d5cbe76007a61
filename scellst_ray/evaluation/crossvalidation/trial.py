"""One trial of cross-validation: a head is fitted on some slides and scored on other slides.

The panel (the genes to predict) is chosen on the training slides, too. Baselines are scored next to
the head.

Shape letters: S spots, K kept spots (they pass the filters and have cells), N cells under spots,
P genes of the panel, D embedding, R draws of a bootstrap.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scellst_ray.evaluation.expression.bootstrap import (
    draws,
    interval,
    mean_over_genes,
    pearson_of_draws,
    times_drawn,
)
from scellst_ray.evaluation.expression.colour_baseline import fit_colour_ridge, slide_colours
from scellst_ray.evaluation.expression.evaluate import COLOUR, MEAN, Units
from scellst_ray.evaluation.expression.scores import (
    METRICS,
    OURS,
    SHUFFLED,
    Bootstrap,
    Truth,
    measured_columns,
    number,
    score_models,
)
from scellst_ray.models.mil.bags import BagSet, bag_mean, split_spots
from scellst_ray.models.mil.fit import FitConfig, fit_head, new_head
from scellst_ray.models.mil.head import MilHead
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.tables import read_slide_table
from scellst_ray.spots.links import Links
from scellst_ray.spots.panel import filter_counts, make_targets, robust_scale, size_factors
from scellst_ray.spots.selection import Section, choose_genes
from scellst_ray.spots.table import Spots, check_whole_counts
from scellst_ray.stages.supervision import Rules, TrainingSlide, link_slide

# The models compared, in the order of reports. COLOUR is present only if asked for.
MODELS = (OURS, COLOUR, MEAN, SHUFFLED)


@dataclass(frozen=True)
class SlideData:
    """The data of a slide for all trials, whichever slides they train on.

    Attributes:
        slide_id: The slide.
        spots: All spots and genes of the slide.
        kept: int64 [K], rows of the kept spots.
        links: Cells of the kept spots, as rows of embeddings_ND.
        embeddings_ND: float16, embeddings of the cells under the kept spots.
        colours_KC: Colour statistics of the discs of kept spots; None if not asked for.
    """

    slide_id: str
    spots: Spots
    kept: NDArray[np.int64]
    links: Links
    embeddings_ND: NDArray[np.float16]
    colours_KC: NDArray[np.float64] | None

    @property
    def source(self) -> str:
        """Name of the slide in error messages."""
        return f"slide {self.slide_id}"


@dataclass(frozen=True)
class TrialSettings:
    """Settings of a trial.

    Attributes:
        train_slides: slide_ids on which genes are chosen and the head is fitted.
        test_slides: slide_ids to score, each on its own.
        genes: Rule that chooses the panel (see choose_genes).
        fit: Settings of the fit.
        rules: Rules that turn spots into training targets.
        num_draws: Bootstrap draws of spots for intervals; 0 for no intervals.
        num_threads: Number of torch threads.
        use_gpu: Whether to fit on the GPU.
    """

    train_slides: tuple[str, ...]
    test_slides: tuple[str, ...]
    genes: str
    fit: FitConfig
    rules: Rules
    num_draws: int = 0
    num_threads: int = 1
    use_gpu: bool = False


@dataclass(frozen=True)
class Learnt:
    """Models fitted on the training slides.

    Attributes:
        panel: Gene names.
        head: The fitted head.
        units: Conversion of the head's predictions to scaled expression.
        mean_P: Mean scaled expression of the training spots, a baseline.
        ridge: Fitted colour baseline; None without colours.
        info: Numbers about the fit: seconds, epochs, losses, sizes.
    """

    panel: list[str]
    head: MilHead
    units: Units
    mean_P: NDArray[np.float64]
    ridge: Any
    info: dict[str, Any]


def prepare_slide(
    slide: TrainingSlide, run: RunFolder, rules: Rules, *, colour: bool
) -> tuple[dict[str, Any], SlideData]:
    """Read a slide once for all trials; return (numbers of kept spots and their cells, data).

    Raises:
        ValueError: spots cannot be read or do not lie on the tissue, no spot has a cell, counts
            are needed and are not whole numbers, or embeddings are not finite.
    """
    slide_id = slide.row.slide_id
    cells = read_slide_table(run, slide_id, "CELLS", ["x0", "y0", "embedding"], whole=True)
    xy0 = np.column_stack([cells["x0"].to_numpy(), cells["y0"].to_numpy()])
    linked = link_slide(slide, xy0, rules, see_image=rules.check_alignment)
    if rules.with_counts:
        check_whole_counts(linked.spots, f"slide {slide_id}", "a loss on counts")
    passing = filter_counts(linked.spots, f"slide {slide_id}", rules.limits)
    passes = np.isin(linked.spots.spot_id, passing.spot_id)
    kept = np.flatnonzero(passes & (linked.links.num_cells > 0))
    if not len(kept):
        message = (
            f"slide {slide_id}: none of its {passes.sum()} spots that pass the filters has a cell. "
            "Check the mpp and the spot positions."
        )
        raise ValueError(message)
    links = linked.links.select(kept)
    rows, place = np.unique(links.cell_index, return_inverse=True)
    vectors = cells["embedding"].combine_chunks().take(rows)
    embeddings_ND = np.asarray(vectors.flatten()).reshape(len(rows), -1)
    if not np.isfinite(embeddings_ND).all():
        message = f"slide {slide_id}: embeddings hold NaN or infinity. Extract the slide again."
        raise ValueError(message)
    spots = linked.spots.select(kept)
    colours = slide_colours(slide.row, spots, slide.source) if colour else None
    data = SlideData(
        slide_id, linked.spots, kept, Links(links.offsets, place), embeddings_ND, colours
    )
    return {"num_spots": len(kept), "num_cells": len(rows)}, data


def make_section(data: SlideData, rules: Rules) -> Section:
    """Return the kept spots of a training slide, from which genes are chosen."""
    passing = filter_counts(data.spots, data.source, rules.limits)
    is_kept = np.isin(passing.spot_id, data.spots.spot_id[data.kept])
    return Section(data.slide_id, data.spots.genes, passing.select(is_kept))


@dataclass(frozen=True)
class SlideTargets:
    """Training targets of the K kept spots of a slide.

    Attributes:
        values_KP: float32, log-normalised expression of the panel.
        counts_KP: float32, raw counts.
        factors_K: float64, size factors; None if the loss is not on counts.
        median_library: Median total counts of all spots that pass the filters.
    """

    values_KP: NDArray[np.float32]
    counts_KP: NDArray[np.float32]
    factors_K: NDArray[np.float64] | None
    median_library: float


def make_slide_targets(data: SlideData, panel: Sequence[str], rules: Rules) -> SlideTargets:
    """Return the targets of the kept spots, as `train` makes them."""
    targets = make_targets(data.spots, panel, data.source, rules.limits)
    rows = np.searchsorted(targets.kept, data.kept)
    factors = size_factors(targets.library_K, data.source)[rows] if rules.with_counts else None
    median = float(np.median(targets.library_K))
    return SlideTargets(targets.values_KP[rows], targets.counts_KP[rows], factors, median)


def run_trial(settings: TrialSettings, slides: Mapping[str, SlideData]) -> dict[str, Any]:
    """Choose genes and fit on the training slides, then score the test slides.

    Returns:
        Values for JSON:

        - `genes`: the panel.
        - `fit`: epochs, losses, seconds.
        - `seconds`: seconds of the whole trial.
        - `scores`: by test slide and model, the means over genes (`pcc`, `pcc_given_depth`, `scc`,
          `rmse`, `mae`), intervals of the correlations over spots (`pcc_low`, ...) and the
          correlations `by_gene`.
    """
    started = time.monotonic()
    torch.set_num_threads(settings.num_threads)
    learnt = learn(settings, [slides[name] for name in settings.train_slides])
    scores = {name: score(settings, learnt, slides[name]) for name in settings.test_slides}
    return {
        "genes": learnt.panel,
        "fit": learnt.info,
        "scores": scores,
        "seconds": time.monotonic() - started,
    }


def learn(settings: TrialSettings, slides: Sequence[SlideData]) -> Learnt:
    """Choose genes, then fit the head and the baselines, on these slides only."""
    rules, config = settings.rules, settings.fit
    panel = choose_genes(settings.genes, [make_section(data, rules) for data in slides]).genes
    targets = [make_slide_targets(data, panel, rules) for data in slides]
    pairs = [robust_scale(of_slide.values_KP) for of_slide in targets]
    scaled_SP = np.concatenate([scaled for scaled, _ in pairs])
    bags = join_bags(slides, targets, scaled_SP)
    slide_ids = [data.slide_id for data in slides for _ in data.kept]
    train_spots, val_spots = split_spots(slide_ids, config.val_share, config.seed)
    device = "cuda" if settings.use_gpu else "cpu"
    started = time.monotonic()
    train, val = bags.take(train_spots), bags.take(val_spots)
    head = new_head(train, config.seed, config.formula()).to(device)
    result = fit_head(head, train.to(device), val.to(device), config)
    info = {
        "seconds": time.monotonic() - started,
        "num_epochs": len(result.history),
        "best_epoch": result.best_epoch,
        "validation_loss": result.best_loss,
        "num_spots": len(bags),
        "num_cells": len(bags.embeddings_LD),
    }
    colours = [data.colours_KC for data in slides if data.colours_KC is not None]
    ridge = fit_colour_ridge(np.concatenate(colours), scaled_SP) if colours else None
    library = float(np.mean([of_slide.median_library for of_slide in targets]))
    scale_P = np.mean([scale for _, scale in pairs], axis=0)
    units = Units(scale_P, 1e4 / library if rules.with_counts else None, rules.limits)
    return Learnt(panel, head.cpu().eval(), units, scaled_SP.mean(axis=0), ridge, info)


def join_bags(
    slides: Sequence[SlideData], targets: Sequence[SlideTargets], scaled_SP: NDArray[np.float32]
) -> BagSet:
    """Return the bags (the cells of a spot and its target) of several slides as one set.

    Targets are counts if the slides have size factors, else `scaled_SP`.
    """
    sizes = np.concatenate([data.links.num_cells for data in slides])
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
    cells_LD = np.concatenate([data.embeddings_ND[data.links.cell_index] for data in slides])
    factors = [of_slide.factors_K for of_slide in targets if of_slide.factors_K is not None]
    if not factors:
        return BagSet(torch.from_numpy(cells_LD), offsets, torch.from_numpy(scaled_SP))
    counts_SP = np.concatenate([of_slide.counts_KP for of_slide in targets])
    factors_S = torch.from_numpy(np.concatenate(factors).astype(np.float32))
    return BagSet(torch.from_numpy(cells_LD), offsets, torch.from_numpy(counts_SP), factors_S)


def score(settings: TrialSettings, learnt: Learnt, data: SlideData) -> dict[str, Any]:
    """Score the head and the baselines on the kept spots of a slide; absent genes are left out.

    Raises:
        ValueError: the slide has none of the genes.
    """
    columns = measured_columns(learnt.panel, data.spots.genes, f"{data.source}: spots")
    genes = [learnt.panel[column] for column in columns]
    targets = make_slide_targets(data, genes, settings.rules)
    depth_S = np.log1p(np.asarray(data.spots.counts[data.kept].sum(axis=1)).ravel())
    scaled = targets.values_KP / learnt.units.scale_G[columns]
    predicted = spot_predictions(learnt.head, data)[:, columns]
    models = {
        OURS: learnt.units.predicted(predicted, columns),
        MEAN: np.tile(learnt.mean_P[columns], (len(scaled), 1)),
    }
    if learnt.ridge is not None and data.colours_KC is not None:
        models[COLOUR] = learnt.ridge.predict(data.colours_KC)[:, columns]
    truth, bootstrap = Truth(scaled, depth_S, genes), Bootstrap(0, settings.fit.seed)
    scores_of_model = score_models(models, truth, bootstrap)
    rows_RS = draws(len(scaled), settings.num_draws, settings.fit.seed)
    results = {name: _means(scores.by_gene) for name, scores in scores_of_model.items()}
    for name, predicted_SP in models.items() if settings.num_draws else ():
        results[name] |= _intervals(predicted_SP, truth, times_drawn(rows_RS))
    return {"num_spots": len(scaled), "genes": genes, "models": results}


@torch.no_grad()
def spot_predictions(head: MilHead, data: SlideData, block: int = 4096) -> NDArray[np.float64]:
    """Return the mean prediction over each spot's cells [K, P]."""
    parts = (
        torch.from_numpy(np.array(data.embeddings_ND[start : start + block]))
        for start in range(0, len(data.embeddings_ND), block)
    )
    cells_NP = torch.cat([head.from_hidden(head.hidden(part)) for part in parts])
    # Copied, since arrays from Ray's object store are read-only.
    offsets = torch.from_numpy(data.links.offsets.copy())
    index_L = torch.from_numpy(data.links.cell_index.copy())
    return np.asarray(bag_mean(cells_NP[index_L], offsets).double())


def _means(by_gene: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Return the mean of each metric over genes, and the correlations by gene."""
    means: dict[str, Any] = {}
    for metric in METRICS:
        if metric in by_gene:
            means[metric] = number(float(mean_over_genes(by_gene[metric][None])[0]))
    means["by_gene"] = {
        metric: [number(value) for value in by_gene[metric]]
        for metric in ("pcc", "pcc_given_depth")
    }
    return means


def _intervals(
    predicted_SP: NDArray[np.floating], truth: Truth, times_RS: NDArray[np.float64]
) -> dict[str, Any]:
    """Return 95 % intervals, over spots, of the mean correlations."""
    intervals: dict[str, Any] = {}
    for metric, covariate_S in (("pcc", None), ("pcc_given_depth", truth.log_depth_S)):
        by_draw = pearson_of_draws(predicted_SP, truth.values_SG, times_RS, covariate_S)
        low, high = interval(mean_over_genes(by_draw))
        intervals |= {f"{metric}_low": number(float(low)), f"{metric}_high": number(float(high))}
    return intervals
