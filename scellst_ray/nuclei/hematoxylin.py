"""Find nuclei without trained weights: local thresholds in the hematoxylin channel.

1. Pixels form blobs if their hematoxylin exceeds the slide's threshold and their surroundings.
2. Blobs are cut at their necks by the watershed of the distance to their edge.
3. Cuts through convex shapes are undone.
4. Every nucleus gets its own threshold, half-way between its inside and its surroundings.

Each step depends on a few nuclei around a pixel. Only the stain threshold depends on the whole
image; it can be passed in, so that all tiles of a slide share it. OD: optical density; H, W: rows,
columns; C: colour; N: labels, with entry 0 for the background; P: pixels.

The steps, and the numbers below with "tried" ranges, have the best F1 on three MoNuSeg images,
points of CRCHistoPhenotypes and a synthetic slide. Three further MoNuSeg images confirmed them.
"""

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from scellst_ray.nuclei.instances import Nuclei, nuclei_from_labels

# Optical density of hematoxylin, eosin and DAB in red, green, blue: Ruifrok and Johnston 2001,
# "Quantification of histochemical staining by color deconvolution", table 1.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
# Optical density of each 8-bit value; + 1 keeps black finite.
_DENSITY = -np.log10((np.arange(256) + 1) / 256).astype(np.float32)

_WORK_MPP = 0.5  # a 20x scan: four pixels across the thinnest nucleus
_COARSEST_MPP = 0.75  # five pixels across the smallest round nucleus
_SIGMA_UM = 0.5  # size of the chromatin texture
_LOCAL_SIGMA_UM = 5.0  # surroundings of a pixel, about two nuclei wide; tried 5 to 10
_MIN_STAIN = 0.1  # OD; weaker values are slide background and its noise
_SURE_STAIN = float(np.log10(2))  # OD; a pixel that absorbs half of the light is always stained
_MAX_STAIN = 1.7  # OD; an 8-bit camera measures little beyond it
_STEP = float(np.log10(128 / 127))  # OD; one step of 8 bits at half of the light
_PALE = 0.85  # share of the stain threshold that a pixel must exceed; tried 0.7 to 1
_MIN_CONTRAST = 1 / 3  # share of the stain threshold, inside over surroundings; tried 0 to 1/2
_MIN_DIAMETER_UM = 4.0  # small pyknotic or partly cut nuclei; lymphocytes have 6 to 8 um
_MAX_AREA_UM2 = 400.0  # a disc of 22.6 um, a large tumour nucleus
_MAX_HOLE_UM2 = 50.0  # a disc of 8 um, the pale inside of a vesicular nucleus
_CONVEX = 0.9  # least solidity of a convex shape; two equal touching discs have 0.88


def segment(image_HWC: NDArray[np.uint8], mpp: float) -> Nuclei:
    """Find the nuclei of an H&E image.

    Args:
        image_HWC: RGB image with a background near white, uint8 [H, W, 3].
        mpp: Resolution of the image in um per px, 0.1 to 1.2.

    Returns:
        The nuclei in px of the image, of type "nucleus". Their outlines have the detail of about
        0.5 um/px at most.

    Raises:
        ValueError: The image is not uint8 [H, W, 3], or mpp lies outside 0.1 to 1.2.
    """
    work_HWC, work_mpp = _work_image(image_HWC, mpp)
    labels_HW = _labels(work_HWC, work_mpp)
    ratio_y, ratio_x = np.array(image_HWC.shape[:2]) / np.maximum(work_HWC.shape[:2], 1)
    return nuclei_from_labels(labels_HW).resize(float(ratio_x), float(ratio_y))


def segment_labels(image_HWC: NDArray[np.uint8], mpp: float) -> NDArray[np.int32]:
    """Return the nuclei of `segment` as a label map, int32 [H, W], 0 = background."""
    work_HWC, work_mpp = _work_image(image_HWC, mpp)
    labels_HW = _labels(work_HWC, work_mpp)
    height, width = image_HWC.shape[:2]
    rows = np.arange(height) * labels_HW.shape[0] // max(height, 1)
    columns = np.arange(width) * labels_HW.shape[1] // max(width, 1)
    return np.asarray(labels_HW[rows[:, None], columns])


