"""The genes that set a nucleus type apart from all other cells, as `annotate` has found them."""

import polars as pl
import pyarrow as pa

from scellst_ray.core.text import one_line
from scellst_ray.report.cells import NUM_TYPES
from scellst_ray.report.views import Table
from scellst_ray.report.words import as_text
from scellst_ray.runs.reading import Run
from scellst_ray.runs.scores import ScoresInfo, read_differential_genes
from scellst_ray.storage.credentials import redact

NUM_GENES = 10
ABOUT = (
    f"Up to {NUM_GENES} genes of highest t (Welch) in the cells of each nucleus type against all "
    "other cells of all slides, with log2 of the ratio of means. Cells of a slide are not "
    "independent, so no p is shown."
)


def differential_table(run: Run, info: ScoresInfo | None) -> tuple[Table | None, str]:
    """Return the top genes of each nucleus type, and what keeps them from being shown.

    Args:
        run: The run.
        info: Content of `scores.json`; None without scores.
    """
    if info is None:
        return None, ""
    try:
        table = read_differential_genes(run)
    except (ValueError, OSError, pa.ArrowException) as error:
        return None, f"differential genes: {one_line(redact(str(error)))}"
    if table is None or not len(table):
        return None, ""
    return top_genes(table), ""


def top_genes(table: pa.Table) -> Table:
    """Return a column of genes for each of the types with most cells.

    Args:
        table: DIFFERENTIAL_GENES of at least one type.
    """
    frame = pl.DataFrame(pl.from_arrow(table))
    counts = dict(frame.select("nucleus_type", "num_cells").unique().iter_rows())
    types = sorted(counts, key=lambda name: (-counts[name], name))[:NUM_TYPES]
    columns = []
    for name in types:
        higher = frame.filter((pl.col("nucleus_type") == name) & (pl.col("scores") > 0))
        best = higher.sort("scores", "gene", descending=[True, False]).head(NUM_GENES)
        texts = [
            f"{gene} ({as_text(ratio)})"
            for gene, ratio in best.select("gene", "log2_ratio").iter_rows()
        ]
        columns.append([*texts, *[""] * (NUM_GENES - len(texts))])
    rows = [list(row) for row in zip(*columns, strict=True) if any(row)]
    return Table([f"{name}: {counts[name]:,} cells" for name in types], rows, ABOUT)
