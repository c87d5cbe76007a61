"""Scores of masks, centroids and types of nuclei against annotations, of one image or several."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from scellst_ray.core.geometry import Frame
from scellst_ray.evaluation.segmentation.annotations import NucleiFile
from scellst_ray.evaluation.segmentation.detection_metrics import (
    UNKNOWN,
    DetectionCounts,
    TypeCounts,
    match_points,
    type_counts,
)
from scellst_ray.evaluation.segmentation.mask_metrics import SegmentationScores, score_labels
from scellst_ray.evaluation.segmentation.rasterise import rasterise

Sides = tuple[Mapping[str, str], Mapping[str, str]]


@dataclass(frozen=True)
class Annotated:
    """Annotated part of an image.

    Attributes:
        frame: Position and scale of the annotation's px on the slide.
        mpp: um per px of the annotation. None: unknown, so only masks can be scored.
        size_px: Width and height of the annotated part, px of the annotation; None: everything.
    """

    frame: Frame
    mpp: float | None
    size_px: tuple[float, float] | None = None


@dataclass(frozen=True)
class ImageScores:
    """Scores of the nuclei of one image.

    Attributes:
        masks: Scores of instance masks; None if either side has only points.
        centroids: Counts of centroids matched within a radius; None if the resolution is unknown.
        types: By type name, counts of the pairs of centroids.
        type_pq: By type name, panoptic quality (PQ) of the masks that have this type on each side.
            Empty unless both sides have masks and types.
    """

    masks: SegmentationScores | None
    centroids: DetectionCounts | None
    types: dict[str, TypeCounts] = field(default_factory=dict)
    type_pq: dict[str, float] = field(default_factory=dict)


def score_image(
    truth: NucleiFile,
    predicted: NucleiFile,
    annotated: Annotated,
    names: Sides,
    radius_um: float,
) -> ImageScores:
    """Score the predicted nuclei of one image.

    Masks are compared on the grid of the annotation, if both sides have masks. Centroids are
    compared if the resolution is known; predicted centroids outside the annotated part are left
    out.

    Args:
        truth: Annotated nuclei.
        predicted: Predicted nuclei, in level-0 px. Exception: if both sides are label maps, they
            are taken to have the same pixels.
        annotated: Position, scale and size of the annotation.
        names: New type names of truth and of prediction, from `common_types`.
        radius_um: Largest distance of two centroids that are matched.

    Raises:
        ValueError: two label maps have different shapes, or nothing can be compared.
    """
    true_types, predicted_types = (
        np.array([side.get(name, name) for name in nuclei.types_N.tolist()], np.str_)
        for side, nuclei in zip(names, (truth, predicted), strict=True)
    )
    masks, type_pq = None, {}
    if truth.labels_HW is not None and predicted.has_masks:
        predicted_HW = _on_grid(predicted, truth.labels_HW, annotated.frame, truth.source)
        masks = score_labels(truth.labels_HW, predicted_HW)
        type_pq = _type_pq(truth.labels_HW, true_types, predicted_HW, predicted_types)
    if annotated.mpp is None:
        if masks is None:
            message = f"{truth.source}: to match points in um, give --mpp (um per px of the image)"
            raise ValueError(message)
        return ImageScores(masks, None, {}, type_pq)
    size_px = annotated.size_px
    if truth.labels_HW is not None:
        size_px = truth.labels_HW.shape[::-1]
    found_px = predicted.centroid_N2
    if truth.labels_HW is None or predicted.labels_HW is None:  # two maps have the same pixels
        found_px = annotated.frame.from_level0(found_px)
    true_in, found_in = (_inside(points, size_px) for points in (truth.centroid_N2, found_px))
    matching = match_points(
        truth.centroid_N2[true_in] * annotated.mpp, found_px[found_in] * annotated.mpp, radius_um
    )
    types = type_counts(matching, true_types[true_in].tolist(), predicted_types[found_in].tolist())
    return ImageScores(masks, matching.counts, types, type_pq)


def _on_grid(
    predicted: NucleiFile, true_HW: NDArray[np.int32], frame: Frame, source: str
) -> NDArray[np.int32]:
    """Return the predicted nuclei as a label map on the grid of the annotation.

    Raises:
        ValueError: both sides are label maps, and their shapes differ.
    """
    if predicted.labels_HW is not None:
        if predicted.labels_HW.shape != true_HW.shape:
            message = (
                f"{predicted.source} is {predicted.labels_HW.shape} px and {source} "
                f"{true_HW.shape} (rows, columns); give two label maps of the same pixels"
            )
            raise ValueError(message)
        return predicted.labels_HW
    assert predicted.polygons_N is not None
    height, width = true_HW.shape
    near, far = frame.to_level0(np.array([(0, 0), (width, height)]))
    bounds_N4 = shapely.bounds(predicted.polygons_N)
    touches_N = (bounds_N4[:, :2] < far).all(axis=1) & (bounds_N4[:, 2:] > near).all(axis=1)
    rows = np.flatnonzero(touches_N)
    moved = shapely.transform(predicted.polygons_N[rows], frame.from_level0)
    numbers = np.concatenate([[0], rows + 1]).astype(np.int32)
    return np.asarray(numbers[rasterise(moved, height, width)])


def _type_pq(
    true_HW: NDArray[np.int32],
    true_types: NDArray[np.str_],
    predicted_HW: NDArray[np.int32],
    predicted_types: NDArray[np.str_],
) -> dict[str, float]:
    """Return PQ by type, computed among the nuclei of the type on each side.

    So a nucleus with a wrong type counts as missed. This is the rule of PanNuke and CellViT for
    mPQ (Gamper et al. 2020, "PanNuke Dataset Extension", section on evaluation). The result is
    empty unless both sides have a type in common.
    """
    shared = {*true_types.tolist()} & {*predicted_types.tolist()} - {UNKNOWN}
    if not shared:
        return {}
    pq = {}
    for name in sorted({*true_types.tolist(), *predicted_types.tolist()} - {UNKNOWN}):
        maps = [
            np.where(np.concatenate([[False], types == name])[labels_HW], labels_HW, 0)
            for labels_HW, types in ((true_HW, true_types), (predicted_HW, predicted_types))
        ]
        pq[name] = score_labels(maps[0], maps[1]).pq
    return pq


def _inside(points_N2: NDArray[np.float64], size_px: tuple[float, ...] | None) -> NDArray[np.bool_]:
    """Return a mask of the points in [0, width) x [0, height); all points if size_px is None."""
    if size_px is None:
        return np.ones(len(points_N2), np.bool_)
    return np.asarray(((points_N2 >= 0) & (points_N2 < np.array(size_px))).all(axis=1))


def summary(images: Sequence[ImageScores]) -> ImageScores:
    """Return the scores of several images as one.

    Counts of centroids and types add up. Scores of masks and the PQ of a type are means over the
    images for which they are defined.
    """
    masks = [image.masks for image in images if image.masks is not None]
    counts = [image.centroids for image in images if image.centroids is not None]
    types: dict[str, TypeCounts] = {}
    for image in images:
        for name, value in image.types.items():
            types[name] = types[name] + value if name in types else value
    pq_names = sorted({name for image in images for name in image.type_pq})
    nan = float("nan")
    return ImageScores(
        masks=_mean_masks(masks) if masks else None,
        centroids=sum(counts[1:], counts[0]) if counts else None,
        types=dict(sorted(types.items())),
        type_pq={n: _mean([image.type_pq.get(n, nan) for image in images]) for n in pq_names},
    )


def _mean_masks(masks: Sequence[SegmentationScores]) -> SegmentationScores:
    """Return the sums of numbers of nuclei, and the means of scores."""
    rows: list[dict[str, Any]] = [asdict(value) for value in masks]
    combined: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        combined[name] = sum(values) if name.startswith("num_") else _mean(values)
    return SegmentationScores(**combined)


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    kept = [value for value in values if not np.isnan(value)]
    return float(np.mean(kept)) if kept else float("nan")


def as_dict(scores: ImageScores, *, typed: bool) -> dict[str, Any]:
    """Return scores as nested dicts of numbers; None where a score is not defined.

    Args:
        scores: Scores of one image or several.
        typed: Whether annotation and prediction have types in common. If not, only the number of
            detected nuclei is returned for each annotated type.
    """
    result: dict[str, Any] = {}
    if scores.masks is not None:
        result["masks"] = asdict(scores.masks)
    if scores.centroids is not None:
        result["centroids"] = asdict(scores.centroids) | {
            name: getattr(scores.centroids, name) for name in ("precision", "recall", "f1")
        }
    if scores.type_pq:
        result["mpq"] = _mean(list(scores.type_pq.values()))
    names = ("detected", "precision", "recall", "f1")
    for name in sorted({*scores.types, *scores.type_pq}):
        row: dict[str, Any] = {}
        counts = scores.types.get(name)
        if counts is not None and typed:
            row = asdict(counts) | {score: getattr(counts, score) for score in names}
        elif counts is not None and counts.num_true:
            kept = ("num_true", "num_detected", "detected")
            row = {score: getattr(counts, score) for score in kept}
        if name in scores.type_pq:
            row["pq"] = scores.type_pq[name]
        if row:
            result.setdefault("types", {})[name] = row
    return dict(_without_nan(result))


def _without_nan(value: Any) -> Any:  # noqa: ANN401 - walks nested dicts
    """Return the value with None in place of NaN, at all depths."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value
