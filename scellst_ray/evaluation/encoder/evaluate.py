"""`scellst-ray evaluate encoder`: how much embeddings say about cell types, and about slides.

Crops are cut around annotated cells, or around the cells of a run, as `extract` cuts them. Two
baselines are always scored on the same cells: 18 colour statistics, and an untrained network of the
same architecture. An encoder that does not beat both has learnt stain, or nothing.

scores.py computes the scores; commands/evaluate_encoder.py prints and writes them.

Shape letters: N cells, D embedding, Q queries, K neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scellst_ray.evaluation.encoder.config import EvaluateEncoderConfig
from scellst_ray.evaluation.encoder.galleries import choose_queries, retrieve
from scellst_ray.evaluation.encoder.neighbours import Floats, purity
from scellst_ray.evaluation.encoder.scores import (
    Predictions,
    difference,
    linear_probe,
    nearest_types,
    scores,
)
from scellst_ray.evaluation.encoder.typed_crops import (
    TypedCrops,
    TypedPoints,
    colours,
    crops_of,
    points_of_manifest,
    points_of_run,
)
from scellst_ray.evaluation.segmentation.detection_metrics import UNKNOWN
from scellst_ray.models.device import device_name, uses_own_gpu
from scellst_ray.models.encoder.encoder import (
    best_precision,
    embed_crops,
    encoder_arch,
    load_encoder,
)
from scellst_ray.models.encoder.weights_file import local_weights

COLOURS = "colours"
RETRIEVED = 10
Say = Callable[[str], None]


@dataclass(frozen=True)
class EncoderEvaluation:
    """Scores of an encoder, of further encoders and of the baselines.

    Attributes:
        cells: Cells that were scored.
        scores: By encoder, `config.encoder` first: its description, probe, knn and purity.
        differences: By every other encoder: scores of probe and knn of `config.encoder` minus its
            scores.
        retrieved: Queries [Q] and their neighbours [Q, K], for the gallery.
        notes: Remarks a reader needs to interpret the scores.
    """

    cells: TypedCrops
    scores: dict[str, dict[str, Any]]
    differences: dict[str, dict[str, Any]]
    retrieved: tuple[NDArray[np.intp], NDArray[np.intp]]
    notes: list[str]


def evaluate_encoder(config: EvaluateEncoderConfig, say: Say = lambda _: None) -> EncoderEvaluation:
    """Score an encoder, an untrained one and colours on the same cells and folds.

    Args:
        config: Settings of the evaluation.
        say: Called with a line of text about progress.

    Raises:
        ValueError: images, annotations or weights cannot be used, or there are fewer than two
            slides or two types.
        FileNotFoundError: a file does not exist.
    """
    names = _names_to_score(config)
    points, notes = choose_cells(config)
    cells = crops_of(points)
    say(f"{len(cells.types_N):,} cells of {len(points)} slides")
    results: dict[str, dict[str, Any]] = {}
    predicted: dict[str, dict[str, Predictions]] = {}
    retrieved = None
    for name in names:
        embedding_ND, about = _embed(name, cells, config)
        predicted[name] = _predict_types(embedding_ND, cells, config)
        results[name] = about | {k: scores(v, config.seed) for k, v in predicted[name].items()}
        results[name]["probe"]["strengths"] = list(predicted[name]["probe"].strengths)
        results[name]["purity"] = purity(
            embedding_ND, cells.types_N, cells.groups_N, config.neighbours
        )
        if retrieved is None:
            queries_Q = choose_queries(cells.types_N, config.queries, config.seed)
            retrieved = queries_Q, retrieve(embedding_ND, cells.groups_N, queries_Q, RETRIEVED)
        say(f"{name}: probe {results[name]['probe']['balanced_accuracy']:.3f}")
    assert retrieved is not None
    ours = predicted[config.encoder]
    differences = {
        name: {key: difference(ours[key], theirs[key], config.seed) for key in ours}
        for name, theirs in predicted.items()
        if name != config.encoder
    }
    return EncoderEvaluation(cells, results, differences, retrieved, notes)


def choose_cells(config: EvaluateEncoderConfig) -> tuple[list[TypedPoints], list[str]]:
    """Return the cells to score, slide by slide, and notes about the choice.

    Raises:
        ValueError: annotations cannot be used, or `drop_types` names a type that no cell has.
    """
    if config.run is not None:
        listed = points_of_run(config.run, config.slides)
        notes = ["types were predicted by the run's segmenter; they are no annotations"]
    else:
        listed, notes = points_of_manifest(str(config.manifest)), []
    drop, present = set(config.drop_types or []), _types(listed)
    if drop - present:
        message = (
            f"drop_types names {', '.join(sorted(drop - present))}; the cells have "
            f"{', '.join(sorted(present))}"
        )
        raise ValueError(message)
    kept = [points.take(~np.isin(points.types_N, [*drop, UNKNOWN])) for points in listed]
    dropped = _num_cells(listed) - _num_cells(kept)
    chosen = _draw_cells(kept, config.max_cells, config.seed)
    if dropped:
        notes.append(f"{dropped:,} cells left out: their type is unknown or one of drop_types")
    if _num_cells(chosen) < _num_cells(kept):
        notes.append(f"{_num_cells(chosen):,} of {_num_cells(kept):,} cells drawn (max_cells)")
    for name in sorted(_types(chosen)):
        homes = [points.slide_id for points in chosen if name in points.types_N]
        if len(homes) == 1:
            notes.append(f"only slide {homes[0]} has type {name}: no probe can learn this type")
    return chosen, notes


def _types(listed: Sequence[TypedPoints]) -> set[str]:
    return {str(name) for points in listed for name in points.types_N}


def _num_cells(listed: Sequence[TypedPoints]) -> int:
    return sum(len(points.types_N) for points in listed)


def _draw_cells(listed: Sequence[TypedPoints], max_cells: int, seed: int) -> list[TypedPoints]:
    """Return at most `max_cells` cells, drawn evenly over slides and types.

    Of each type of each slide, the same number of cells is drawn, or all if it has fewer.
    """
    rng = np.random.default_rng(seed)
    turn = []  # random rank of each cell among the cells of its slide and type
    for points in listed:
        turn_N = np.empty(len(points.types_N), np.int64)
        for name in np.unique(points.types_N):
            members = np.flatnonzero(points.types_N == name)
            turn_N[members] = rng.permutation(len(members))
        turn.append(turn_N)
    every_N = np.concatenate([np.empty(0, np.int64), *turn])
    chosen_N = np.zeros(len(every_N), np.bool_)
    chosen_N[np.lexsort((rng.permutation(len(every_N)), every_N))[:max_cells]] = True
    ends = np.cumsum([len(turn_N) for turn_N in turn])[:-1]
    parts = zip(listed, np.split(chosen_N, ends), strict=True)
    return [points.take(kept_N) for points, kept_N in parts if kept_N.any()]


def _names_to_score(config: EvaluateEncoderConfig) -> list[str]:
    """Return the encoder, further encoders asked for, an untrained encoder and COLOURS."""
    arch = encoder_arch(local_weights(config.encoder))
    seeds = (config.seed, config.seed + 1)
    untrained = [f"random:{seed}" + f":{arch}" * (arch != "resnet50") for seed in seeds]
    asked = [config.encoder, *(config.also or [])]
    names = [*asked, *[name for name in untrained if name not in asked][:1], COLOURS]
    return list(dict.fromkeys(names))


def _embed(
    name: str, cells: TypedCrops, config: EvaluateEncoderConfig
) -> tuple[Floats, dict[str, Any]]:
    """Return embeddings [N, D], and a description of the encoder that made them."""
    if name == COLOURS:
        embedding_NF = colours(cells.crops_NHWC)
        return embedding_NF, {"dim": embedding_NF.shape[1]}
    encoder = load_encoder(local_weights(name))
    device = device_name(on_gpu=uses_own_gpu(config.gpus))
    precision = best_precision(device) if config.precision == "auto" else config.precision
    encoder.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    embedding_ND = embed_crops(encoder, cells.crops_NHWC, device, precision)
    return embedding_ND, {"dim": encoder.dim, "digest": encoder.digest, "precision": precision}


def _predict_types(
    embedding_ND: Floats, cells: TypedCrops, config: EvaluateEncoderConfig
) -> dict[str, Predictions]:
    """Return the types that the linear probe and the neighbours predict."""
    known = cells.types_N, cells.groups_N, config.seed
    return {
        "probe": linear_probe(embedding_ND, *known),
        "knn": nearest_types(embedding_ND, *known, config.neighbours),
    }
