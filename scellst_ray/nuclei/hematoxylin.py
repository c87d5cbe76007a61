"""Nuclei without trained weights: closed outlines in the hematoxylin channel.

A nucleus is a region darker in hematoxylin than its surroundings, with a convex outline and a
steep edge all along it. Many level sets of the channel, whole and cut where nuclei touch, give
candidate regions; each is scored by its outline alone, and the best that do not overlap are kept
(in the spirit of the extremal regions of Arteta et al. 2012, "Learning to Detect Cells Using
Non-overlapping Extremal Regions", with a closed-form score in place of a learnt one). Levels are
absolute and steps look a few um around themselves, but for the stain threshold, which may be
given, so that all tiles of a slide share it. H, W: rows, columns; C: colour; K: candidates.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import watershed

from scellst_ray.nuclei.instances import Nuclei, nuclei_from_labels

# Optical density of hematoxylin, eosin and DAB in red, green, blue: Ruifrok and Johnston 2001,
# "Quantification of histochemical staining by color deconvolution", table 1.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
# Optical density of each 8-bit value; + 1 keeps black finite.
_DENSITY = -np.log10((np.arange(256) + 1) / 256).astype(np.float32)

_WORK_MPP = 0.5  # a 20x scan: half the pixels across the thinnest nucleus still make four
_FINE_SIGMA_UM = 0.35  # noise of single pixels, edges kept
_SIGMA_UM = 0.5  # chromatin texture
_MIN_STAIN = 0.1  # OD; weaker than this is slide background and its noise
_SURE_STAIN = float(np.log10(2))  # OD; what halves the light is stained, whatever the rest is
_MAX_STAIN = 1.7  # OD; an 8-bit camera measures little beyond it
_LEVEL_RATIO = 1.15  # step between levels: finer ones find no more (1.07 and 1.1 tried)
_MIN_DIAMETER_UM = 4.0  # small pyknotic or glancingly cut nuclei; lymphocytes have 6 to 8
_MAX_AREA_UM2 = 400.0  # a disc of 22.6 um: large tumour nuclei
_MIN_WIDTH_UM = 2.0  # a fibroblast nucleus seen from the side
_MIN_SOLIDITY = 0.85  # below 0.88, that of two equal discs that merely touch
_EDGE_WIDTH_UM = 3.0  # an edge must fall at the rate of the stain threshold per this length
_MIN_FREE = 0.8  # share of a candidate that better ones have left


def segment(
    image_HWC: NDArray[np.uint8], mpp: float, stain_threshold: float | None = None
) -> Nuclei:
    """Find the nuclei of an H&E image.

    Args:
        image_HWC: uint8 [H, W, 3], RGB, background near white.
        mpp: um per px of the image, 0.1 to 1.2.
        stain_threshold: Hematoxylin OD that separates nuclei from the rest, best from
            `hematoxylin_threshold` of a larger piece of the slide; from this image when None.

    Returns:
        The nuclei in px of the image, of type "nucleus", with the detail of 0.5 um/px at most.

    Raises:
        ValueError: If the image is not uint8 [H, W, 3] or mpp lies outside 0.1 to 1.2.
    """
    work_HWC, work_mpp = _work_image(image_HWC, mpp)
    labels_HW = _labels(work_HWC, work_mpp, stain_threshold)
    ratio_y, ratio_x = np.array(image_HWC.shape[:2]) / np.maximum(work_HWC.shape[:2], 1)
    return nuclei_from_labels(labels_HW).scaled(float(ratio_x), float(ratio_y))


def segment_labels(
    image_HWC: NDArray[np.uint8], mpp: float, stain_threshold: float | None = None
) -> NDArray[np.int32]:
    """Return the nuclei of `segment` as a label map, int32 [H, W], 0 = background."""
    work_HWC, work_mpp = _work_image(image_HWC, mpp)
    labels_HW = _labels(work_HWC, work_mpp, stain_threshold)
    height, width = image_HWC.shape[:2]
    rows = np.arange(height) * labels_HW.shape[0] // max(height, 1)
    columns = np.arange(width) * labels_HW.shape[1] // max(width, 1)
    return np.asarray(labels_HW[rows[:, None], columns])


def hematoxylin_threshold(image_HWC: NDArray[np.uint8], mpp: float) -> float:
    """Return the hematoxylin OD that best separates an image's tissue in two (Otsu 1979)."""
    work_HWC, work_mpp = _work_image(image_HWC, mpp)
    density_HWC = _DENSITY[work_HWC]
    stain_HW = _blur(_hematoxylin(density_HWC), _SIGMA_UM / work_mpp)
    return _threshold(stain_HW, density_HWC)


