"""Differential genes of nucleus types: scanpy's `rank_genes_groups`, a t-test, from moments.

Shape letters: G genes.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

from scellst_ray.annotation.moments import Moments, merge_moments, t_test
from scellst_ray.core import schemas

# Added to means before their logarithm, as scanpy does.
SMALL = 1e-9
# Above this, expm1(x) and exp(x) are the same float64.
LARGE = 40.0


def comparable_types(moments: Mapping[str, Moments]) -> list[str]:
    """Return the types that a t-test can compare: 2 cells or more, and 2 of other types."""
    total = sum(each.num_cells for each in moments.values())
    return [name for name, m in moments.items() if 2 <= m.num_cells <= total - 2]


def differential_genes(
    moments: Mapping[str, Moments], genes: Sequence[str], run_digest: str
) -> pa.Table:
    """Return DIFFERENTIAL_GENES: each comparable type against all other cells, by descending t.

    Args:
        moments: Moments of normalised expression of each nucleus type.
        genes: The panel.
        run_digest: Digest of the run.
    """
    parts = [schemas.DIFFERENTIAL_GENES.empty_table()]
    for name in comparable_types(moments):
        group = moments[name]
        # Merged, not subtracted: nothing is lost where the rest is small.
        rest = merge_moments([m for other, m in moments.items() if other != name])
        t_G, p_G = t_test(group, rest)
        order = np.argsort(-t_G, kind="stable")
        columns = {
            "scores": t_G,
            "logfoldchanges": fold_changes(group.mean_G, rest.mean_G),
            "pvals": p_G,
            "pvals_adj": false_discovery_control(p_G),
            "mean": group.mean_G,
            "mean_rest": rest.mean_G,
            "log2_ratio": np.log2((group.mean_G + SMALL) / (rest.mean_G + SMALL)),
        }
        names = {
            "nucleus_type": pa.repeat(name, len(order)),
            "gene": pa.array([genes[i] for i in order]),
            "num_cells": pa.repeat(group.num_cells, len(order)),
        }
        table = pa.table(names | {key: pa.array(values[order]) for key, values in columns.items()})
        parts.append(
            table.select(schemas.DIFFERENTIAL_GENES.names).cast(schemas.DIFFERENTIAL_GENES)
        )
    table = pa.concat_tables(parts)
    return schemas.conform(table, schemas.DIFFERENTIAL_GENES, "DIFFERENTIAL_GENES", run_digest)


def fold_changes(mean_G: NDArray[np.float64], rest_G: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return scanpy's log fold change, [G]: it takes means for those of log(1 + x).

    It is log2 of (exp(mean) - 1 + 1e-9) / (exp(rest) - 1 + 1e-9), also where exp overflows.
    """
    steps_G: NDArray[np.float64] = _log_expm1(mean_G) - _log_expm1(rest_G)
    return steps_G / math.log(2)


def _log_expm1(mean_G: NDArray[np.float64]) -> NDArray[np.float64]:
    small_G = np.minimum(mean_G, LARGE)
    found_G = np.where(mean_G > LARGE, mean_G, np.log(np.expm1(small_G) + SMALL))
    return np.asarray(found_G, np.float64)
