"""Hold the nuclei of one image in columns, the result of every segmenter."""

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import ndimage

from scellst_ray.core.geometry import Frame
from scellst_ray.nuclei.outlines import edge_middles, pixel_chains, pixel_contour, run_offsets


@dataclass(frozen=True)
class Nuclei:
    """N nuclei of one image. All coordinates are px of that image, (x, y).

    Attributes:
        centroid_px: Centre of mass of the pixels, float64 [N, 2].
        area_px: Number of pixels, float64 [N].
        contour_points_px: Points of all outlines in turn, float64 [P, 2]. An outline is a simple
            polygon through the middles of the outer pixel edges, not closed, with at least 4
            points.
        contour_offsets: Starts of the outlines, int64 [N + 1]; outline i is
            points[offsets[i]:offsets[i + 1]].
        nucleus_type: Name of each nucleus' type, never a number, str [N] (object or unicode).
        type_prob: Probability of the type, float32 [N]; NaN if the segmenter gives none.
    """

    centroid_px: NDArray[np.float64]
    area_px: NDArray[np.float64]
    contour_points_px: NDArray[np.float64]
    contour_offsets: NDArray[np.int64]
    nucleus_type: NDArray[np.str_]
    type_prob: NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of nuclei."""
        return len(self.area_px)

    def take(self, index: NDArray[np.integer]) -> "Nuclei":
        """Return the nuclei at `index`, int [M], in that order."""
        index = np.asarray(index, np.int64)
        lengths = np.diff(self.contour_offsets)[index]
        offsets = run_offsets(lengths)
        shift = self.contour_offsets[index] - offsets[:-1]
        return Nuclei(
            centroid_px=self.centroid_px[index],
            area_px=self.area_px[index],
            contour_points_px=self.contour_points_px[
                np.arange(offsets[-1]) + np.repeat(shift, lengths)
            ],
            contour_offsets=offsets,
            nucleus_type=self.nucleus_type[index],
            type_prob=self.type_prob[index],
        )

    def resize(self, ratio_x: float, ratio_y: float) -> "Nuclei":
        """Return the same nuclei in px of an image that is resized by these factors."""
        scale = np.array([ratio_x, ratio_y])
        return Nuclei(
            centroid_px=self.centroid_px * scale,
            area_px=self.area_px * (ratio_x * ratio_y),
            contour_points_px=self.contour_points_px * scale,
            contour_offsets=self.contour_offsets,
            nucleus_type=self.nucleus_type,
            type_prob=self.type_prob,
        )

    def boxes_px(self) -> NDArray[np.int64]:
        """Return each outline's box in px, int64 [N, 4]: x0, y0, x1, y1, ends exclusive."""
        if len(self) == 0:
            return np.zeros((0, 4), np.int64)
        start = self.contour_offsets[:-1]
        low = np.floor(np.minimum.reduceat(self.contour_points_px, start))
        high = np.ceil(np.maximum.reduceat(self.contour_points_px, start))
        return np.concatenate([low, high], axis=1).astype(np.int64)

    def polygon_wkb(self, frame: Frame) -> NDArray[np.object_]:
        """Return the outlines as closed WKB polygons, bytes [N], in level-0 px.

        Args:
            frame: Frame of the nuclei's image on its slide.
        """
        indices = np.repeat(np.arange(len(self)), np.diff(self.contour_offsets))
        points_x0y0 = frame.to_level0(self.contour_points_px)
        rings = shapely.linearrings(points_x0y0, indices=indices)
        return np.asarray(shapely.to_wkb(shapely.polygons(rings)), np.object_)


def empty_nuclei() -> Nuclei:
    """Return nuclei of length 0, with the dtypes of all columns."""
    return Nuclei(
        centroid_px=np.zeros((0, 2)),
        area_px=np.zeros(0),
        contour_points_px=np.zeros((0, 2)),
        contour_offsets=np.zeros(1, np.int64),
        nucleus_type=np.zeros(0, np.str_),
        type_prob=np.zeros(0, np.float32),
    )


