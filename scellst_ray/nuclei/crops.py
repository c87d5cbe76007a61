"""Cut square crops around nuclei, resampled to the encoder's size."""

import cv2
import numpy as np
from numpy.typing import NDArray

from scellst_ray.core.schemas import CROP_PX, CROP_UM


def crop_nuclei(
    image: NDArray[np.uint8],
    centroid_px: NDArray[np.floating],
    px_per_um: tuple[float, float],
    crop_um: float = CROP_UM,
    crop_px: int = CROP_PX,
) -> NDArray[np.uint8]:
    """Cut a crop of `crop_um` around each centroid and resample it to `crop_px` square.

    Linear interpolation centres the crop to a fraction of a pixel. An image finer than the crop is
    first shrunk by area averages, so that nothing aliases. Pixels beyond the image are white.

    Args:
        image: RGB uint8 [H, W, 3].
        centroid_px: Centroids (x, y) in px of the image, [N, 2]; pixel i covers [i, i + 1).
        px_per_um: (x, y) px per um of the image.
        crop_um: Side of the crop on the slide in um.
        crop_px: Side of the returned crop in px.

    Returns:
        uint8 [N, crop_px, crop_px, 3].
    """
    step_x, step_y = (crop_um * density / crop_px for density in px_per_um)
    points = np.asarray(centroid_px, np.float64)
    if step_x > 1.1 or step_y > 1.1:
        height, width = image.shape[:2]
        new_w, new_h = max(1, round(width / step_x)), max(1, round(height / step_y))
        image = np.asarray(
            cv2.resize(image, (new_w, new_h), interpolation=cv2.INTER_AREA), np.uint8
        )
        points = points * (new_w / width, new_h / height)
        step_x, step_y = step_x * new_w / width, step_y * new_h / height
    crops = np.empty((len(points), crop_px, crop_px, 3), np.uint8)
    # Pixel centres are whole numbers in OpenCV: our x is its x + 0.5.
    half = (crop_px - 1) / 2
    for crop, (x, y) in zip(crops, points, strict=True):
        matrix = np.array(
            [[step_x, 0.0, x - 0.5 - half * step_x], [0.0, step_y, y - 0.5 - half * step_y]]
        )
        cv2.warpAffine(
            image,
            matrix,
            (crop_px, crop_px),
            dst=crop,
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=(255, 255, 255),
        )
    return crops
