"""Find nuclei in the maps of CellViT: the published post-processing, on packed maps.

The network gives background or nucleus, a type, and two distance maps. The maps rise from -1 at a
nucleus' left (upper) end to +1 at its right (lower) end, and fall steeply where two nuclei meet.
The algorithm is that of HoVer-Net (Graham et al. 2019, "Hover-Net: simultaneous segmentation and
classification of nuclei in multi-tissue histology images", section 3.2) as CellViT applies it at
0.25 um/px. The result is the same at a lower cost. Steps over the whole map are few and simple. The
watershed needs no queue, and no step scans the map once per nucleus.

`pack_maps` packs the relevant part of a pixel's 10 numbers into 32 bits (core/schemas.py).
`models/cellvit/inference.py` does the same on the network's device.
H, W: rows, columns of the tile; C: the two channels of a map; T: types; N: nuclei, or parts;
P: pixels of nuclei.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from scellst_ray.core.schemas import MAP_LEVEL, MAP_NUCLEUS, MAP_TYPE_SHIFT
from scellst_ray.nuclei.flooding import flood
from scellst_ray.nuclei.instances import Nuclei, nuclei_from_labels

# The published values for 0.25 um/px.
_SOBEL_PX = 21
_MIN_PX = 10  # smaller blobs and markers are dropped
_EDGE = 0.4  # a pixel with at least this edge energy is no marker
_OPENING = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))

_MARKER_LEVEL = int((1 - _EDGE) * MAP_LEVEL) + 1  # lowest packed level with energy below _EDGE
_MAX_TYPES = 1 << (32 - MAP_TYPE_SHIFT)


def pack_maps(
    binary_CHW: NDArray[np.float32],
    hv_CHW: NDArray[np.float32],
    types_THW: NDArray[np.float32],
    window_px: int | None = None,
) -> NDArray[np.uint32]:
    """Pack the parts of a tile's raw maps that determine its nuclei.

    The published edge energy is 1 - x, where x is the smaller of the two scaled Sobel slopes. A
    slope is scaled to 0 at its minimum and 1 at its maximum over the tile. As a float32, 1 - x is a
    multiple of 2^-24, so 25 bits hold it exactly. With `window_px`, minimum and maximum are those
    within window_px // 2 rows and columns inside the tile. The published scaling before Sobel is
    then left out, since the scaling after it cancels its effect.

    Args:
        binary_CHW: Background and nucleus, logits or probabilities, float32 [2, H, W].
        hv_CHW: Horizontal and vertical distance, float32 [2, H, W].
        types_THW: Logits or probabilities of types, float32 [T, H, W], T <= 64; of equal values
            the first counts.
        window_px: Side of the neighbourhood in px; None takes the whole tile, as published.

    Returns:
        Packed map, uint32 [H, W]; core/schemas.py describes its bits.

    Raises:
        ValueError: Shapes or dtypes do not fit, hv_CHW is not finite, or window_px < 3.
    """
    _check_maps(binary_CHW, hv_CHW, types_THW, window_px)
    across_HW = _scaled_slope(hv_CHW[0], (1, 0), window_px)
    down_HW = _scaled_slope(hv_CHW[1], (0, 1), window_px)
    least_HW = np.clip(cv2.min(across_HW, down_HW), 0, 1)
    one = np.float32(1)
    packed_HW = ((one - (one - least_HW)) * np.float32(MAP_LEVEL)).astype(np.uint32)
    packed_HW |= _argmax(binary_CHW).astype(np.uint32) * np.uint32(MAP_NUCLEUS)
    packed_HW |= _argmax(types_THW).astype(np.uint32) << np.uint32(MAP_TYPE_SHIFT)
    return packed_HW


def label_packed(packed_HW: NDArray[np.uint32]) -> NDArray[np.int32]:
    """Return the published label map of a packed map: 0 for background, then 1 to N.

    Args:
        packed_HW: Packed map of `pack_maps`, uint32 [H, W].

    Returns:
        int32 [H, W].

    Raises:
        ValueError: packed_HW is not uint32 [H, W].
    """
    if packed_HW.ndim != 2 or packed_HW.dtype != np.uint32:
        message = (
            f"packed_HW is {packed_HW.dtype} {packed_HW.shape}; expected uint32 [H, W]: give the "
            "map that pack_maps returns"
        )
        raise ValueError(message)
    inside_HW = _number_parts((packed_HW & np.uint32(MAP_NUCLEUS)).astype(np.bool_)) > 0
    level_HW = np.where(inside_HW, packed_HW & np.uint32(MAP_NUCLEUS - 1), np.uint32(0))
    markers_HW = np.where(inside_HW, _markers(level_HW >= _MARKER_LEVEL), 0)
    used_N = np.bincount(markers_HW.ravel(), minlength=1) > 0
    used_N[0] = False
    if not used_N.any():
        return markers_HW
    height_HW = -np.asarray(cv2.GaussianBlur(level_HW.astype(np.float64), (3, 3), 0), np.float64)
    labels_HW = flood(height_HW, markers_HW, inside_HW)
    return np.asarray((np.cumsum(used_N, dtype=np.int32) * used_N)[labels_HW])


def nuclei_from_packed(packed_HW: NDArray[np.uint32], type_names: Sequence[str]) -> Nuclei:
    """Return the nuclei of a packed map, sorted by centroid (y, then x).

    As published, a nucleus' type is the most frequent type of its pixels. If that is type 0, the
    background, the next frequent type counts. `type_prob` is the type's share of the pixels. A
    nucleus whose outline is a point or a straight line is left out.

    Args:
        packed_HW: Packed map of `pack_maps`, uint32 [H, W].
        type_names: Names of the T types, background first.

    Raises:
        ValueError: packed_HW is not uint32 [H, W], or holds a type that has no name.
    """
    labels_HW = label_packed(packed_HW)
    nucleus_type, type_prob = _types(packed_HW, labels_HW, type_names)
    return nuclei_from_labels(labels_HW, nucleus_type, type_prob, drop_lines=True)


def _check_maps(
    binary_CHW: NDArray[np.float32],
    hv_CHW: NDArray[np.float32],
    types_THW: NDArray[np.float32],
    window_px: int | None,
) -> None:
    """Raise the ValueErrors that `pack_maps` lists."""
    maps = {"binary_CHW": binary_CHW, "hv_CHW": hv_CHW, "types_THW": types_THW}
    shapes = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in maps.items())
    fits = all(
        array.ndim == 3 and array.dtype == np.float32 and array.shape[1:] == hv_CHW.shape[1:]
        for array in maps.values()
    )
    counts_fit = len(binary_CHW) == len(hv_CHW) == 2 and len(types_THW) <= _MAX_TYPES
    if not fits or not counts_fit or min(hv_CHW.size, types_THW.size) == 0:
        message = (
            f"{shapes}; expected float32 [2, H, W], [2, H, W] and [T, H, W] of one H x W > 0, "
            f"with T from 1 to {_MAX_TYPES}"
        )
        raise ValueError(message)
    if not np.isfinite(hv_CHW).all():
        message = (
            "hv_CHW holds NaN or infinity: the network overflowed (use bfloat16 or float32) or its "
            "weights are damaged"
        )
        raise ValueError(message)
    if window_px is not None and window_px < 3:
        message = f"window_px is {window_px}; expected 3 or more, or None for the whole tile"
        raise ValueError(message)


def _scaled_slope(
    map_HW: NDArray[np.float32], direction: tuple[int, int], window_px: int | None
) -> NDArray[np.float32]:
    """Return the Sobel slope along `direction` (x, y), 0 at its minimum and 1 at its maximum."""
    if window_px is None:
        return _scale_to_unit(_slope(_scale_to_unit(map_HW), direction))
    slope_HW = _slope(map_HW, direction)
    # "nearest" repeats values of the window beyond the tile, so minimum and maximum stay the same.
    size = 2 * (window_px // 2) + 1
    low_HW = ndimage.minimum_filter(slope_HW, size, mode="nearest")
    range_HW = ndimage.maximum_filter(slope_HW, size, mode="nearest") - low_HW
    # Rounded as OpenCV does in _scale_to_unit; a window of one value gives 0.
    range_HW[range_HW <= np.finfo(np.float64).eps] = np.inf
    factor_HW = (1 / range_HW).astype(np.float32).astype(np.float64)
    shift_HW = (-low_HW * factor_HW).astype(np.float32)
    return np.asarray(slope_HW * factor_HW + shift_HW, np.float32)


def _slope(map_HW: NDArray[np.float32], direction: tuple[int, int]) -> NDArray[np.float64]:
    """Return the Sobel slope along `direction` (x, y)."""
    return np.asarray(cv2.Sobel(map_HW, cv2.CV_64F, *direction, ksize=_SOBEL_PX))


def _scale_to_unit(map_HW: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return the map scaled to 0 at its minimum and 1 at its maximum; 0 if it is constant."""
    return np.asarray(cv2.normalize(map_HW, None, 0, 1, cv2.NORM_MINMAX, cv2.CV_32F))  # type: ignore[call-overload]