def nuclei_from_labels(
    labels_HW: NDArray[np.integer],
    nucleus_type: str | NDArray[np.str_] = "nucleus",
    type_prob: NDArray[np.float32] | None = None,
    *,
    drop_lines: bool = False,
) -> Nuclei:
    """Turn a label map into nuclei, sorted by centroid (y, then x).

    The outline of a nucleus is that of its largest 8-connected part, holes filled. Its area is the
    number of the part's filled pixels minus half a pixel, for any shape.

    Args:
        labels_HW: Label map, integer [H, W]: 0 is background, labels may have gaps.
        nucleus_type: Name of all nuclei's type, or one name per label, ascending, [N].
        type_prob: Probability per label, ascending, [N]; None gives NaN.
        drop_lines: Whether labels whose `pixel_contour` has fewer than 3 points are left out.

    Raises:
        ValueError: The map is not an integer array [H, W], or holds labels below 0.
    """
    compact_HW, area, centroid = _compact(labels_HW)
    num = len(area)
    if num == 0:
        return empty_nuclei()
    boxes = ndimage.find_objects(compact_HW)
    order = np.lexsort((centroid[:, 0], centroid[:, 1]))
    chains, is_broken = pixel_chains(compact_HW, boxes, order)
    points, lengths = edge_middles(np.concatenate(chains), np.array([len(c) for c in chains]))
    names = np.full(num, nucleus_type) if isinstance(nucleus_type, str) else nucleus_type
    shares = np.full(num, np.nan, np.float32) if type_prob is None else type_prob
    nuclei = Nuclei(
        centroid_px=centroid[order],
        area_px=area[order],
        contour_points_px=points,
        contour_offsets=run_offsets(lengths),
        nucleus_type=names[order],
        type_prob=shares[order],
    )
    if not drop_lines:
        return nuclei
    is_line = _are_lines(compact_HW, boxes, area, is_broken)[order]
    return nuclei.take(np.flatnonzero(~is_line)) if is_line.any() else nuclei


def _are_lines(
    compact_HW: NDArray[np.int32],
    boxes: list[tuple[slice, slice]],
    area: NDArray[np.float64],
    is_broken: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Return which labels, bool [N], have pixel contours of fewer than three points.

    Only labels of several parts, and labels with no more pixels than their length, can have them.
    """
    length = np.array([max(axis.stop - axis.start for axis in box) for box in boxes])
    is_line = np.zeros(len(boxes), np.bool_)
    for index in np.flatnonzero(is_broken | (area <= length)):
        is_line[index] = len(pixel_contour(compact_HW, int(index), boxes[index])) < 3
    return is_line


def _compact(
    labels_HW: NDArray[np.integer],
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """Number the labels from 1 in their order.

    Returns:
        (new label map, int32 [H, W]; number of pixels per label, float64 [N]; mean position (x, y)
        of the pixels, float64 [N, 2]).

    Raises:
        ValueError: The map is not an integer array [H, W], or holds labels below 0.
    """
    if labels_HW.ndim != 2 or not np.issubdtype(labels_HW.dtype, np.integer):
        message = (
            f"labels_HW is {labels_HW.dtype} {labels_HW.shape}; expected an integer label map "
            "[H, W] with 0 for background"
        )
        raise ValueError(message)
    pixels = np.flatnonzero(labels_HW)
    label = labels_HW.ravel()[pixels]
    lowest, highest = int(label.min(initial=0)), int(label.max(initial=0))
    if lowest < 0:
        message = f"labels_HW holds the label {lowest}; expected 0 for background and labels above"
        raise ValueError(message)
    label = label.astype(np.intp, copy=False)
    if highest <= labels_HW.size:
        used = np.bincount(label, minlength=1) > 0
        used[0] = True
        renamed = label if used.all() else (np.cumsum(used) - 1)[label]
    else:  # a table of all numbers up to the highest would be large
        renamed = np.unique(label, return_inverse=True)[1] + 1
    compact_HW = labels_HW
    if renamed is not label:
        compact_HW = np.zeros(labels_HW.shape, np.int32)
        compact_HW.ravel()[pixels] = renamed
    area = np.bincount(renamed, minlength=1)[1:].astype(np.float64)
    y = pixels // max(labels_HW.shape[1], 1)
    x = pixels - y * labels_HW.shape[1]
    sums = np.stack([np.bincount(renamed, p, minlength=1)[1:] for p in (x, y)], axis=1)
    return compact_HW.astype(np.int32, copy=False), area, sums / area[:, None] + 0.5
