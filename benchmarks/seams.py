"""Count nuclei that are lost or doubled when a slide is cut into tiles, on maps of known nuclei.

    python benchmarks/seams.py [--slides 8] [--json seams.json]

Slides have 4 x 4 tiles with 150 nuclei each, a third of them on seams (borders of tiles). Maps are
those of a perfect network, or of a network that sees nuclei differently in every tile. Either
network may or may not know the part of a nucleus beyond the border of its tile. Settled nuclei are
those that two tiles or no tile claimed, and that compaction corrected. Edges are scaled by the
whole tile, as published, or by a window.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support import true_tiles

NUM = 150
COLUMNS = ("jitter", "context", "window_px", "nuclei", "lost", "doubled", "settled")


def main() -> None:
    """Run all combinations, print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--slides", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(" ".join(f"{name:>10}" for name in COLUMNS))
    rows = []
    for jitter in (0.0, 1.0):
        for context_px in (true_tiles.CONTEXT_PX, 0):
            for window_px in (None, 64, 128, 256):
                row = measure(options.slides, jitter, context_px, window_px)
                print(" ".join(f"{row[name]!s:>10}" for name in COLUMNS), flush=True)
                rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(slides: int, jitter: float, context_px: int, window_px: int | None) -> dict[str, Any]:
    """Return the counts, summed over some slides."""
    spec = true_tiles.truth_spec()
    counts = np.zeros(3, int)
    for seed in range(slides):
        polygons = true_tiles.discs(seed, NUM, (8, 18))
        truth = true_tiles.Truth(
            polygons, 1 + np.arange(NUM) % 5, jitter, context_px=context_px, window_px=window_px
        )
        with tempfile.TemporaryDirectory() as folder:
            tiles = true_tiles.square_of_tiles(spec)
            record, cells = true_tiles.run_slide(folder, tiles, truth, spec)
        limit0 = 8.0 if jitter else 1.0
        settled = sum(record["seams"].values())
        counts += [*true_tiles.counted(cells, polygons, limit0), settled]
    lost, doubled, settled = counts.tolist()
    return {
        "jitter": jitter,
        "context": context_px > 0,
        "window_px": window_px,
        "nuclei": slides * NUM,
        "lost": lost,
        "doubled": doubled,
        "settled": settled,
    }


if __name__ == "__main__":
    main()
