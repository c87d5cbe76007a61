"""The scores of one image or several: masks, centroids and types of nuclei, against annotations."""

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
    """What was annotated of an image.

    Attributes:
        frame: Where the annotation's px lie on the slide.
        mpp: um per px of the annotation; None if unknown, when only masks can be scored.
        size_px: Width and height of what was annotated, px of the annotation; None: everything.
    """

    frame: Frame
    mpp: float | None
    size_px: tuple[float, float] | None = None


@dataclass(frozen=True)
class ImageScores:
    """How well the nuclei of one image were found.

    Attributes:
        masks: Of instance masks; None where either side has points only.
        centroids: Of centroids within a radius; None where the resolution is unknown.
        types: By type name, of the pairs of centroids.
        type_pq: By type name, PQ of the nuclei that have this type on each side; of masks whose
            nuclei have types.
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

    Where both sides have masks these are compared on the grid of the annotation. Centroids are
    compared wherever the resolution is known; predicted ones outside of what was annotated do
    not count.

    Args:
        truth: Annotated nuclei.
        predicted: Predicted nuclei; their px are level-0 px, but for a label map beside another:
            the two are taken to be of the same pixels.
        annotated: Where and how large the annotation is.
        names: What type names of truth and of prediction shall be called, where that is
            another name, from `common_types`.
        radius_um: The largest distance of two centroids of one nucleus.

    Raises:
        ValueError: two label maps of different shapes, or nothing that can be compared.
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
    if truth.labels_HW is None or predicted.labels_HW is None:  # two maps share their pixels
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
    """Return the predicted nuclei as a label map on the grid of the annotation."""
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
    there = np.flatnonzero((bounds_N4[:, :2] < far).all(axis=1) & (bounds_N4[:, 2:] > near).all(1))
    moved = shapely.transform(predicted.polygons_N[there], frame.from_level0)
    numbers = np.concatenate([[0], there + 1]).astype(np.int32)
    return np.asarray(numbers[rasterise(moved, height, width)])


def _type_pq(
    true_HW: NDArray[np.int32],
    true_types: NDArray[np.str_],
    predicted_HW: NDArray[np.int32],
    predicted_types: NDArray[np.str_],
) -> dict[str, float]:
    """Return PQ by type, among the nuclei that have the type: a nucleus mistyped is a miss there.

    As PanNuke and CellViT do for mPQ (Gamper et al. 2020, "PanNuke Dataset Extension", section on
    evaluation). Empty unless both sides have types.
    """
    shared = {*true_types.tolist()} & {*predicted_types.tolist()} - {UNKNOWN}
    if not shared:
        return {}
    found = {}
    for name in sorted({*true_types.tolist(), *predicted_types.tolist()} - {UNKNOWN}):
        maps = [
            np.where(np.concatenate([[False], types == name])[labels_HW], labels_HW, 0)
            for labels_HW, types in ((true_HW, true_types), (predicted_HW, predicted_types))
        ]
        found[name] = score_labels(maps[0], maps[1]).pq
    return found


def _inside(points_N2: NDArray[np.float64], size_px: tuple[float, ...] | None) -> NDArray[np.bool_]:
    """Tell which points lie in [0, width) x [0, height)."""
    if size_px is None:
        return np.ones(len(points_N2), np.bool_)
    return np.asarray(((points_N2 >= 0) & (points_N2 < np.array(size_px))).all(axis=1))


def summary(images: Sequence[ImageScores]) -> ImageScores:
    """Return the scores of several images as one.

    Counts of centroids and types add up. Scores of masks are means over the images that have
    them (a score that is not defined for an image does not count), and so is the PQ of a type.
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
    rows: list[dict[str, Any]] = [asdict(value) for value in masks]
    found: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        found[name] = sum(values) if name.startswith("num_") else _mean(values)
    return SegmentationScores(**found)


def _mean(values: Sequence[float]) -> float:
    """Return the mean of what is no NaN; NaN if nothing is left."""
    kept = [value for value in values if not np.isnan(value)]
    return float(np.mean(kept)) if kept else float("nan")


def as_dict(scores: ImageScores, *, typed: bool) -> dict[str, Any]:
    """Return scores as nested dicts of numbers, None for what is not defined.

    Args:
        scores: Of one image or several.
        typed: Annotation and prediction have types in common; else all that can be said of a
            type is how many of its nuclei were found.
    """
    found: dict[str, Any] = {}
    if scores.masks is not None:
        found["masks"] = asdict(scores.masks)
    if scores.centroids is not None:
        found["centroids"] = asdict(scores.centroids) | {
            name: getattr(scores.centroids, name) for name in ("precision", "recall", "f1")
        }
    if scores.type_pq:
        found["mpq"] = _mean(list(scores.type_pq.values()))
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
            found.setdefault("types", {})[name] = row
    return dict(_without_nan(found))


def _without_nan(value: Any) -> Any:  # noqa: ANN401 - walks nested dicts
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value
