"""SCORES written by hand into runs of `exported_runs`."""

import numpy as np
import pyarrow as pa

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.documents import publish_document
from scellst_ray.runs.reading import open_run
from scellst_ray.runs.scores import (
    EXPRESSION,
    SCORED,
    column_of,
    expression_of,
    scores_info_uri,
    scores_uri,
)


def write_scores(run, scores):
    """Write scores of slides, and return the run.

    Args:
        run: The run.
        scores: By slide_id and type: a score of each cell, NaN where it has none.
    """
    types = list(next(iter(scores.values())))
    slides = {}
    for slide_id, by_type in scores.items():
        values_NT = np.column_stack([by_type[name] for name in types]).astype(np.float32)
        known_N = np.isfinite(values_NT).all(axis=1)
        best_N = np.where(known_N[:, None], values_NT, 0).argmax(axis=1)
        ids = run.cells(slide_id, ["slide_id", "cell_id"])
        expression = expression_of(run.records[slide_id])
        schema = schemas.sign_schema(
            schemas.scores_schema([column_of(name) for name in types]),
            "SCORES",
            run.folder.digest,
            {SCORED: b"0123", EXPRESSION: expression.encode()},
        )
        columns = [
            *(ids["slide_id"], ids["cell_id"]),
            pa.array(np.array(types, object)[best_N], pa.string(), mask=~known_N),
            *(pa.array(column, from_pandas=True) for column in values_NT.T),
        ]
        table = pa.table(columns, schema=schema)
        uri = scores_uri(run.uri, slide_id)
        stamp = storage.publish_stamped(uri, schema, lambda w, table=table: w.write_table(table))
        slides[slide_id] = {
            "num_cells": len(table),
            "num_unscored": int((~known_N).sum()),
            "expression": expression,
            "file": stamp.as_json(),
        }
    info = {
        "digest": "0123",
        "formula": "mean of the markers",
        "scaled": True,
        "target_total": 1e4,
        "num_bins": 25,
        "types": [
            {"name": n, "column": column_of(n), "markers": [], "missing": ["X"], "controls": []}
            for n in types
        ],
        "slides": slides,
        "source": "markers of m.csv",
    }
    publish_document(scores_info_uri(run.uri), info)
    return open_run(run.uri)


def random_scores(run, types, slide_ids=("a",), seed=0):
    """Return scores of slides at random, as `write_scores` takes them."""
    rng = np.random.default_rng(seed)
    counts = {slide_id: run.records[slide_id]["num_cells"] for slide_id in slide_ids}
    return {s: {name: rng.normal(size=n) for name in types} for s, n in counts.items()}
