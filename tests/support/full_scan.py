"""CellViT's post-processing written plainly: whole maps, one full scan and one dict per nucleus.

From the description of the published steps, with SciPy and NumPy where the package uses OpenCV.
"""

import cv2
import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed


def without_small(labels, least):
    """Labels of fewer pixels become 0."""
    small = np.bincount(labels.ravel()) < least
    return np.where(small[labels], 0, labels)


def scaled(values):
    return cv2.normalize(values, None, 0, 1, cv2.NORM_MINMAX, cv2.CV_32F)


def edge_energy(hv):
    """1 at the steepest fall, 0 at the steepest rise, float32."""
    across = cv2.Sobel(scaled(hv[0]), cv2.CV_64F, 1, 0, ksize=21)
    down = cv2.Sobel(scaled(hv[1]), cv2.CV_64F, 0, 1, ksize=21)
    return np.maximum(1 - scaled(across), 1 - scaled(down))


def instance_map(nucleus, energy):
    """Steps 2 and 4 to 6: from 0/1 [H, W] and edge energy [H, W] to labels 1..n."""
    blob = (without_small(ndimage.label(nucleus)[0], 10) > 0).astype(np.int32)
    overall = np.maximum(energy.astype(np.float64) - (1 - blob), 0)
    distance = -cv2.GaussianBlur((1.0 - overall) * blob, (3, 3), 0)
    marker = np.maximum(blob - (overall >= 0.4), 0)
    marker = ndimage.binary_fill_holes(marker).astype(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    marker = cv2.morphologyEx(marker, cv2.MORPH_OPEN, kernel)
    marker = without_small(ndimage.label(marker)[0], 10)
    flooded = watershed(distance, markers=marker, mask=blob > 0)
    labels = np.zeros(flooded.shape, np.int32)
    for new, old in enumerate(sorted(set(np.unique(flooded)) - {0}), start=1):
        labels[flooded == old] = new
    return labels


def cell_dicts(labels, types):
    """Step 7: one dict per label, from the label map and the type map [H, W]."""
    cells = {}
    for label in sorted(set(np.unique(labels)) - {0}):
        mask = labels == label
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        crop = mask[top:bottom, left:right].astype(np.uint8)
        contours, _ = cv2.findContours(crop, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        contour = contours[0][:, 0]
        if len(contour) < 3:
            continue
        moments = cv2.moments(crop)
        centroid = [moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]]
        kinds = types[top:bottom, left:right][crop > 0]
        values, counts = np.unique(kinds, return_counts=True)
        ranked = sorted(zip(values, counts, strict=True), key=lambda pair: pair[1], reverse=True)
        kind, count = ranked[1] if ranked[0][0] == 0 and len(ranked) > 1 else ranked[0]
        cells[int(label)] = {
            "bbox": [[int(top), int(left)], [int(bottom), int(right)]],
            "centroid": [centroid[0] + left, centroid[1] + top],
            "contour": contour + np.array([left, top]),
            "type": int(kind),
            "type_prob": count / (crop.sum() + 1e-6),
        }
    return cells


def postprocess(binary, hv, types):
    """Raw maps [2, H, W], [2, H, W], [T, H, W] to the instance map and its cells."""
    labels = instance_map(binary.argmax(axis=0), edge_energy(hv))
    return labels, cell_dicts(labels, types.argmax(axis=0))
