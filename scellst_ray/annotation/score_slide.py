"""Write SCORES of a slide, and count its nucleus types by best type.

Shape letters: N cells of a block, T types.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.annotation.gene_scores import Scorer
from scellst_ray.annotation.normalised import normalised_blocks
from scellst_ray.core import schemas
from scellst_ray.runs.reading import Run
from scellst_ray.runs.scores import EXPRESSION, SCORED, ScoredSlide, expression_of, scores_uri

ROW_GROUP = 65_536
# Cells by (nucleus_type, best_type); best_type is None for cells without scores.
Counts = Counter[tuple[str, str | None]]


@dataclass(frozen=True)
class Plan:
    """What is scored.

    Attributes:
        scorer: Computes the scores.
        columns: Column of each type.
        digest: Digest of all that decides the scores.
    """

    scorer: Scorer
    columns: tuple[str, ...]
    digest: str


def score_slide(run: Run, slide_id: str, plan: Plan) -> tuple[ScoredSlide, Counts]:
    """Write the SCORES of a slide, unless they are there; return what was written, and counts.

    Raises:
        ValueError: the slide failed, or its tables are damaged.
    """
    uri = scores_uri(run.uri, slide_id)
    expression = expression_of(run.records[slide_id])
    counts: Counts = Counter()
    if is_scored(run, slide_id, plan):
        best = storage.read_table(uri, ["cell_id", "best_type"])
        types = run.cells(slide_id, ["nucleus_type"])["nucleus_type"]
        counts.update(_count(types, best["best_type"]))
        stamp = storage.stamp_of(storage.local_copy(uri))
    else:
        schema = _schema(run, plan, expression)

        def write(writer: pq.ParquetWriter) -> None:
            for table, types in _tables(run, slide_id, plan, schema):
                writer.write_table(table, ROW_GROUP)
                counts.update(_count(types, table["best_type"]))

        options = {"use_dictionary": ["slide_id", "best_type"]}
        stamp = storage.publish_stamped(uri, schema, write, **options)
    num_unscored = sum(count for (_, best), count in counts.items() if best is None)
    slide: ScoredSlide = {
        "num_cells": counts.total(),
        "num_unscored": num_unscored,
        "expression": expression,
        "file": stamp.as_json(),
    }
    return slide, counts


def is_scored(run: Run, slide_id: str, plan: Plan) -> bool:
    """Return whether the SCORES of a slide are there, made by this plan of its EXPRESSION."""
    uri = scores_uri(run.uri, slide_id)
    if not storage.exists(uri):
        return False
    try:
        metadata = storage.read_schema(uri).metadata or {}
    except storage.DamagedFileError:
        return False
    expected = _schema(run, plan, expression_of(run.records[slide_id])).metadata
    return dict(metadata) == dict(expected)


def _count(types: pa.ChunkedArray, best: pa.ChunkedArray) -> Counts:
    pairs = pa.table({"nucleus_type": types, "best_type": best})
    rows = pairs.group_by(pairs.column_names).aggregate([([], "count_all")]).to_pylist()
    return Counter({(r["nucleus_type"], r["best_type"]): r["count_all"] for r in rows})


def best_types(scores_NT: NDArray[np.float64], names: Sequence[str]) -> pa.Array:
    """Return the type of the highest score of each cell, the first of equals; null without scores.

    Args:
        scores_NT: Scores, NaN for a cell without.
        names: Names of the types.
    """
    is_scored_N = np.isfinite(scores_NT).all(axis=1)
    best_N = np.where(np.isnan(scores_NT), -np.inf, scores_NT).argmax(axis=1)
    return pa.array(np.array(names, object)[best_N], pa.string(), mask=~is_scored_N)


def _tables(
    run: Run, slide_id: str, plan: Plan, schema: pa.Schema
) -> Iterator[tuple[pa.Table, pa.ChunkedArray]]:
    """Yield SCORES in blocks, with the nucleus types of their cells."""
    for block in normalised_blocks(run, slide_id):
        scores_NT = plan.scorer.score(block.values_NG)
        columns = [
            block.cells["slide_id"],
            block.cells["cell_id"],
            best_types(scores_NT, plan.scorer.names),
            *(pa.array(column.astype(np.float32), from_pandas=True) for column in scores_NT.T),
        ]
        yield pa.table(columns, schema=schema), block.cells["nucleus_type"]


def _schema(run: Run, plan: Plan, expression: str) -> pa.Schema:
    extra = {SCORED: plan.digest.encode(), EXPRESSION: expression.encode()}
    schema = schemas.scores_schema(plan.columns)
    return schemas.sign_schema(schema, "SCORES", run.folder.digest, extra)
