"""Expression of cells normalised to one total, in blocks, and its moments by nucleus type.

Predictions are never negative: every head ends in a softplus times a positive factor. They are
normalised as they are, whatever the head's unit, as the paper's analysis does: predictions of a
head with the loss `mse` are not turned back into counts.

Shape letters: N cells of a block, G genes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scellst_ray.annotation.moments import Moments, block_moments, merge_moments
from scellst_ray.export.cell_blocks import cell_blocks
from scellst_ray.runs.reading import Run

# Total of a cell's expression after normalising, over the genes of the panel.
TARGET_TOTAL = 10_000.0
COLUMNS = ("slide_id", "cell_id", "nucleus_type")


@dataclass(frozen=True)
class NormalisedBlock:
    """Some consecutive cells of a slide.

    Attributes:
        cells: slide_id, cell_id and nucleus_type.
        values_NG: Normalised expression of the whole panel, float64 [N, G]. A cell whose expression
            is not finite has NaN in all genes.
    """

    cells: pa.Table
    values_NG: NDArray[np.float64]

    @property
    def is_finite_N(self) -> NDArray[np.bool_]:
        """Return which cells have expression, bool [N]."""
        return np.isfinite(self.values_NG[:, 0])


def normalise(values_NG: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return each cell's expression times TARGET_TOTAL by its sum, as scanpy's `normalize_total`.

    A cell without expression stays 0.
    """
    values = np.array(values_NG, np.float64)
    total_N = values.sum(axis=1)
    is_odd_N = ~np.isfinite(total_N)
    total_N[is_odd_N | (total_N == 0)] = 1
    values[is_odd_N] = np.nan
    values *= (TARGET_TOTAL / total_N)[:, None]
    return values


def normalised_blocks(run: Run, slide_id: str) -> Iterator[NormalisedBlock]:
    """Yield the cells of a slide by ascending cell_id.

    Raises:
        ValueError: the slide failed, or its tables are damaged or of different cells.
    """
    for block in cell_blocks(run, slide_id, COLUMNS, run.genes):
        yield NormalisedBlock(block.cells, normalise(block.values_NG))


def slide_moments(run: Run, slide_id: str) -> dict[str, Moments]:
    """Return the moments of normalised expression by nucleus type; cells without one are left out.

    Raises:
        ValueError: see `normalised_blocks`.
    """
    found: dict[str, Moments] = {}
    for block in normalised_blocks(run, slide_id):
        types = block.cells["nucleus_type"].combine_chunks().dictionary_encode()
        codes_N = np.where(block.is_finite_N, types.indices.to_numpy(), -1)
        for code, name in enumerate(types.dictionary.to_pylist()):
            part = block_moments(block.values_NG[codes_N == code])
            found[name] = merge_moments([found[name], part]) if name in found else part
    return found


def merge_types(slides: list[dict[str, Moments]]) -> dict[str, Moments]:
    """Return the moments of each nucleus type over slides, by name."""
    names = sorted({name for of_slide in slides for name in of_slide})
    return {name: merge_moments([s[name] for s in slides if name in s]) for name in names}
