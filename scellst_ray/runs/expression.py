"""Expression of the cells of a run, computed from the stored hidden factor as it is read."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scellst_ray.core.names import check_names
from scellst_ray.models.mil.stored_head import LastLayer, expression_blocks, row_groups

IDS = ("slide_id", "cell_id")
# None means the whole panel.
Genes = Sequence[str] | None
# None means all cells of the slide.
CellIds = Sequence[int] | NDArray[np.integer] | None
What = Literal["mean", "sd"]


class HasExpression(Protocol):
    """What the functions here need of a run."""

    @property
    def uri(self) -> str:
        """The run folder."""

    @property
    def last_layer(self) -> LastLayer:
        """The last layer of the run's head."""

    def open_table(self, slide_id: str, name: str) -> AbstractContextManager[pq.ParquetFile | None]:
        """Open a table of a slide; None if the slide has no cells."""


def layer_of(run: HasExpression, genes: Genes) -> LastLayer:
    """Return the last layer for these genes, or for the whole panel.

    Raises:
        ValueError: a gene is not in the panel or is named twice, or the run has no head.
    """
    if genes is None:
        return run.last_layer
    panel = run.last_layer.genes
    place = {gene: i for i, gene in enumerate(panel)}
    names = check_names(genes, panel, f"{run.uri}: genes")
    return run.last_layer.select(np.array([place[name] for name in names], np.int64))


def iter_expression(
    run: HasExpression, genes: Genes, slide_id: str, cell_ids: CellIds = None, what: What = "mean"
) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
    """Yield ids and expression in blocks: see `Run.iter_expression`."""
    layer = layer_of(run, genes)
    wanted = None if cell_ids is None else np.unique(np.asarray(cell_ids, np.int64))
    missing = np.zeros(0, np.int64) if wanted is None else wanted
    with run.open_table(slide_id, "EXPRESSION") as file:
        for table in () if file is None else row_groups(file, wanted):
            missing = np.setdiff1d(missing, table["cell_id"].to_numpy(), assume_unique=True)
            for block, values_NG in expression_blocks(table, layer, what):
                yield block.select(list(IDS)), values_NG
    if len(missing):
        message = (
            f"slide {slide_id!r} of {run.uri} has no cell_id {missing[:5].tolist()} "
            f"({len(missing)} unknown); take ids from run.cells({slide_id!r})"
        )
        raise ValueError(message)


def read_expression(
    run: HasExpression, genes: Genes, slide_id: str, cell_ids: CellIds, what: What = "mean"
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return cell ids [N] and expression [N, G], filled block by block."""
    num_genes = len(layer_of(run, genes).genes)
    if cell_ids is None:
        with run.open_table(slide_id, "EXPRESSION") as file:
            num_cells = 0 if file is None else file.metadata.num_rows
    else:
        num_cells = len(np.unique(np.asarray(cell_ids, np.int64)))
    ids_N = np.zeros(num_cells, np.int64)
    values_NG = np.zeros((num_cells, num_genes), np.float32)
    start = 0
    for table, block in iter_expression(run, genes, slide_id, cell_ids, what):
        rows = slice(start, start + len(table))
        ids_N[rows], values_NG[rows] = table["cell_id"].to_numpy(), block
        start += len(table)
    if cell_ids is None or np.array_equal(ids_N, cell_ids):
        return ids_N, values_NG
    order = np.searchsorted(ids_N, np.asarray(cell_ids, np.int64))
    return ids_N[order], values_NG[order]
