"""The nuclei of one image, in columns: the value every segmenter returns."""

from dataclasses import dataclass

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import ndimage

from scellst_ray.geometry import Frame

# The eight neighbours of a pixel, (dx, dy), turning from +x towards +y. Even: across an edge.
_STEPS = np.array([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])
_STEP_CODE = np.array([[5, 6, 7], [4, -1, 0], [3, 2, 1]])  # [dy + 1, dx + 1] -> row of _STEPS


@dataclass(frozen=True)
class Nuclei:
    """N nuclei of one image. All coordinates are px of that image, (x, y).

    Attributes:
        centroid_px: float64 [N, 2], centre of mass of the pixels.
        area_px: float64 [N], number of pixels.
        contour_points_px: float64 [P, 2], all outlines one after the other, not closed, through
            the middles of the outer pixel edges (at least 4 points each), a simple polygon.
        contour_offsets: int64 [N + 1]; outline i is points[offsets[i]:offsets[i + 1]].
        nucleus_type: str [N] (numpy object or unicode array), a name, never a number.
        type_prob: float32 [N], NaN where the segmenter gives none.
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
        offsets = _offsets(lengths)
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

    def scaled(self, ratio_x: float, ratio_y: float) -> "Nuclei":
        """Return the same nuclei in px of an image resized by these factors."""
        scale = np.array([ratio_x, ratio_y])
        return Nuclei(
            centroid_px=self.centroid_px * scale,
            area_px=self.area_px * (ratio_x * ratio_y),
            contour_points_px=self.contour_points_px * scale,
            contour_offsets=self.contour_offsets,
            nucleus_type=self.nucleus_type,
            type_prob=self.type_prob,
        )

    def polygon_wkb(self, frame: Frame) -> NDArray[np.object_]:
        """Return the outlines as closed WKB polygons, bytes [N], in level-0 px.

        Args:
            frame: Where the image these nuclei were found in lies on its slide.
        """
        indices = np.repeat(np.arange(len(self)), np.diff(self.contour_offsets))
        points_x0y0 = frame.to_level0(self.contour_points_px)
        rings = shapely.linearrings(points_x0y0, indices=indices)
        return np.asarray(shapely.to_wkb(shapely.polygons(rings)), np.object_)


def empty_nuclei() -> Nuclei:
    """Return no nuclei, with every column in its type."""
    return Nuclei(
        centroid_px=np.zeros((0, 2)),
        area_px=np.zeros(0),
        contour_points_px=np.zeros((0, 2)),
        contour_offsets=np.zeros(1, np.int64),
        nucleus_type=np.zeros(0, np.str_),
        type_prob=np.zeros(0, np.float32),
    )


def nuclei_from_labels(labels_HW: NDArray[np.integer], nucleus_type: str = "nucleus") -> Nuclei:
    """Turn a label map into nuclei, sorted by centroid (y, then x).

    The outline of a nucleus is that of its largest 8-connected part, holes filled; it encloses
    half a pixel less than the part's (filled) number of pixels, whatever its shape.

    Args:
        labels_HW: Integer [H, W], 0 = background; labels need not be consecutive.
        nucleus_type: The name given to every nucleus.

    Raises:
        ValueError: If the map is not an integer array [H, W], or holds labels below 0.
    """
    if labels_HW.ndim != 2 or not np.issubdtype(labels_HW.dtype, np.integer):
        message = (
            f"labels_HW is {labels_HW.dtype} {labels_HW.shape}; expected an integer label map "
            "[H, W] with 0 for background"
        )
        raise ValueError(message)
    y, x = np.nonzero(labels_HW)
    if len(y) == 0:
        return empty_nuclei()
    names, flat = np.unique(labels_HW[y, x], return_inverse=True)
    if names[0] < 0:
        message = f"labels_HW holds the label {names[0]}; expected 0 for background, then 1, 2, .."
        raise ValueError(message)
    compact_HW = np.zeros(labels_HW.shape, np.int32)
    compact_HW[y, x] = flat + 1
    area = np.bincount(flat).astype(np.float64)
    centroid = np.stack([np.bincount(flat, x), np.bincount(flat, y)], axis=1) / area[:, None] + 0.5
    order = np.lexsort((centroid[:, 0], centroid[:, 1]))
    chains = _pixel_chains(compact_HW, order)
    points, lengths = _edge_middles(np.concatenate(chains), np.array([len(c) for c in chains]))
    return Nuclei(
        centroid_px=centroid[order],
        area_px=area[order],
        contour_points_px=points,
        contour_offsets=_offsets(lengths),
        nucleus_type=np.full(len(area), nucleus_type),
        type_prob=np.full(len(area), np.nan, np.float32),
    )


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each of consecutive runs of these lengths begins, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _pixel_chains(
    compact_HW: NDArray[np.int32], order: NDArray[np.integer]
) -> list[NDArray[np.int32]]:
    """Return each label's outer boundary pixels, (x, y) indices, in the order given.

    Looks only at the label's bounding box, so the cost is that of the nuclei, not of the map
    times their number.
    """
    boxes = ndimage.find_objects(compact_HW)
    chains = []
    for index in order:
        rows, columns = boxes[index]
        mask = (compact_HW[rows, columns] == index + 1).view(np.uint8)
        found, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        # By pixels enclosed (Pick's theorem), so that a line of pixels outranks a single one.
        part = max(found, key=lambda c: cv2.contourArea(c) + len(c) / 2) if found[1:] else found[0]
        chains.append(part[:, 0] + np.array([columns.start, rows.start], np.int32))
    return chains


def _edge_middles(
    pixels: NDArray[np.int32], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Turn chains of boundary pixels into outlines through the middles of their outer edges.

    At every pixel the neighbours passed over when turning from the previous pixel of the chain
    to the next lie outside; each of them across an edge gives a point. The outline is the one
    marching squares draws at 0.5 (Lorensen and Cline 1987, in the plane): convex corners lose
    1/8 px2, concave ones gain it, and a closed curve has four more of the first, hence the half
    pixel. Points on a straight run are dropped.

    Args:
        pixels: int [B, 2], (x, y) indices, all chains one after the other as OpenCV orders them.
        lengths: int [N], pixels per chain.

    Returns:
        The points, float64 [P, 2], in continuous coordinates, and their number per chain.
    """
    chain = np.repeat(np.arange(len(lengths)), lengths)
    start = _offsets(lengths)[:-1]
    following = np.arange(len(pixels)) + 1
    following[start + lengths - 1] = start
    step = pixels[following] - pixels
    ahead = _STEP_CODE[step[:, 1] + 1, step[:, 0] + 1]
    back = np.empty_like(ahead)
    back[following] = (ahead + 4) % 8
    alone = ahead < 0
    ahead[alone], back[alone] = 1, 1  # a single pixel: pass over all of its neighbours
    # OpenCV follows outer boundaries counter-clockwise as seen on screen (y down), with the
    # outside on the right hand: from the previous pixel to the next against the order of _STEPS.
    turn = (back - ahead - 1) % 8 + 1
    codes = back[:, None] - np.arange(1, 8)
    outside = (np.arange(1, 8) < turn[:, None]) & (codes % 2 == 0)
    row, column = np.nonzero(outside)
    code = codes[row, column] % 8
    points = pixels[row] + 0.5 + 0.5 * _STEPS[code]
    return _without_straight_runs(points, np.bincount(chain[row], minlength=len(lengths)))


def _without_straight_runs(
    points: NDArray[np.float64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Drop the points of closed outlines that lie on the line between their neighbours."""
    start = _offsets(lengths)[:-1]
    following = np.arange(len(points)) + 1
    following[start + lengths - 1] = start
    step = points[following] - points
    before = np.empty_like(step)
    before[following] = step
    corner = (step != before).any(axis=1)
    chain = np.repeat(np.arange(len(lengths)), lengths)
    return points[corner], np.bincount(chain[corner], minlength=len(lengths))