def _work_image(image_HWC: NDArray[np.uint8], mpp: float) -> tuple[NDArray[np.uint8], float]:
    """Check the image and shrink it to 0.5 um/px where finer; return it and its um/px."""
    if image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or image_HWC.dtype != np.uint8:
        message = f"image_HWC is {image_HWC.dtype} {image_HWC.shape}; expected uint8 [H, W, 3], RGB"
        raise ValueError(message)
    if not 0.1 <= mpp <= 1.2:
        message = f"mpp is {mpp}; expected 0.1 to 1.2 um/px: read another level of the slide"
        raise ValueError(message)
    height, width = image_HWC.shape[:2]
    if mpp >= _WORK_MPP or min(height, width) == 0:
        return image_HWC, mpp
    size = tuple(max(round(side * mpp / _WORK_MPP), 1) for side in (width, height))
    return np.asarray(cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA)), _WORK_MPP


def _labels(
    image_HWC: NDArray[np.uint8], mpp: float, stain_threshold: float | None
) -> NDArray[np.int32]:
    """Return the label map of an image at its working resolution."""
    none_HW = np.zeros(image_HWC.shape[:2], np.int32)
    if none_HW.size == 0:
        return none_HW
    density_HWC = _DENSITY[image_HWC]
    stain_HW = _hematoxylin(density_HWC)
    smooth_HW = _blur(stain_HW, _SIGMA_UM / mpp)
    if stain_threshold is None:
        stain_threshold = _threshold(smooth_HW, density_HWC)
    threshold = float(np.clip(stain_threshold, _MIN_STAIN, _SURE_STAIN))
    if smooth_HW.max() <= threshold:
        return none_HW
    chains = _candidates(stain_HW, smooth_HW, threshold, mpp)
    chains, score_K = _scored(chains, smooth_HW, density_HWC, threshold, mpp)
    return _best_disjoint(chains, score_K, smooth_HW.shape)