def _work_image(image_HWC: NDArray[np.uint8], mpp: float) -> tuple[NDArray[np.uint8], float]:
    """Check the image and resample it to about 0.5 um/px; return it and its um per px.

    The factors are whole numbers, so that all tiles of a slide are sampled alike.
    """
    if image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or image_HWC.dtype != np.uint8:
        message = f"image_HWC is {image_HWC.dtype} {image_HWC.shape}; expected uint8 [H, W, 3], RGB"
        raise ValueError(message)
    if not 0.1 <= mpp <= 1.2:
        message = f"mpp is {mpp}; expected 0.1 to 1.2 um/px: read another level of the slide"
        raise ValueError(message)
    height, width = image_HWC.shape[:2]
    shrink = round(_WORK_MPP / mpp)
    if min(height, width) == 0 or (shrink == 1 and mpp <= _COARSEST_MPP):
        return image_HWC, mpp
    if mpp > _COARSEST_MPP:
        doubled_HWC = cv2.resize(image_HWC, (2 * width, 2 * height), interpolation=cv2.INTER_LINEAR)
        return np.asarray(doubled_HWC), mpp / 2
    size = (-(-width // shrink), -(-height // shrink))
    return np.asarray(cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA)), mpp * shrink


def _labels(image_HWC: NDArray[np.uint8], mpp: float) -> NDArray[np.int32]:
    """Return the label map of an image at its working resolution."""
    if image_HWC.size == 0:
        return np.zeros(image_HWC.shape[:2], np.int32)
    density_HWC = _DENSITY[image_HWC]
    stain_HW = _blur(_hematoxylin(density_HWC), _SIGMA_UM / mpp)
    tissue_HW = _tissue(density_HWC)
    threshold = float(np.clip(_threshold(stain_HW, tissue_HW), _MIN_STAIN, _SURE_STAIN))
    labels_HW = _cut(_stain_mask(stain_HW, tissue_HW, threshold, mpp), mpp)
    labels_HW = _rejoin(labels_HW)
    # The second round corrects the first, whose surroundings hold the pale rims of nuclei.
    labels_HW, _ = _refine(labels_HW, stain_HW, mpp)
    labels_HW, contrast_N = _refine(labels_HW, stain_HW, mpp)
    mean_NC = _means(labels_HW.ravel(), density_HWC.reshape(-1, 3), len(contrast_N))
    likely_N = (contrast_N > _MIN_CONTRAST * threshold) & ~_is_ink(mean_NC)
    return _keep_nuclei(labels_HW, likely_N, mpp)


def _stain_mask(
    stain_HW: NDArray[np.float32], tissue_HW: NDArray[np.bool_], threshold: float, mpp: float
) -> NDArray[np.uint8]:
    """Return 1 where the stain exceeds the mean of the tissue around it, and in small holes.

    Large holes stay 0: they are lumens, or stroma between nuclei.
    """
    weight_HW = tissue_HW.astype(np.float32)
    sigma_px = _LOCAL_SIGMA_UM / mpp
    share_HW = np.maximum(_blur(weight_HW, sigma_px), 1e-3)
    mean_HW = _blur(stain_HW * weight_HW, sigma_px) / share_HW
    above_HW = (stain_HW > np.maximum(mean_HW + _STEP, _PALE * threshold)).view(np.uint8)
    outlines, tree = cv2.findContours(above_HW, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    holes = [
        outline
        for k, outline in enumerate(outlines)
        if tree[0, k, 3] >= 0 and cv2.contourArea(outline) * mpp**2 <= _MAX_HOLE_UM2
    ]
    return np.asarray(cv2.drawContours(above_HW, holes, -1, 1, cv2.FILLED))


def _cut(mask_HW: NDArray[np.uint8], mpp: float) -> NDArray[np.int32]:
    """Label the parts of a mask, cut where its distance to the background is least.

    This is a watershed by steepest ascent. Every pixel points to its highest neighbour, and a peak
    points to the highest pixel within the radius of the smallest nucleus. A part consists of the
    pixels whose paths end at one pixel.
    """
    depth_HW = np.asarray(cv2.distanceTransform(mask_HW, cv2.DIST_L2, 5), np.float32)
    height_HW = np.where(mask_HW > 0, _blur(depth_HW, _SIGMA_UM / mpp), np.float32(-1))
    disc = np.argwhere(_disc(_MIN_DIAMETER_UM / 2 / mpp))
    reach = int(disc.max()) // 2
    padded_HW = np.pad(height_HW, reach, constant_values=-1)
    to_flat = np.array([padded_HW.shape[1], 1])
    neighbours = (np.argwhere(np.ones((3, 3))) - 1) @ to_flat
    height = padded_HW.ravel()
    inside = np.flatnonzero(height >= 0).astype(np.int32)
    target = np.zeros(height.size, np.int32)
    target[inside] = _highest(height, inside, neighbours)
    peaks = inside[target[inside] == inside]
    target[peaks] = _highest(height, peaks, (disc - reach) @ to_flat)
    ends = target[inside]
    while not np.array_equal(ends, further := target[ends]):
        target[inside] = ends = further
    is_end = np.zeros(height.size, np.bool_)
    is_end[ends] = True
    number = np.cumsum(is_end, dtype=np.int32)  # from 1, in the order of the ends
    labels = np.zeros(height.size, np.int32)
    labels[inside] = number[ends]
    return labels.reshape(padded_HW.shape)[reach:-reach, reach:-reach]


def _highest(
    height: NDArray[np.float32], index: NDArray[np.int32], steps: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Return, for each index, the highest of index + steps; the first of equal ones.

    Choosing the first avoids circles: every target is higher, or equally high and earlier.
    """
    best = index + np.int32(steps.min())
    value = height[best]
    for step in np.sort(steps)[1:]:
        other = index + np.int32(step)
        other_value = height[other]
        higher = other_value > value
        best[higher], value[higher] = other[higher], other_value[higher]
    return best


def _rejoin(labels_HW: NDArray[np.int32]) -> NDArray[np.int32]:
    """Join pairs of touching parts that are convex together; best pairs first, each part once."""
    across = (labels_HW[:, :-1].ravel(), labels_HW[:, 1:].ravel())
    down = (labels_HW[:-1].ravel(), labels_HW[1:].ravel())
    first, second = np.concatenate([across, down], axis=1)
    touching = (first != second) & (first > 0) & (second > 0)
    pairs = np.sort(np.stack([first[touching], second[touching]], axis=1), axis=1)
    pairs = np.unique(pairs, axis=0)
    area_N = np.bincount(labels_HW.ravel())
    boxes = ndimage.find_objects(labels_HW)
    hulls = {label: _hull(labels_HW, label, boxes[label - 1]) for label in np.unique(pairs)}
    solidity = np.zeros(len(pairs))
    for k, (a, b) in enumerate(pairs):
        hull = cv2.convexHull(np.concatenate([hulls[a], hulls[b]]))
        hull_px = cv2.contourArea(hull) + cv2.arcLength(hull, closed=True) / 2 + 1
        solidity[k] = (area_N[a] + area_N[b]) / hull_px
    renamed_N = np.arange(len(area_N), dtype=np.int32)
    free_N = np.ones(len(area_N), np.bool_)
    for a, b in pairs[np.argsort(-solidity, kind="stable")][: int((solidity > _CONVEX).sum())]:
        if free_N[a] and free_N[b]:
            renamed_N[b] = a
            free_N[[a, b]] = False
    return np.asarray(renamed_N[labels_HW])


def _hull(labels_HW: NDArray[np.int32], label: int, box: tuple[slice, slice]) -> NDArray[np.int32]:
    """Return the K corners of a label's convex hull, pixel indices (x, y), int32 [K, 1, 2]."""
    points = cv2.findNonZero((labels_HW[box] == label).view(np.uint8))
    return np.asarray(cv2.convexHull(points + np.array([box[1].start, box[0].start], np.int32)))


def _refine(
    labels_HW: NDArray[np.int32], stain_HW: NDArray[np.float32], mpp: float
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Drop the pixels of each label whose stain is below the middle of inside and surroundings.

    The surroundings of a label are the background pixels nearest to it, up to the radius of a small
    nucleus.

    Returns:
        (new label map, stain inside minus stain of the surroundings, float64 [N]).
    """
    num = int(labels_HW.max()) + 1
    taken_HW = labels_HW > 0
    distance_HW, nearest_HW = cv2.distanceTransformWithLabels(
        (~taken_HW).view(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    owner = np.zeros(np.count_nonzero(taken_HW) + 1, np.int32)
    owner[nearest_HW[taken_HW]] = labels_HW[taken_HW]
    ring_HW = ~taken_HW & (distance_HW <= _MIN_DIAMETER_UM / 2 / mpp)
    outer_N = _means(owner[nearest_HW[ring_HW]], stain_HW[ring_HW][:, None], num)[:, 0]
    inner_N = _means(labels_HW[taken_HW], stain_HW[taken_HW][:, None], num)[:, 0]
    level_N = ((inner_N + outer_N) / 2).astype(np.float32)
    return np.where(stain_HW > level_N[labels_HW], labels_HW, 0), inner_N - outer_N


def _means(
    labels: NDArray[np.int32], values_PC: NDArray[np.float32], num: int
) -> NDArray[np.float64]:
    """Return the mean values of each label's pixels, float64 [num, C]; 0 for absent labels."""
    count = np.maximum(np.bincount(labels, minlength=num), 1)
    return np.stack([np.bincount(labels, values, num) / count for values in values_PC.T], axis=1)


def _keep_nuclei(
    labels_HW: NDArray[np.int32], likely_N: NDArray[np.bool_], mpp: float
) -> NDArray[np.int32]:
    """Keep the largest part of each likely label, holes filled, if it has a nucleus' size."""
    nuclei_HW = np.zeros_like(labels_HW)
    smallest_um2 = np.pi / 4 * _MIN_DIAMETER_UM**2
    for label, box in enumerate(ndimage.find_objects(labels_HW), start=1):
        if box is None or not likely_N[label]:
            continue
        mask_HW = (labels_HW[box] == label).view(np.uint8)
        outlines, _ = cv2.findContours(mask_HW, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        # Number of enclosed pixels (Pick's theorem).
        areas_px = [cv2.contourArea(outline) + len(outline) / 2 + 1 for outline in outlines]
        largest = int(np.argmax(areas_px))
        if smallest_um2 <= areas_px[largest] * mpp**2 <= _MAX_AREA_UM2:
            piece_HW = cv2.drawContours(np.zeros_like(mask_HW), outlines, largest, 1, cv2.FILLED)
            nuclei_HW[box][piece_HW > 0] = label
    return nuclei_HW


def _is_ink(mean_NC: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which mean ODs (red, green, blue) are those of green, black or blue ink, bool [N].

    Hematoxylin absorbs red and green about equally (at most 1.4 to 1 in frozen sections) and blue
    0.4 to 0.7 as much. Green ink absorbs mostly red, black ink all colours equally, and blue ink
    hardly any blue.
    """
    red, green, blue = mean_NC.T
    most = np.maximum(red, green)
    return np.asarray((red > 1.6 * green) | (blue > 0.95 * most) | (blue < 0.25 * most))


def _hematoxylin(density_HWC: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the OD of hematoxylin, float32 [H, W], at least 0."""
    unit_vectors = _STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True)
    weights = np.linalg.inv(unit_vectors)[:, :1].T
    return np.maximum(cv2.transform(density_HWC, weights.astype(np.float32)), 0)


def _tissue(density_HWC: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which pixels are tissue, bool [H, W]: at least one colour is absorbed."""
    red_HW, green_HW, blue_HW = cv2.split(density_HWC)
    return np.asarray(cv2.max(cv2.max(red_HW, green_HW), blue_HW) > _MIN_STAIN)


def _threshold(stain_HW: NDArray[np.float32], tissue_HW: NDArray[np.bool_]) -> float:
    """Return Otsu's threshold of the stain over the tissue; infinity without tissue."""
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