def _argmax(maps_THW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the index of the greatest map at every pixel, as np.argmax does but faster."""
    best_HW, index_HW = maps_THW[0], np.zeros(maps_THW.shape[1:], np.uint8)
    for k, map_HW in enumerate(maps_THW[1:], start=1):
        greater_HW = cv2.compare(map_HW, best_HW, cv2.CMP_GT)
        index_HW = np.maximum(index_HW, greater_HW & np.uint8(k))
        best_HW = cv2.max(best_HW, map_HW)
    return index_HW


def _number_parts(mask_HW: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number the 4-connected parts of a mask from 1 by their first pixel; small parts get 0."""
    _, parts_HW = cv2.connectedComponents(mask_HW.view(np.uint8), connectivity=4, ltype=cv2.CV_32S)
    area_N = np.bincount(parts_HW.ravel())
    if area_N.min() >= _MIN_PX:
        return np.asarray(parts_HW)
    kept_N = np.where(area_N >= _MIN_PX, np.arange(len(area_N), dtype=np.int32), 0)
    kept_N[0] = 0
    return np.asarray(kept_N[parts_HW])


def _markers(inside_HW: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return numbered markers: fill the holes of a mask, open it, and drop small parts."""
    frame_HW = cv2.copyMakeBorder(inside_HW.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    cv2.floodFill(frame_HW, None, (0, 0), 2)  # 4-connected
    filled_HW = (frame_HW[1:-1, 1:-1] != 2).view(np.uint8)
    return _number_parts(cv2.morphologyEx(filled_HW, cv2.MORPH_OPEN, _OPENING).view(np.bool_))


def _types(
    packed_HW: NDArray[np.uint32], labels_HW: NDArray[np.int32], type_names: Sequence[str]
) -> tuple[NDArray[np.str_], NDArray[np.float32]]:
    """Return each label's type, str [N], and the type's share of its pixels, float32 [N]."""
    nucleus_P = np.flatnonzero(labels_HW)
    label_P, type_P = labels_HW.ravel()[nucleus_P], packed_HW.ravel()[nucleus_P] >> MAP_TYPE_SHIFT
    num, num_types = int(label_P.max(initial=0)), len(type_names)
    if type_P.max(initial=0) >= num_types:
        message = (
            f"packed_HW holds type {type_P.max()}, but type_names has {num_types}: "
            f"{list(type_names)}; give the names of all types of the network"
        )
        raise ValueError(message)
    counts = np.bincount(label_P * num_types + type_P, minlength=(num + 1) * num_types)
    counts_NT = counts.reshape(num + 1, num_types)[1:]
    main_N = counts_NT.argmax(axis=1)
    if num_types > 1:
        second_N = counts_NT[:, 1:].argmax(axis=1) + 1
        has_second_N = counts_NT[:, 1:].any(axis=1)
        main_N = np.where((main_N == 0) & has_second_N, second_N, main_N)
    share_N = counts_NT[np.arange(num), main_N] / (counts_NT.sum(axis=1) + 1e-6)
    return np.array(list(type_names))[main_N], share_N.astype(np.float32)