def _hematoxylin(density_HWC: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the hematoxylin share of the optical density, float32 [H, W], not below 0."""
    unit_vectors = _STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True)
    weights = np.linalg.inv(unit_vectors)[:, :1].T
    return np.maximum(cv2.transform(density_HWC, weights.astype(np.float32)), 0)


def _threshold(stain_HW: NDArray[np.float32], density_HWC: NDArray[np.float32]) -> float:
    """Return Otsu's threshold of the stain over tissue, glass left out; infinity without any."""
    tissue_HW = density_HWC.max(axis=2) > _MIN_STAIN
    if not tissue_HW.any():
        return float("inf")
    scale = 255 / _MAX_STAIN
    values = np.minimum(stain_HW[tissue_HW] * scale, 255).astype(np.uint8)
    level, _ = cv2.threshold(values, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return float(level + 1) / scale


def _blur(values_HW: NDArray[np.float32], sigma_px: float) -> NDArray[np.float32]:
    """Return a Gaussian blur, mirrored at the border."""
    return np.asarray(cv2.GaussianBlur(values_HW, (0, 0), sigma_px, borderType=cv2.BORDER_REFLECT))


def _disc(radius_px: float) -> NDArray[np.uint8]:
    """Return a disc-shaped structuring element of odd side."""
    reach = int(radius_px)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return np.asarray(x * x + y * y <= radius_px * radius_px, np.uint8)


def _candidates(
    stain_HW: NDArray[np.float32], smooth_HW: NDArray[np.float32], threshold: float, mpp: float
) -> list[NDArray[np.int32]]:
    """Return the outer boundaries of all regions worth scoring, pixel chains [B, 2].

    Three stacks of level sets: the finely smoothed stain, cut at necks; the smooth stain, cut
    between dark cores; and cut at necks at a lower and a higher threshold (pale, dark clumps).
    """
    fine_HW = _blur(stain_HW, _FINE_SIGMA_UM / mpp)
    core_HW = _blur(stain_HW, 1.5 / mpp)
    by_core_HW = _ridge_cut(core_HW, smooth_HW > threshold / 2, np.ones((3, 3), np.uint8))
    by_shape_HW = _shape_cut(smooth_HW, threshold, mpp)
    by_range_HW = _shape_cut(smooth_HW, 0.8 * threshold, mpp)
    by_range_HW &= _shape_cut(smooth_HW, 1.25 * threshold, mpp)
    fine_disc, disc = _disc(0.7 / mpp), _disc(1.0 / mpp)
    chains = _level_sets(fine_HW, by_shape_HW, fine_disc, mpp)
    chains += _level_sets(smooth_HW, by_core_HW, disc, mpp)
    return chains + _level_sets(smooth_HW, by_range_HW, disc, mpp)


def _level_sets(
    values_HW: NDArray[np.float32],
    keep_HW: NDArray[np.uint8],
    element: NDArray[np.uint8],
    mpp: float,
) -> list[NDArray[np.int32]]:
    """Return the outer boundaries of the parts of all level sets, opened by the element."""
    num_levels = int(np.log(_MAX_STAIN / _MIN_STAIN) / np.log(_LEVEL_RATIO)) + 1
    # Boundary pixels: from 0.8 of the smallest disc's circumference to twice the largest's.
    shortest = 0.8 * np.pi * (_MIN_DIAMETER_UM / mpp - 1)
    longest = 2 * np.sqrt(4 * np.pi * _MAX_AREA_UM2) / mpp
    chains: list[NDArray[np.int32]] = []
    for level in _MIN_STAIN * _LEVEL_RATIO ** np.arange(num_levels):
        above_HW = (values_HW >= level).view(np.uint8)
        if not above_HW.any():
            break
        opened_HW = cv2.morphologyEx(above_HW & keep_HW, cv2.MORPH_OPEN, element)
        found, _ = cv2.findContours(opened_HW, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        chains += [
            np.asarray(chain[:, 0], np.int32)
            for chain in found
            if shortest <= len(chain) <= longest
        ]
    return chains


def _ridge_cut(
    height_HW: NDArray[np.float32], mask_HW: NDArray[np.bool_], window: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Return 0 on watershed lines between peaks, the highest of their window; 1 elsewhere."""
    peaks_HW = (cv2.dilate(height_HW, window) <= height_HW) & mask_HW
    _, markers_HW = cv2.connectedComponents(peaks_HW.view(np.uint8))
    basins_HW = watershed(  # type: ignore[no-untyped-call]
        -height_HW, markers_HW, mask=mask_HW, watershed_line=True
    )
    return np.asarray((basins_HW > 0) | ~mask_HW, np.uint8)


def _shape_cut(smooth_HW: NDArray[np.float32], threshold: float, mpp: float) -> NDArray[np.uint8]:
    """Return 0 on lines that split merged shapes at their necks, 1 elsewhere."""
    above_HW = cv2.morphologyEx(
        (smooth_HW > threshold).view(np.uint8), cv2.MORPH_OPEN, _disc(1.0 / mpp)
    )
    outlines, _ = cv2.findContours(above_HW, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(above_HW, outlines, -1, 1, cv2.FILLED)
    depth_HW = np.asarray(cv2.distanceTransform(above_HW, cv2.DIST_L2, 5), np.float32)
    # Two peaks within the radius of the smallest nucleus belong to one.
    window = _disc(_MIN_DIAMETER_UM / 2 / mpp)
    return _ridge_cut(_blur(depth_HW, _SIGMA_UM / mpp), above_HW.view(np.bool_), window)


@dataclass(frozen=True)
class _Shapes:
    """What closed pixel chains enclose.

    Attributes:
        offsets: int64 [K], where each chain begins.
        pixels: int64 [B, 2], all chains, (x, y) indices.
        area_px: float64 [K], pixels enclosed, boundary included (Pick's theorem).
        centre: float64 [K, 2], centre of mass of the polygon through the boundary pixels.
        width_px: float64 [K], full minor axis of the ellipse with the same second moments.
        inner_mean: float64 [K], mean of the values inside.
    """

    offsets: NDArray[np.int64]
    pixels: NDArray[np.int64]
    area_px: NDArray[np.float64]
    centre: NDArray[np.float64]
    width_px: NDArray[np.float64]
    inner_mean: NDArray[np.float64]


def _shapes(chains: list[NDArray[np.int32]], values_HW: NDArray[np.float32]) -> _Shapes:
    """Measure what the chains enclose: each integral over an area as one along its boundary."""
    lengths = np.array([len(chain) for chain in chains])
    offsets = np.cumsum(lengths) - lengths
    pixels = np.concatenate(chains).astype(np.int64)
    origin = pixels[offsets]
    following = np.arange(len(pixels)) + 1
    following[offsets + lengths - 1] = offsets
    x0, y0 = (pixels - np.repeat(origin, lengths, axis=0)).T.astype(np.float64)
    x1, y1 = x0[following], y0[following]
    cross = x0 * y1 - x1 * y0
    double = np.add.reduceat(cross, offsets)
    inverse = np.divide(1, double, out=np.zeros_like(double), where=double != 0)
    mean_x = np.add.reduceat((x0 + x1) * cross, offsets) * inverse / 3
    mean_y = np.add.reduceat((y0 + y1) * cross, offsets) * inverse / 3
    var_x = np.add.reduceat((x0 * x0 + x0 * x1 + x1 * x1) * cross, offsets) * inverse / 6
    var_y = np.add.reduceat((y0 * y0 + y0 * y1 + y1 * y1) * cross, offsets) * inverse / 6
    mixed = x0 * y1 + 2 * x0 * y0 + 2 * x1 * y1 + x1 * y0
    covariance = np.add.reduceat(mixed * cross, offsets) * inverse / 12 - mean_x * mean_y
    var_x, var_y = var_x - mean_x**2, var_y - mean_y**2
    spread = np.sqrt((var_x - var_y) ** 2 / 4 + covariance**2)
    # The integral of f over an area is that of its antiderivative in x along the boundary, dy.
    summed_HW = np.cumsum(values_HW, axis=1, dtype=np.float64) - values_HW / 2
    along = summed_HW[pixels[:, 1], pixels[:, 0]]
    total = np.add.reduceat((along + along[following]) * (y1 - y0), offsets)
    return _Shapes(
        offsets=offsets,
        pixels=pixels,
        area_px=np.abs(double) / 2 + lengths / 2 + 1,
        centre=np.stack([mean_x, mean_y], axis=1) + origin,
        # + 1: the polygon runs through pixel centres, half a pixel inside the region's edge.
        width_px=4 * np.sqrt(np.maximum((var_x + var_y) / 2 - spread, 0)) + 1,
        inner_mean=total * inverse,
    )


def _scored(
    chains: list[NDArray[np.int32]],
    smooth_HW: NDArray[np.float32],
    density_HWC: NDArray[np.float32],
    threshold: float,
    mpp: float,
) -> tuple[list[NDArray[np.int32]], NDArray[np.float64]]:
    """Return the candidates that may be nuclei, and how well each one's outline fits.

    The score is the energy of the edge along the outline, diameter times squared gradient, times
    solidity^10: with this power the halves of a clump of two equal discs, each 1 against the
    clump's area^(1/2) solidity^10, win down to a distance of their centres of 1.2 radii.
    """
    if not chains:
        return [], np.zeros(0)
    shapes = _shapes(chains, smooth_HW)
    lengths = np.array([len(chain) for chain in chains])
    gradient_HW = cv2.magnitude(
        cv2.Sobel(smooth_HW, cv2.CV_32F, 1, 0), cv2.Sobel(smooth_HW, cv2.CV_32F, 0, 1)
    )
    gradient = (
        np.add.reduceat(gradient_HW[shapes.pixels[:, 1], shapes.pixels[:, 0]], shapes.offsets)
        / lengths
        / (8 * mpp)
    )
    area_um2 = shapes.area_px * mpp**2
    likely = (area_um2 >= np.pi / 4 * _MIN_DIAMETER_UM**2) & (area_um2 <= _MAX_AREA_UM2)
    likely &= shapes.width_px * mpp >= _MIN_WIDTH_UM
    likely &= shapes.inner_mean > threshold
    likely &= gradient > threshold / _EDGE_WIDTH_UM
    likely &= ~_is_ink(shapes.centre, density_HWC)
    solidity = np.zeros(len(chains))
    for index in np.flatnonzero(likely):
        hull_area = cv2.contourArea(cv2.convexHull(chains[index]))
        solidity[index] = cv2.contourArea(chains[index]) / max(hull_area, 1e-9)
    kept = np.flatnonzero(solidity >= _MIN_SOLIDITY)
    score = np.sqrt(area_um2[kept]) * gradient[kept] ** 2 * solidity[kept] ** 10
    return [chains[index] for index in kept], score


def _is_ink(centre: NDArray[np.float64], density_HWC: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which points, float [K, 2] (x, y), lie in green, black or blue ink.

    Hematoxylin absorbs red and green about alike (at most 1.4 to 1 in frozen sections) and blue
    0.4 to 0.7 as much. Green ink absorbs red most, black all colours alike, blue hardly blue.
    """
    height, width = density_HWC.shape[:2]
    x, y = np.clip(np.rint(centre).astype(np.int64), 0, (width - 1, height - 1)).T
    red, green, blue = density_HWC[y, x].T
    most = np.maximum(red, green)
    return np.asarray((red > 1.6 * green) | (blue > 0.95 * most) | (blue < 0.25 * most))


def _best_disjoint(
    chains: list[NDArray[np.int32]], score_K: NDArray[np.float64], shape: tuple[int, ...]
) -> NDArray[np.int32]:
    """Paint candidates, best first, whose middle and most of whose area is free."""
    labels_HW = np.zeros(shape, np.int32)
    label = 0
    for index in np.argsort(-score_K, kind="stable"):
        chain = chains[index]
        left, top, width, height = cv2.boundingRect(chain)
        if labels_HW[top + height // 2, left + width // 2]:
            continue  # most candidates end here, cheaply
        mask_HW = np.zeros((height, width), np.uint8)
        cv2.drawContours(mask_HW, [chain - (left, top)], -1, 1, cv2.FILLED)
        window_HW = labels_HW[top : top + height, left : left + width]
        free_HW = mask_HW.view(np.bool_) & (window_HW == 0)
        if np.count_nonzero(free_HW) >= _MIN_FREE * np.count_nonzero(mask_HW):
            label += 1
            window_HW[free_HW] = label
    return labels_HW
