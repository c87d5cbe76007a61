"""The cells of a slide, as a report shows them.

Shape letters: N cells, G genes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scellst_ray.runs.reading import Run

# A page shows and colours so many types; the rest are one.
NUM_TYPES = 12
OTHERS = "other types"


@dataclass(frozen=True)
class SlideCells:
    """The cells of a slide, and what is shown of them.

    Attributes:
        cell_id_N: Their ids, ascending.
        xy0_N2: Centroids (x, y), level-0 px.
        types: Names of the types, the most frequent first.
        codes_N: Number of each cell's type.
        values_NG: Expression of the shown genes, float32 [N, G].
        size0: Width and height of the slide, level-0 px.
        mpp: um per level-0 px.
    """

    cell_id_N: NDArray[np.int64]
    xy0_N2: NDArray[np.float32]
    types: list[str]
    codes_N: NDArray[np.int64]
    values_NG: NDArray[np.float32]
    size0: tuple[int, int]
    mpp: float


def read_cells(run: Run, slide_id: str) -> SlideCells:
    """Read what a report needs of CELLS: no outline and no embedding."""
    table = run.cells(slide_id, ["cell_id", "x0", "y0", "nucleus_type"])
    xy0_N2 = np.column_stack([table["x0"].to_numpy(), table["y0"].to_numpy()])
    coded = table["nucleus_type"].combine_chunks().dictionary_encode()
    codes_N, names = coded.indices.to_numpy().astype(np.int64), coded.dictionary.to_pylist()
    counts = np.bincount(codes_N, minlength=len(names))
    order = sorted(range(len(names)), key=lambda code: (-counts[code], names[code]))
    place = np.empty(len(names), np.int64)
    place[order] = np.arange(len(names)).clip(max=NUM_TYPES)
    types = [names[code] for code in order][:NUM_TYPES]
    types += [OTHERS] if len(names) > NUM_TYPES else []
    record = run.records[slide_id]
    width0, height0 = record.get("width0"), record.get("height0")
    # The first releases did not store the size: cells reach nearly to the end of the tissue.
    if not width0 or not height0:
        far = xy0_N2.max(axis=0) if len(xy0_N2) else np.ones(2)
        width0, height0 = int(far[0]) + 1, int(far[1]) + 1
    size0, mpp = (int(width0), int(height0)), float(record.get("mpp") or 1.0)
    nothing = np.zeros((len(table), 0), np.float32)
    ids_N, codes_N = table["cell_id"].to_numpy(), place[codes_N]
    return SlideCells(ids_N, xy0_N2, types, codes_N, nothing, size0, mpp)
