"""Cells of a slide with their expression, in blocks of bounded memory: what every export writes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scellst_ray.models.mil.stored_head import expression_blocks
from scellst_ray.runs.expression import layer_of
from scellst_ray.runs.reading import Run


@dataclass(frozen=True)
class CellBlock:
    """Some consecutive cells of a slide.

    Attributes:
        cells: The chosen columns of CELLS.
        values_NG: Expression, float32 [N, G]; [N, 0] without genes.
        distance_N: Distance from the training cells, float16 [N]; None if the run has none.
        scores: Scores of the cells; None: not given.
    """

    cells: pa.Table
    values_NG: NDArray[np.float32]
    distance_N: NDArray[np.float16] | None
    scores: pa.Table | None = None


def cell_blocks(
    run: Run,
    slide_id: str,
    columns: Sequence[str],
    genes: Sequence[str] = (),
    scores: pa.Table | None = None,
) -> Iterator[CellBlock]:
    """Yield the cells of a slide by ascending cell_id, a row group or less at a time.

    Args:
        run: The run.
        slide_id: The slide.
        columns: Columns of CELLS. `cell_id` must be one of them.
        genes: The genes, in this order; none: expression is not read, and neither is `distance`.
        scores: A row for each cell of the slide, see `scored.CellScores`.

    Raises:
        ValueError: the slide failed, or its tables are damaged or of different cells.
    """
    start = 0
    for block in _blocks(run, slide_id, columns, genes):
        part = None if scores is None else scores.slice(start, len(block.cells))
        yield replace(block, scores=part)
        start += len(block.cells)


def _blocks(
    run: Run, slide_id: str, columns: Sequence[str], genes: Sequence[str]
) -> Iterator[CellBlock]:
    """Yield the blocks without scores."""
    with run.open_table(slide_id, "CELLS") as file:
        if file is None:
            return
        groups = range(file.num_row_groups)
        tables = (file.read_row_group(g, list(columns), use_threads=False) for g in groups)
        if not genes:
            for table in tables:
                yield CellBlock(table, np.zeros((len(table), 0), np.float32), None)
            return
        with run.open_table(slide_id, "EXPRESSION") as expression:
            if expression is None:
                message = f"{run.uri}: slide {slide_id!r} has cells and no expression: run predict"
                raise ValueError(message)
            yield from _joined(run, slide_id, tables, expression, genes)


def _joined(
    run: Run,
    slide_id: str,
    tables: Iterator[pa.Table],
    expression: pq.ParquetFile,
    genes: Sequence[str],
) -> Iterator[CellBlock]:
    """Yield blocks of both tables, whose rows are in the same order."""
    layer = layer_of(run, genes)
    rest: pa.Table | None = None
    for group in range(expression.num_row_groups):
        for block, values_NG in expression_blocks(
            expression.read_row_group(group, use_threads=False), layer
        ):
            while rest is None or len(rest) < len(block):
                more = next(tables, None)
                if more is None:
                    break
                rest = more if rest is None else pa.concat_tables([rest, more])
            cells = None if rest is None else rest.slice(0, len(block))
            if cells is None or not cells["cell_id"].equals(block["cell_id"]):
                raise ValueError(_other_cells(run, slide_id))
            distance_N = block["distance"].to_numpy() if "distance" in block.schema.names else None
            yield CellBlock(cells, values_NG, distance_N)
            rest = None if rest is None or len(rest) == len(block) else rest.slice(len(block))
    if rest is not None or next(tables, None) is not None:
        raise ValueError(_other_cells(run, slide_id))


def _other_cells(run: Run, slide_id: str) -> str:
    return (
        f"{run.uri}: CELLS and EXPRESSION of slide {slide_id!r} have different cells. The slide is "
        "being written, or files were exchanged: export when the run has ended"
    )


def in_rows(blocks: Iterator[NDArray[np.float32]], rows: int) -> Iterator[NDArray[np.float32]]:
    """Yield the same rows in blocks of `rows` rows; the last one may have fewer."""
    waiting: list[NDArray[np.float32]] = []
    count = 0
    for block in blocks:
        waiting.append(block)
        count += len(block)
        if count >= rows:
            values = np.concatenate(waiting)
            whole = count // rows * rows
            yield from np.split(values[:whole], whole // rows)
            waiting, count = [values[whole:].copy()], count - whole
    if count:
        yield np.concatenate(waiting)
