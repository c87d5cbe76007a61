"""Compare the weight-free nucleus segmenter with a plain Otsu-distance watershed.

    python benchmarks/segmentation.py [FOLDER] [--mpp 0.25] [--json segmentation.json]

FOLDER holds images/*.png (RGB) and labels/*.png (integer maps of the same names, 0 = background).
The MoNuSeg images have this form after their masks are merged. Both methods get the same pixels in
the same run on one thread. F1 counts matches with an intersection over union above 0.5. The steps
of the segmenter were chosen by F1 on other data and on three of six MoNuSeg images (18-5592,
A7-A13F, B0-5711). Only the result on the other three images is a held-out result.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed

from scellst_ray.evaluation.segmentation.mask_metrics import score_labels
from scellst_ray.nuclei.hematoxylin import segment_labels

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "seg_monuseg"
COLUMNS = ("f1", "precision", "recall", "aji", "pq", "sq", "seconds")
Segmenter = Callable[[NDArray[np.uint8], float], NDArray[np.integer]]


def otsu_watershed(image_HWC: NDArray[np.uint8], mpp: float) -> NDArray[np.int32]:
    """Return the peer's label map: Otsu on hematoxylin, opening, filling, split by distance."""
    stain_HW = ndimage.gaussian_filter(rgb2hed(image_HWC)[..., 0], 0.25 / mpp)
    threshold = threshold_otsu(stain_HW)  # type: ignore[no-untyped-call]
    mask_HW = ndimage.binary_opening(stain_HW > threshold, iterations=2)
    mask_HW = ndimage.binary_fill_holes(mask_HW)
    depth_HW = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask_HW), 0.5 / mpp)
    spacing = max(round(2 / mpp), 1)  # half of the smallest nucleus, as in the segmenter
    peaks = peak_local_max(  # type: ignore[no-untyped-call]
        depth_HW, min_distance=spacing, labels=mask_HW.astype(np.int32)
    )
    markers_HW = np.zeros(mask_HW.shape, np.int32)
    markers_HW[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels_HW = watershed(-depth_HW, markers_HW, mask=mask_HW)  # type: ignore[no-untyped-call]
    area_um2 = np.bincount(labels_HW.ravel()) * mpp**2
    labels_HW[(area_um2 < 10)[labels_HW]] = 0
    return np.asarray(labels_HW, np.int32)


def read_pairs(folder: Path) -> list[tuple[str, NDArray[np.uint8], NDArray[np.int64]]]:
    """Return name, RGB image and label map of every image with a label map.

    Raises:
        ValueError: The folder has no image with a label map.
    """
    pairs = []
    for path in sorted((folder / "images").glob("*.png")):
        image_HWC = cv2.imread(str(path), cv2.IMREAD_COLOR)
        labels_HW = cv2.imread(str(folder / "labels" / path.name), cv2.IMREAD_UNCHANGED)
        if image_HWC is not None and labels_HW is not None:
            rgb_HWC = np.array(image_HWC[..., ::-1], np.uint8, order="C")
            pairs.append((path.stem, rgb_HWC, labels_HW.astype(np.int64)))
    if not pairs:
        message = f"{folder} has no images/NAME.png with labels/NAME.png; give the folder with both"
        raise ValueError(message)
    return pairs


def measure(
    segmenter: Segmenter, pairs: list[tuple[str, NDArray[np.uint8], NDArray[np.int64]]], mpp: float
) -> dict[str, dict[str, float]]:
    """Return the scores and seconds per image, and their mean over images."""
    segmenter(pairs[0][1], mpp)  # the first call loads libraries
    rows: dict[str, dict[str, float]] = {}
    for name, image_HWC, true_HW in pairs:
        start = time.perf_counter()
        predicted_HW = segmenter(image_HWC, mpp)
        seconds = time.perf_counter() - start
        scores = score_labels(true_HW, predicted_HW.astype(np.int64))
        rows[name] = {c: getattr(scores, c) for c in COLUMNS if c != "seconds"}
        rows[name] |= {"seconds": seconds}
    rows["mean"] = {c: float(np.mean([row[c] for row in rows.values()])) for c in COLUMNS}
    return rows


def print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Print one method's scores."""
    width = max(map(len, rows))
    print(f"\n{title}\n{'image':{width}}" + "".join(f"{c:>11}" for c in COLUMNS))
    for name, row in rows.items():
        print(f"{name:{width}}" + "".join(f"{row[c]:11.3f}" for c in COLUMNS))


def main() -> None:
    """Run both methods, print tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--mpp", type=float, default=0.25, help="um per px of the images")
    parser.add_argument("--json", type=Path, default=Path("segmentation.json"))
    options = parser.parse_args()
    cv2.setNumThreads(1)
    try:
        pairs = read_pairs(options.folder)
    except ValueError as error:
        sys.exit(f"segmentation: {error}")
    ours = measure(segment_labels, pairs, options.mpp)
    peer = measure(otsu_watershed, pairs, options.mpp)
    print_table("scellst_ray.nuclei.hematoxylin", ours)
    print_table("Otsu-distance watershed", peer)
    ratio = {c: ours["mean"][c] / peer["mean"][c] for c in COLUMNS}
    print("\nratio of means: " + ", ".join(f"{c} {ratio[c]:.2f}" for c in COLUMNS))
    packages = ("numpy", "scipy", "scikit-image", "opencv-python-headless")
    report = {
        "images": len(pairs),
        "mpp": options.mpp,
        "hematoxylin": ours,
        "otsu_watershed": peer,
        "ratio": ratio,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
