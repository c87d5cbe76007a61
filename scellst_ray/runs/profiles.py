"""PROFILES: the distribution of each gene in the cells of each nucleus type of a slide.

Memory does not depend on the number of cells. Counts, means and deviations are exact. Quantiles are
read off a histogram of the values' first bits, and are right within 1.6 % of the value.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.models.mil.stored_head import LastLayer, expression_blocks

# The bins of a histogram: float32 without sign and without all but 5 bits of the mantissa, from
# 2^-20 to 2^20. Smaller values count as the smallest, and larger ones as the largest.
DROPPED_BITS, LOWEST, HIGHEST = 18, 107, 147
FIRST_BIN, LAST_BIN = LOWEST << 5, (HIGHEST << 5) - 1
NUM_BINS = LAST_BIN - FIRST_BIN + 1
QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


class ProfileTotals:
    """Totals of some cells, from which their PROFILES follow.

    Args:
        num_genes: Number of genes.
    """

    def __init__(self, num_genes: int) -> None:
        """Begin without cells."""
        self.num_cells = 0
        self.mean_G = np.zeros(num_genes)
        self.m2_G = np.zeros(num_genes)
        self.histogram_GB = np.zeros((num_genes, NUM_BINS), np.int64)

    def add(self, values_NG: NDArray[np.float32]) -> None:
        """Add cells: their expression, float32 [N, G]."""
        block_mean_G = values_NG.mean(axis=0, dtype=np.float64)
        block_m2_G = ((values_NG - block_mean_G) ** 2).sum(axis=0)
        self._merge(len(values_NG), block_mean_G, block_m2_G)
        self.histogram_GB += histograms(values_NG)

    def add_totals(self, other: "ProfileTotals") -> None:
        """Add the cells of other totals."""
        self._merge(other.num_cells, other.mean_G, other.m2_G)
        self.histogram_GB += other.histogram_GB

    def _merge(self, count: int, mean_G: NDArray[np.float64], m2_G: NDArray[np.float64]) -> None:
        """Merge means and sums of squared deviations, by the formula of Chan et al. (1979)."""
        total = self.num_cells + count
        step_G = mean_G - self.mean_G
        self.m2_G += m2_G + step_G**2 * (self.num_cells * count / max(total, 1))
        self.mean_G += step_G * (count / max(total, 1))
        self.num_cells = total

    def columns(self) -> dict[str, NDArray[np.float32]]:
        """Return mean, sd (over n, not n - 1) and quantiles, [G] each."""
        found = {"mean": self.mean_G, "sd": np.sqrt(self.m2_G / max(self.num_cells, 1))}
        reached_GB = np.cumsum(self.histogram_GB, axis=1)
        for name, share in QUANTILES.items():
            rank = max(1, int(np.ceil(share * self.num_cells)))
            found[name] = _middles()[(reached_GB < rank).sum(axis=1).clip(max=NUM_BINS - 1)]
        return {name: values.astype(np.float32) for name, values in found.items()}


def histograms(values_NG: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the histogram of each gene, int64 [G, NUM_BINS]."""
    num_genes = values_NG.shape[1]
    bins_NG = np.ascontiguousarray(values_NG).view(np.int32) >> DROPPED_BITS
    np.clip(bins_NG, FIRST_BIN, LAST_BIN, out=bins_NG)
    bins_NG += (np.arange(num_genes, dtype=np.int32) * NUM_BINS - FIRST_BIN)[None, :]
    counts = np.bincount(bins_NG.ravel(), minlength=num_genes * NUM_BINS)
    return counts.reshape(num_genes, NUM_BINS)


def _middles() -> NDArray[np.float64]:
    """Return the middle of each bin."""
    edges = bin_edges()
    return (edges[:-1] + edges[1:]) / 2


def bin_edges() -> NDArray[np.float64]:
    """Return where bins begin, and where the last one ends, float64 [NUM_BINS + 1]."""
    edges = np.arange(FIRST_BIN, LAST_BIN + 2, dtype=np.int32) << DROPPED_BITS
    return edges.view(np.float32).astype(np.float64)


class Profiles:
    """Totals by nucleus type, filled while EXPRESSION passes by.

    Args:
        layer: Last layer of the head.
    """

    def __init__(self, layer: LastLayer) -> None:
        """Begin without cells."""
        self.layer = layer
        self.by_type: dict[str, ProfileTotals] = {}

    def counting(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Yield tables as they are, and count their cells by `nucleus_type` and `hidden`."""
        for table in tables:
            for block, values_NG in expression_blocks(table, self.layer):
                types = block["nucleus_type"].combine_chunks().dictionary_encode()
                codes_N = types.indices.to_numpy()
                for code, name in enumerate(types.dictionary.to_pylist()):
                    totals = self.by_type.setdefault(name, ProfileTotals(values_NG.shape[1]))
                    totals.add(values_NG[codes_N == code])
            yield table

    def table(self, slide_id: str, run_digest: str) -> pa.Table:
        """Return PROFILES: all cells (nucleus_type null) and each type, by gene."""
        whole = ProfileTotals(len(self.layer.genes))
        for name in sorted(self.by_type):
            whole.add_totals(self.by_type[name])
        parts = [
            self._rows(slide_id, name, totals)
            for name, totals in [(None, whole), *sorted(self.by_type.items())]
        ]
        table = pa.concat_tables(parts)
        return schemas.conform(table, schemas.PROFILES, "PROFILES", run_digest)

    def _rows(self, slide_id: str, name: str | None, totals: ProfileTotals) -> pa.Table:
        count = len(self.layer.genes)
        ids = {
            "slide_id": pa.repeat(slide_id, count),
            "nucleus_type": pa.array([name] * count, pa.string()),
            "gene": pa.array(self.layer.genes),
            "n": pa.repeat(totals.num_cells, count),
        }
        return pa.table(ids | {n: pa.array(v) for n, v in totals.columns().items()})


def publish_profiles(uri: str, table: pa.Table) -> storage.StoredStamp:
    """Publish PROFILES of a slide; return the stamp of the file."""
    stamp = storage.publish_stamped(uri, table.schema, lambda writer: writer.write_table(table))
    return stamp.as_json()
