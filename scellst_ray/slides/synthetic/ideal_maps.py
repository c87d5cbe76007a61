"""Make the maps that a perfect network would give for known nuclei.

Simulations, tests and benchmarks use them. H, W: rows, columns; N: labels; T: types; P: pixels of
nuclei; hv: horizontal and vertical distance to the centroid.
"""

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

_LOGIT = 4.0  # softmax of 4 against -4 is 0.9997
_SOFT_PX = 1.5  # sigma of the blur of a jittered edge
_GRAIN_PX = 2.0  # correlation length of the jitter


def ideal_maps(
    labels_HW: NDArray[np.integer],
    types: NDArray[np.integer],
    num_types: int,
    *,
    jitter: float = 0.0,
    rng: np.random.Generator | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return the maps that CellViT is trained towards, in the form `hv_maps.pack_maps` takes.

    The horizontal (vertical) map holds a pixel's signed distance to the centroid of its nucleus,
    divided by the greatest distance on the same side. It is -1 at the left (upper) end, 1 at the
    right (lower) end and 0 in the background (Graham et al. 2019, "Hover-Net", section 3.1).

    Args:
        labels_HW: Label map, integer [H, W]: 0 is background, labels 1 to N may be absent.
        types: Type of label k at index k - 1, integer [N], below num_types.
        num_types: T, with type 0 for the background.
        jitter: Uncertainty of the network, 0 or more. It is the standard deviation, in px, by
            which outer edges move (little more above 1). Distances get smooth noise of standard
            deviation 0.05 * jitter; a share of 0.05 * jitter of the pixels gets a random type.
        rng: Source of the noise; a generator with a fixed seed if None.

    Returns:
        float32 [2, H, W] logits of background and nucleus, [2, H, W] horizontal and vertical
        distance, [T, H, W] logits of types.

    Raises:
        ValueError: A label or a type is out of range, or jitter is negative.
    """
    _check(labels_HW, types, num_types, jitter)
    pixels = np.flatnonzero(labels_HW)
    label_P = labels_HW.ravel()[pixels].astype(np.int64)
    hv_CHW = np.zeros((2, *labels_HW.shape), np.float32)
    y_P = pixels // max(labels_HW.shape[1], 1)
    x_P = pixels - y_P * labels_HW.shape[1]
    boxes = ndimage.find_objects(labels_HW.astype(np.int32, copy=False), max_label=len(types))
    for axis, position_P in ((1, x_P), (0, y_P)):
        ends_N2 = np.array(
            [(0, 1), *((b[axis].start, b[axis].stop) if b else (0, 1) for b in boxes)]
        )
        hv_CHW[1 - axis].ravel()[pixels] = _signed_distance(position_P, label_P, ends_N2)
    type_HW = np.append(0, types).astype(np.uint8)[labels_HW]
    nucleus_HW = (labels_HW > 0).astype(np.float32)
    if jitter > 0:
        rng = np.random.default_rng(0) if rng is None else rng
        _disturb(nucleus_HW, hv_CHW, type_HW, num_types, jitter, rng)
    binary_HW = (2 * _LOGIT) * nucleus_HW - np.float32(_LOGIT)
    types_THW = np.stack([(type_HW == k) * np.float32(_LOGIT) for k in range(num_types)])
    return np.stack([-binary_HW, binary_HW]), hv_CHW, types_THW


def _check(
    labels_HW: NDArray[np.integer], types: NDArray[np.integer], num_types: int, jitter: float
) -> None:
    """Raise the ValueErrors that `ideal_maps` lists."""
    lowest, highest = int(labels_HW.min(initial=0)), int(labels_HW.max(initial=0))
    if labels_HW.ndim != 2 or lowest < 0 or highest > len(types):
        message = (
            f"labels_HW of shape {labels_HW.shape} holds labels {lowest} to {highest}; expected "
            f"[H, W] with 0 to {len(types)}, the number of types given"
        )
        raise ValueError(message)
    if len(types) and not 0 <= int(np.min(types)) <= int(np.max(types)) < num_types <= 64:
        message = (
            f"types range from {np.min(types)} to {np.max(types)} and num_types is {num_types}; "
            "expected types of 0 to num_types - 1 and num_types of at most 64"
        )
        raise ValueError(message)
    if not jitter >= 0:
        message = f"jitter is {jitter}; expected 0 or more"
        raise ValueError(message)


def _signed_distance(
    position_P: NDArray[np.int64], label_P: NDArray[np.int64], ends_N2: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return each pixel's distance to its label's mean position, scaled to 1 at the box's ends.

    Args:
        position_P: Coordinate of each pixel along one axis, int64 [P].
        label_P: Label of each pixel, int64 [P].
        ends_N2: Start and stop of each label's box along the axis, int64 [N + 1, 2].
    """
    area_N = np.maximum(np.bincount(label_P, minlength=len(ends_N2)), 1)
    mean_N = np.bincount(label_P, position_P, minlength=len(ends_N2)) / area_N
    distance_P = position_P - mean_N[label_P]
    # A box one pixel wide ends at its mean; 1e-9 avoids 0 / 0.
    below_N = np.maximum(mean_N - ends_N2[:, 0], 1e-9)
    above_N = np.maximum(ends_N2[:, 1] - 1 - mean_N, 1e-9)
    reach_P = np.where(distance_P < 0, below_N[label_P], above_N[label_P])
    return (distance_P / reach_P).astype(np.float32)


def _disturb(
    nucleus_HW: NDArray[np.float32],
    hv_CHW: NDArray[np.float32],
    type_HW: NDArray[np.uint8],
    num_types: int,
    jitter: float,
    rng: np.random.Generator,
) -> None:
    """Add noise to the maps in place; nucleus_HW holds 0 to 1."""
    shape = type_HW.shape
    soft_HW = cv2.GaussianBlur(nucleus_HW, (0, 0), _SOFT_PX)
    # A blurred edge rises by 1 / (sigma sqrt(2 pi)) per px; this value moves it by one pixel.
    shift_HW = _smooth_noise(shape, jitter / (_SOFT_PX * np.sqrt(2 * np.pi)), rng)
    nucleus_HW[:] = soft_HW + 4 * soft_HW * (1 - soft_HW) * shift_HW
    hv_CHW += np.stack([_smooth_noise(shape, 0.05 * jitter, rng) for _ in hv_CHW])
    other_HW = rng.random(shape, np.float32) < 0.05 * jitter
    type_HW[other_HW] = rng.integers(0, num_types, int(other_HW.sum()), np.uint8)


def _smooth_noise(
    shape: tuple[int, ...], deviation: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return normal noise of standard deviation `deviation`, smooth over _GRAIN_PX."""
    noise_HW = cv2.GaussianBlur(rng.standard_normal(shape, np.float32), (0, 0), _GRAIN_PX)
    # The square root of the sum of a Gaussian's squared weights is 1 / (2 sigma sqrt(pi)).
    return np.asarray(noise_HW * np.float32(deviation * 2 * _GRAIN_PX * np.sqrt(np.pi)))
