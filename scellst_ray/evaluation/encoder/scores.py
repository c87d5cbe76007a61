"""Scores of an encoder on cell types: a linear probe, and votes of neighbours.

Each slide in turn is held out: the probe is trained on the other slides and scored on this one. So
it cannot profit from the stain of its training slides. All types have the same weight: a probe that
always names the commonest type scores 1 / (number of types).

Shape letters: N cells, D embedding, K neighbours, G slides, T types, M encoders, B bootstrap
samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit
from sklearn.preprocessing import StandardScaler

from scellst_ray.evaluation.encoder.neighbours import (
    NEIGHBOURS,
    Floats,
    Names,
    checked,
    neighbours,
    unit,
)

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
MAX_FOLDS = 10
INNER_FOLDS = 3
NUM_SAMPLES = 1000
Over = Literal["slides", "cells"]


@dataclass(frozen=True)
class Predictions:
    """Predicted types of cells whose slide was held out in training.

    Attributes:
        types_N: Annotated type of each cell.
        predicted_N: Type predicted when the cell's slide was held out.
        groups_N: Slide of each cell.
        strengths: C (inverse penalty) of each fold's probe; empty for votes of neighbours.
    """

    types_N: Names
    predicted_N: Names
    groups_N: Names
    strengths: tuple[float, ...] = ()


def probe(embeddings_ND: Floats, types_N: Names, groups_N: Names, seed: int = 0) -> dict[str, Any]:
    """Return the scores of a linear probe on held-out slides.

    Args:
        embeddings_ND: Embeddings [N, D].
        types_N: Type name of each cell.
        groups_N: Slide name of each cell.
        seed: Seed of the folds and of the bootstrap.

    Returns:
        As `scores`, with `strengths`, the C of each fold.

    Raises:
        ValueError: as `linear_probe`.
    """
    predictions = linear_probe(embeddings_ND, types_N, groups_N, seed)
    return scores(predictions, seed) | {"strengths": list(predictions.strengths)}


def linear_probe(
    embeddings_ND: Floats,
    types_N: Names,
    groups_N: Names,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> Predictions:
    """Predict every cell's type by multinomial logistic regression trained on other slides.

    Embeddings are standardised with the statistics of the training cells. All types have the same
    weight. C is the value of `strengths` with the best balanced accuracy in a cross-validation over
    the training slides; of equal values, the first.

    Raises:
        ValueError: there are fewer than two slides or types, or embeddings are not finite.
    """
    x_ND = checked(embeddings_ND, types_N, groups_N)
    predicted_N = np.empty_like(types_N)
    chosen = []
    for train, test in folds(groups_N, MAX_FOLDS, seed):
        x_train, y_train = x_ND[train], types_N[train]
        best = strengths[0]
        if len(strengths) > 1:
            best = _best_strength(x_train, y_train, groups_N[train], strengths, seed)
        predicted_N[test] = _path(x_train, y_train, x_ND[test], [best])[0]
        chosen.append(best)
    return Predictions(types_N, predicted_N, groups_N, tuple(chosen))


def nearest_types(
    embeddings_ND: Floats, types_N: Names, groups_N: Names, seed: int = 0, k: int = NEIGHBOURS
) -> Predictions:
    """Predict every cell's type by the votes of its k most similar cells of other slides.

    Similarity is the cosine of embeddings standardised with the statistics of those slides. A vote
    weighs 1 / (number of cells of its type on those slides), so all types have the same weight.

    Raises:
        ValueError: as `linear_probe`.
    """
    x_ND = checked(embeddings_ND, types_N, groups_N)
    predicted_N = np.empty_like(types_N)
    for train, test in folds(groups_N, MAX_FOLDS, seed):
        scaler = StandardScaler().fit(x_ND[train])
        queries, keys = (unit(scaler.transform(x_ND[part])) for part in (test, train))
        names, number_N = np.unique(types_N[train], return_inverse=True)
        weight_T = 1 / np.bincount(number_N)
        voters_NK = number_N[neighbours(queries, keys, k)]
        votes_NT = np.zeros((len(test), len(names)))
        np.add.at(votes_NT, (np.arange(len(test))[:, None], voters_NK), weight_T[voters_NK])
        predicted_N[test] = names[votes_NT.argmax(axis=1)]
    return Predictions(types_N, predicted_N, groups_N)


def folds(
    groups_N: Names, max_folds: int, seed: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Yield the cells to train on and the cells to score, fold by fold.

    A fold holds out one slide, or several if there are more than `max_folds` slides.
    """
    names, number_N = np.unique(groups_N, return_inverse=True)
    fold_G = np.random.default_rng(seed).permutation(len(names)) % max_folds
    yield from PredefinedSplit(fold_G[number_N]).split()


def balanced_accuracy(types_N: Names, predicted_N: Names) -> float:
    """Return the mean over types of the share of a type's cells that were predicted correctly."""
    is_correct_N = types_N == predicted_N
    return float(np.mean([is_correct_N[types_N == name].mean() for name in np.unique(types_N)]))


