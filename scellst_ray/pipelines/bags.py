"""BAGS: spots with their cells' embeddings and their target expression, one file per slide."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from scellst_ray import schemas, storage
from scellst_ray.cohort import SlideRow
from scellst_ray.runs import RunFolder
from scellst_ray.spots.links import alignment_report, link_cells
from scellst_ray.spots.panel import (
    filter_counts,
    log_normalise,
    panel_targets,
    read_panel,
    robust_scale,
    variable_genes,
)
from scellst_ray.spots.read import read_spots

RESULT = pa.schema(
    [
        ("slide_id", pa.string()),
        ("error", pa.string()),
        ("num_spots", pa.int64()),
        ("num_links", pa.int64()),
        ("share_spots_with_cells", pa.float64()),
        ("mean_cells_per_spot", pa.float64()),
        ("scale", pa.list_(pa.float64())),
    ]
)


@dataclass(frozen=True)
class TrainingSlide:
    """A slide with spots, as found in the manifest and in the run that extracted its cells."""

    row: SlideRow
    mpp: float

    def spots_row(self) -> dict[str, Any]:
        """Return the manifest row as the spot readers take it."""
        return {**self.row.columns, "slide_id": self.row.slide_id, "mpp": self.mpp}


def training_slides(
    rows: Sequence[SlideRow], run: RunFolder, wanted: Sequence[str] | None
) -> list[TrainingSlide]:
    """Match the manifest with the slides of an `extract` run.

    Args:
        rows: The manifest.
        run: The run that holds their CELLS.
        wanted: slide_ids to train on; all manifest rows with spots if None.

    Raises:
        ValueError: a slide is not in the manifest, has no spots there, or no CELLS in the run; all
            such slides are listed at once.
    """
    by_id = {row.slide_id: row for row in rows}
    chosen = wanted or [row.slide_id for row in rows if row.columns.get("spots")]
    records = run.records()
    problems = [f"{slide_id} is asked for twice" for slide_id in _repeated(chosen)]
    for slide_id in chosen:
        status = records.get(slide_id, {}).get("status")
        if slide_id not in by_id:
            problems.append(f"{slide_id} is not in the manifest")
        elif not by_id[slide_id].columns.get("spots"):
            problems.append(f"{slide_id} has no spots in the manifest")
        elif status != "done":
            problems.append(f"{slide_id} is {status or 'not there'} in {run.uri}, not done")
    if problems or not chosen:
        found = "; ".join(problems) or "no row of the manifest has spots"
        message = (
            f"cannot train: {found}. The manifest needs a `spots` column, and `scellst-ray "
            "extract` must have finished the slides."
        )
        raise ValueError(message)
    return [TrainingSlide(by_id[s], float(records[s]["mpp"])) for s in chosen]


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if list(names).count(name) > 1})


def choose_panel(slides: Sequence[TrainingSlide], genes: str) -> list[str]:
    """Return the gene panel: `variable:N` (from these slides only), a comma list, or a file.

    Raises:
        ValueError: spots that cannot be read (all such slides are listed at once), or a panel that
            cannot be made.
    """
    kind, _, number = genes.partition(":")
    if kind != "variable":
        return read_panel(genes.split(",") if "," in genes else genes)
    if not number.isdigit():
        message = f"genes is {genes!r}; give variable:N, a comma-separated list or a file"
        raise ValueError(message)
    log_counts, names, problems = [], [], []
    for slide in slides:
        try:
            kept = filter_counts(read_spots(slide.spots_row(), slide.mpp), slide.row.slide_id)
        except (ValueError, OSError) as error:
            problems.append(f"{slide.row.slide_id}: {error}")
            continue
        log_counts.append(log_normalise(kept.counts))
        names.append(kept.genes)
    if problems:
        message = "cannot train: " + "; ".join(problems)
        raise ValueError(message)
    return variable_genes(log_counts, names, int(number))


def make_bags(
    slide: TrainingSlide, panel: Sequence[str], run: RunFolder, out: str
) -> dict[str, Any]:
    """Write the BAGS of one slide; return what `RESULT` lists.

    A spot without cells has no bag. Targets are log-normalised and scaled per slide.

    Raises:
        ValueError: spots that cannot be read, or no spot has a cell.
    """
    source = f"slide {slide.row.slide_id}"
    spots = read_spots(slide.spots_row(), slide.mpp)
    columns = ["cell_id", "x0", "y0", "embedding"]
    cells = storage.read_table(run.cells_uri(slide.row.slide_id), columns)
    schemas.check(cells.schema, "CELLS", run.cells_uri(slide.row.slide_id))
    links = link_cells(np.column_stack([cells["x0"].to_numpy(), cells["y0"].to_numpy()]), spots)
    report = alignment_report(links, len(cells))
    kept, values_SG = panel_targets(spots, panel, source)
    filled = links.num_cells[kept] > 0
    kept, values_SG = kept[filled], values_SG[filled]
    if not len(kept):
        message = (
            f"{source}: none of its {len(spots)} spots has a cell ({report}); check the mpp, and "
            "that x and y of the spot positions are those of this image"
        )
        raise ValueError(message)
    # Scaled over the spots that train, so an empty spot has no say.
    targets_SG, scale_G = robust_scale(values_SG)
    bags = links.select(kept)
    embedding = cells["embedding"].combine_chunks().take(pa.array(bags.cell_index))
    table = pa.table(
        {
            "slide_id": pa.repeat(slide.row.slide_id, len(kept)),
            "spot_id": pa.array(np.asarray(spots.spot_id)[kept].tolist(), pa.string()),
            "x0": spots.xy0[kept, 0],
            "y0": spots.xy0[kept, 1],
            "cell_id": _bag_list(bags.offsets, cells["cell_id"].combine_chunks(), bags.cell_index),
            "embedding": pa.ListArray.from_arrays(pa.array(bags.offsets, pa.int32()), embedding),
            "target": pa.array(list(targets_SG), pa.list_(pa.float32())),
        }
    )
    schema = schemas.bags_schema(embedding.type.list_size)
    uri = storage.join(out, "bags", f"{slide.row.slide_id}.parquet")
    storage.publish_table(uri, schemas.conform(table, schema, "BAGS", run.digest))
    shares = {k: report[k] for k in ("share_spots_with_cells", "mean_cells_per_spot")}
    return {
        "slide_id": slide.row.slide_id,
        "error": None,
        "num_spots": len(kept),
        "num_links": len(bags.cell_index),
        "scale": scale_G.tolist(),
        **shares,
    }


def _bag_list(offsets: np.ndarray, values: pa.Array, index: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.take(pa.array(index)))


class _Bags:
    def __init__(
        self, slides: dict[str, TrainingSlide], panel: Sequence[str], run: RunFolder, out: str
    ) -> None:
        self.slides, self.panel, self.run, self.out = slides, panel, run, out

    def __call__(self, batch: pa.Table) -> Iterable[pa.Table]:
        for slide_id in batch["slide_id"].to_pylist():
            try:
                result = make_bags(self.slides[slide_id], self.panel, self.run, self.out)
            except ValueError as error:
                result = {"slide_id": slide_id, "error": str(error)}
            except OSError as error:  # some say no more than the path
                result = {"slide_id": slide_id, "error": f"{type(error).__name__}: {error}"}
            yield pa.Table.from_pylist([result], schema=RESULT)


def build_bags(
    slides: Sequence[TrainingSlide], panel: Sequence[str], run: RunFolder, out: str, workers: int
) -> dict[str, dict[str, Any]]:
    """Write the BAGS of all slides, in parallel; return `RESULT` rows by slide_id.

    Raises:
        ValueError: some slide's spots cannot be used; all such slides are listed at once.
    """
    DataContext.get_current().enable_progress_bars = False
    by_id = {slide.row.slide_id: slide for slide in slides}
    names = [pa.table({"slide_id": [slide.row.slide_id]}) for slide in slides]
    results = ray.data.from_arrow(names).map_batches(
        _Bags,
        fn_constructor_kwargs={"slides": by_id, "panel": list(panel), "run": run, "out": out},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        compute=ActorPoolStrategy(size=min(workers, len(slides))),
    )
    rows = {row["slide_id"]: row for row in results.take_all()}
    errors = [f"{slide_id}: {row['error']}" for slide_id, row in rows.items() if row["error"]]
    if errors:
        message = "cannot train: " + "; ".join(sorted(errors))
        raise ValueError(message)
    return rows
