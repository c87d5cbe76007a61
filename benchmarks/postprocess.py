"""Time CellViT's post-processing of one tile: raw maps to stored columns, on one core.

    python benchmarks/postprocess.py [--nuclei 50 400 800 1200] [--repeats 5] [--json FILE]

Maps are those of a good but imperfect network for random ellipses of 8-18 px semi-axes. Edges are
wrong by a pixel, distances are noisy, and 5 % of the pixels have another type. The same run times
a plain version of the algorithm: one scan of the whole tile and one dict per nucleus
(tests/support/full_scan.py). Times are CPU seconds, the best of several calls.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scellst_ray.core import schemas
from scellst_ray.core.geometry import Frame
from scellst_ray.evaluation.segmentation.mask_metrics import score_labels
from scellst_ray.nuclei.hv_maps import label_packed, nuclei_from_packed, pack_maps
from scellst_ray.nuclei.instances import Nuclei
from scellst_ray.slides.synthetic.ideal_maps import ideal_maps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support import full_scan

TYPES = ("Background", "Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")
Maps = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]


def random_ellipses(num: int, side: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Return labels of ellipses at random places of a tile; later ellipses cover earlier ones."""
    grid = int(np.ceil(np.sqrt(num)))
    pitch = side / grid
    labels_HW = np.zeros((side, side), np.int32)
    for label, place in enumerate(rng.permutation(grid * grid)[:num], start=1):
        centre = (np.array([place % grid, place // grid]) + 0.5 + rng.uniform(-0.2, 0.2, 2)) * pitch
        axes = 2 * rng.uniform(8, 18, 2)
        cv2.ellipse(labels_HW, (tuple(centre), tuple(axes), rng.uniform(0, 180)), label, -1)
    return labels_HW


def network_maps(num: int, side: int, seed: int) -> tuple[NDArray[np.int32], Maps]:
    """Return true labels and the maps that a network would make of them."""
    rng = np.random.default_rng(seed)
    labels_HW = random_ellipses(num, side, rng)
    types = rng.integers(1, len(TYPES), num)
    return labels_HW, ideal_maps(labels_HW, types, len(TYPES), jitter=1.0, rng=rng)


def columns(nuclei: Nuclei) -> pa.Table:
    """Return nuclei as rows of CELLS, as the pipeline's stages store them."""
    frame = Frame(0, 0, 1, 1)
    centroid_x0y0 = frame.to_level0(nuclei.centroid_px).astype(np.float32)
    cells = {
        "slide_id": pa.repeat("slide", len(nuclei)),
        "cell_id": np.arange(len(nuclei)),
        "x0": centroid_x0y0[:, 0],
        "y0": centroid_x0y0[:, 1],
        "area_um2": (nuclei.area_px * 0.25**2).astype(np.float32),
        "nucleus_type": pa.array(nuclei.nucleus_type.tolist(), pa.string()),
        "type_prob": pa.array(nuclei.type_prob, pa.float32(), from_pandas=True),
        "polygon": pa.array(nuclei.polygon_wkb(frame), pa.binary()),
    }
    return pa.table(cells, schema=pa.schema(schemas.CELL_FIELDS))


def best(repeats: int, function: Callable[[], Any]) -> float:
    """Return the least CPU seconds of several calls."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


def measure(num: int, side: int, repeats: int, window_px: int | None) -> dict[str, float]:
    """Return nuclei, seconds of each stage and seconds of the full-scan twin for one tile."""
    true_HW, maps = network_maps(num, side, seed=num)
    packed_HW = pack_maps(*maps, window_px)
    nuclei = nuclei_from_packed(packed_HW, TYPES)
    scores = score_labels(true_HW.astype(np.int64), label_packed(packed_HW).astype(np.int64))
    row: dict[str, float] = {
        "drawn": scores.num_true,
        "nuclei": len(nuclei),
        "matched": scores.num_matched,
        "pack": best(repeats, lambda: pack_maps(*maps, window_px)),
        "nuclei_seconds": best(repeats, lambda: nuclei_from_packed(packed_HW, TYPES)),
        "columns": best(repeats, lambda: columns(nuclei)),
        "total": best(
            repeats,
            lambda: columns(nuclei_from_packed(pack_maps(*maps, window_px), TYPES)),
        ),
        "full_scan": best(min(repeats, 2), lambda: full_scan.postprocess(*maps)),
    }
    return row | {"ratio": row["full_scan"] / row["total"]}


def main() -> None:
    """Measure each number of nuclei, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nuclei", type=int, nargs="+", default=[50, 400, 800, 1200])
    parser.add_argument("--side", type=int, default=1024, help="side of the tile in px")
    parser.add_argument(
        "--window-px", type=int, help="window of pack_maps in px; default: the tile"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("postprocess.json"))
    options = parser.parse_args()
    cv2.setNumThreads(1)
    rows: list[dict[str, float]] = []
    for num in options.nuclei:
        row = measure(num, options.side, options.repeats, options.window_px)
        if not rows:
            print("".join(f"{name:>15}" for name in row))
        print("".join(f"{v:15.3f}" if isinstance(v, float) else f"{v:15d}" for v in row.values()))
        rows.append(row)
    packages = ("numpy", "scipy", "scikit-image", "opencv-python-headless", "shapely", "pyarrow")
    report = {
        "side": options.side,
        "window_px": options.window_px,
        "tiles": rows,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