def scores(found: Predictions, seed: int = 0) -> dict[str, Any]:
    """Return balanced accuracy with 95 % intervals, by type and by slide.

    Returns:
        Values for JSON:

        - `balanced_accuracy`: over the cells of all slides.
        - `interval_slides`, `interval_cells`: its intervals (see `bootstrap`).
        - `recall`: share of correct cells by type.
        - `slides`: balanced accuracy of each slide over its types.
    """
    types_N, groups_N, predicted_N = found.types_N, found.groups_N, found.predicted_N
    overs: tuple[Over, ...] = ("slides", "cells")
    members = {str(group): groups_N == group for group in np.unique(groups_N)}
    return {
        "balanced_accuracy": balanced_accuracy(types_N, predicted_N),
        **{f"interval_{over}": interval(bootstrap([found], over, seed)[0]) for over in overs},
        "recall": {
            str(name): float((predicted_N[types_N == name] == name).mean())
            for name in np.unique(types_N)
        },
        "slides": {
            group: balanced_accuracy(types_N[inside_N], predicted_N[inside_N])
            for group, inside_N in members.items()
        },
    }


def difference(ours: Predictions, theirs: Predictions, seed: int = 0) -> dict[str, Any]:
    """Return the balanced accuracy of `ours` minus that of `theirs`, on the same cells.

    Returns:
        `balanced_accuracy`: the difference. `interval_slides` and `interval_cells`: intervals of
        the difference, from the same bootstrap samples for both.
    """
    overs: tuple[Over, ...] = ("slides", "cells")
    both = [balanced_accuracy(found.types_N, found.predicted_N) for found in (ours, theirs)]
    pairs = {over: bootstrap([ours, theirs], over, seed) for over in overs}
    intervals = {f"interval_{over}": interval(a_B - b_B) for over, (a_B, b_B) in pairs.items()}
    return {"balanced_accuracy": both[0] - both[1], **intervals}


def bootstrap(
    found: Sequence[Predictions], over: Over, seed: int = 0, num_samples: int = NUM_SAMPLES
) -> NDArray[np.float64]:
    """Return the balanced accuracy of predictions on bootstrap samples of their cells.

    Args:
        found: Predictions of one or several encoders, of the same cells in the same order.
        over: 'slides' draws slides with replacement: the spread to expect on other slides. 'cells'
            draws cells within each slide: the error of the score on these slides.
        seed: Seed of the draws.
        num_samples: Number of bootstrap samples B.

    Returns:
        float64 [M, B]. A type that is absent from a sample is left out of its mean.
    """
    rng = np.random.default_rng(seed)
    names, type_N = np.unique(found[0].types_N, return_inverse=True)
    slides, slide_N = np.unique(found[0].groups_N, return_inverse=True)
    right_MN = np.stack([one.predicted_N == one.types_N for one in found]).astype(np.float64)
    order_N = np.argsort(slide_N, kind="stable")
    size_G = np.bincount(slide_N)
    start_G = np.cumsum(size_G) - size_G
    out_MB = np.empty((len(found), num_samples))
    for sample in range(num_samples):
        if over == "slides":
            drawn_G = np.bincount(
                rng.integers(len(slides), size=len(slides)), minlength=len(slides)
            )
            weight_N = drawn_G[slide_N].astype(np.float64)
        else:
            drawn_N = start_G[slide_N] + (rng.random(len(slide_N)) * size_G[slide_N]).astype(int)
            weight_N = np.bincount(order_N[drawn_N], minlength=len(slide_N)).astype(np.float64)
        total_T = np.bincount(type_N, weight_N, len(names))
        for row, right_N in enumerate(right_MN):
            right_T = np.bincount(type_N, weight_N * right_N, len(names))
            out_MB[row, sample] = (right_T[total_T > 0] / total_T[total_T > 0]).mean()
    return out_MB


def interval(values_B: NDArray[np.float64]) -> list[float]:
    """Return the 2.5 and 97.5 % quantiles."""
    return [float(value) for value in np.quantile(values_B, (0.025, 0.975))]


def _best_strength(
    x_ND: Floats, types_N: Names, groups_N: Names, strengths: Sequence[float], seed: int
) -> float:
    """Return the C whose probes score best on slides they were not trained on.

    If there is only one slide, random parts of its cells take the place of slides.
    """
    if len(np.unique(groups_N)) < 2:
        parts_N = np.random.default_rng(seed).integers(INNER_FOLDS, size=len(groups_N))
        groups_N = parts_N.astype(np.str_)
    predicted = np.empty((len(strengths), len(x_ND)), types_N.dtype)
    for train, test in folds(groups_N, INNER_FOLDS, seed):
        predicted[:, test] = _path(x_ND[train], types_N[train], x_ND[test], strengths)
    ranked = [balanced_accuracy(types_N, row_N) for row_N in predicted]
    return strengths[int(np.argmax(ranked))]


def _path(
    x_ND: Floats, types_N: Names, query_ND: Floats, strengths: Sequence[float]
) -> list[Names]:
    """Train a probe for every C, each from the weights of the one before; predict `query_ND`."""
    if len(np.unique(types_N)) == 1:
        return [np.full(len(query_ND), types_N[0]) for _ in strengths]
    scaler = StandardScaler().fit(x_ND)
    model = LogisticRegression(class_weight="balanced", max_iter=1000, tol=1e-3, warm_start=True)
    predicted = []
    for strength in strengths:
        model.set_params(C=strength).fit(scaler.transform(x_ND), types_N)
        predicted.append(np.asarray(model.predict(scaler.transform(query_ND)), types_N.dtype))
    return predicted
