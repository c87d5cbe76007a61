"""Find the tissue on a coarse view of a slide."""

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.filters import threshold_otsu
from skimage.measure import label

TISSUE_MPP = 8.0
MIN_TISSUE_UM2 = 10_000.0
# Background of scans stays below 3 % saturation, stained tissue above 12 %. Otsu splits any image,
# so its threshold is limited to this range for blank slides and slides full of tissue.
MIN_SATURATION, MAX_SATURATION = 0.03, 0.12


def tissue_mask(image: NDArray[np.uint8], mpp: float) -> NDArray[np.bool_]:
    """Find stained tissue by Otsu's threshold on saturation; drop small objects.

    Args:
        image: Coarse view of the slide, RGB uint8 [H, W, 3].
        mpp: um per px of the image.

    Returns:
        Mask of the tissue, bool [H, W]; all False on a blank slide.
    """
    smooth = cv2.GaussianBlur(image, (0, 0), 1.0)
    saturation = cv2.cvtColor(smooth, cv2.COLOR_RGB2HSV)[..., 1] / 255.0
    threshold = MAX_SATURATION
    if np.ptp(saturation) > 0:
        threshold = threshold_otsu(saturation)  # type: ignore[no-untyped-call]
    mask = saturation > np.clip(threshold, MIN_SATURATION, MAX_SATURATION)
    # A small image full of tissue may be smaller than the smallest object on a whole slide.
    min_area_px = min(MIN_TISSUE_UM2, 0.01 * image.shape[0] * image.shape[1] * mpp**2) / mpp**2
    labels = label(mask, connectivity=2)  # type: ignore[no-untyped-call]
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return np.asarray((areas >= min_area_px)[labels])
