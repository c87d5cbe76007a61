"""BAGS of one slide: for each spot the embeddings of its cells, and its target expression."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.tables import read_slide_table
from scellst_ray.spots.panel import Targets, filter_counts, make_targets, robust_scale, size_factors
from scellst_ray.spots.selection import Panel, Section, choose_genes, explicit_panel
from scellst_ray.spots.table import check_whole_counts
from scellst_ray.stages.supervision import (
    DEFAULT_RULES,
    LinkedSpots,
    Rules,
    TrainingSlide,
    link_slide,
)

RESULT = pa.schema(
    [
        ("slide_id", pa.string()),
        ("error", pa.string()),
        ("num_spots", pa.int64()),
        ("num_links", pa.int64()),
        ("num_spots_read", pa.int64()),
        ("num_spots_outside", pa.int64()),
        ("num_spots_passing", pa.int64()),
        ("num_genes_read", pa.int64()),
        ("num_genes_passing", pa.int64()),
        ("median_library", pa.float64()),
        ("share_spots_with_cells", pa.float64()),
        ("mean_cells_per_spot", pa.float64()),
        ("share_cells_in_spots", pa.float64()),
        ("share_cells_in_many_spots", pa.float64()),
        ("share_spots_on_tissue", pa.float64()),
        ("tissue_from", pa.string()),
        ("scale", pa.list_(pa.float64())),
    ]
)


def choose_panel(
    slides: Sequence[TrainingSlide], genes: str, run: RunFolder, rules: Rules = DEFAULT_RULES
) -> Panel:
    """Return the gene panel of a rule (see choose_genes), chosen on these slides only.

    Genes are chosen on the spots that train: those that pass the filters and have cells.

    Raises:
        ValueError: slides cannot be used (the message lists all of them), or the rule gives no
            panel.
    """
    given = explicit_panel(genes)
    if given is not None:
        return given
    sections, problems = [], []
    for slide in slides:
        try:
            sections.append(_section(slide, run, rules))
        except (ValueError, OSError) as error:
            problems.append(f"{slide.row.slide_id}: {error}")
    if problems:
        message = "cannot train: " + "; ".join(problems)
        raise ValueError(message)
    return choose_genes(genes, sections)


def _section(slide: TrainingSlide, run: RunFolder, rules: Rules) -> Section:
    slide_id = slide.row.slide_id
    cells = _read_cells(run, slide_id, ["x0", "y0"])
    linked = link_slide(slide, _xy0(cells), rules, see_image=False)
    passing = filter_counts(linked.spots, f"slide {slide_id}", rules.limits)
    kept = np.isin(linked.spots.spot_id, passing.spot_id)
    filled = linked.links.num_cells[kept] > 0
    _check_some(filled, slide_id)
    return Section(slide_id, linked.spots.genes, passing.select(filled))


def _read_cells(run: RunFolder, slide_id: str, columns: list[str]) -> pa.Table:
    return read_slide_table(run, slide_id, "CELLS", columns, whole="embedding" in columns)


def _xy0(cells: pa.Table) -> NDArray[np.floating]:
    return np.column_stack([cells["x0"].to_numpy(), cells["y0"].to_numpy()])


def _check_some(filled: NDArray[np.bool_], slide_id: str) -> None:
    """Refuse a slide without a spot to train on."""
    if not filled.any():
        message = (
            f"slide {slide_id}: none of its {len(filled)} spots that pass the filters has a cell. "
            "Check the mpp and the spot positions, or leave the slide out."
        )
        raise ValueError(message)


def make_bags(
    slide: TrainingSlide,
    panel: Sequence[str],
    run: RunFolder,
    out: str,
    rules: Rules = DEFAULT_RULES,
) -> dict[str, Any]:
    """Write the BAGS of one slide; return the columns of `RESULT`.

    A spot without cells has no bag. Targets are log-normalised and scaled per slide.

    Raises:
        ValueError: spots cannot be read, do not lie on the tissue, or have no cell. Or embeddings
            are not finite, or counts for a loss on counts are not whole numbers.
    """
    slide_id = slide.row.slide_id
    source = f"slide {slide_id}"
    cells = _read_cells(run, slide_id, ["cell_id", "x0", "y0", "embedding"])
    linked = link_slide(slide, _xy0(cells), rules, see_image=rules.check_alignment)
    if rules.with_counts:
        check_whole_counts(linked.spots, source, "a loss on counts")
    targets = make_targets(linked.spots, panel, source, rules.limits)
    filled = linked.links.num_cells[targets.kept] > 0
    _check_some(filled, slide_id)
    # Only spots that train decide the scale.
    scaled_SG, scale_G = robust_scale(targets.values_KP[filled])
    table = _bag_table(slide_id, linked, targets, filled, cells)
    table = table.append_column("target", _vectors(scaled_SG))
    if rules.with_counts:
        factors_S = size_factors(targets.library_K, source)[filled].astype(np.float32)
        table = table.append_column("counts", _vectors(targets.counts_KP[filled]))
        table = table.append_column("size_factor", pa.array(factors_S))
    dim = table["embedding"].type.value_type.list_size
    schema = schemas.bags_schema(dim, with_counts=rules.with_counts)
    uri = storage.join(out, "bags", f"{slide_id}.parquet")
    storage.publish_table(uri, schemas.conform(table, schema, "BAGS", run.digest))
    result = dict.fromkeys(RESULT.names) | linked.report
    return result | {
        "slide_id": slide_id,
        "num_spots": int(filled.sum()),
        "num_links": int(linked.links.num_cells[targets.kept].sum()),
        "num_spots_passing": len(targets.kept),
        "num_genes_read": len(linked.spots.genes),
        "num_genes_passing": targets.num_genes,
        "median_library": float(np.median(targets.library_K)),
        "scale": scale_G.tolist(),
    }


def _vectors(values_SG: NDArray[np.float32]) -> pa.Array:
    return pa.array(list(values_SG), pa.list_(pa.float32()))


def _bag_table(
    slide_id: str,
    linked: LinkedSpots,
    targets: Targets,
    filled: NDArray[np.bool_],
    cells: pa.Table,
) -> pa.Table:
    """Return the bags of the spots that train, without their targets."""
    kept = targets.kept[filled]
    bags = linked.links.select(kept)
    embedding = cells["embedding"].combine_chunks().take(pa.array(bags.cell_index))
    cell_id = cells["cell_id"].combine_chunks()
    _check_finite(embedding, cell_id.to_numpy()[bags.cell_index], slide_id)
    return pa.table(
        {
            "slide_id": pa.repeat(slide_id, len(kept)),
            "spot_id": pa.array(np.asarray(linked.spots.spot_id)[kept].tolist(), pa.string()),
            "x0": linked.spots.xy0[kept, 0],
            "y0": linked.spots.xy0[kept, 1],
            "cell_id": _bag_list(bags.offsets, cell_id, bags.cell_index),
            "embedding": pa.ListArray.from_arrays(pa.array(bags.offsets, pa.int32()), embedding),
        }
    )


def _check_finite(
    embedding: pa.FixedSizeListArray, cell_ids: NDArray[np.int64], slide_id: str
) -> None:
    """Refuse embeddings that hold NaN or infinity."""
    values_LD = np.asarray(embedding.flatten()).reshape(len(embedding), -1)
    bad_ids = np.unique(cell_ids[~np.isfinite(values_LD).all(axis=1)])
    if len(bad_ids):
        message = (
            f"slide {slide_id}: embeddings of {len(bad_ids)} cells under its spots hold NaN or "
            f"infinity, the first of cell {bad_ids[0]}. The encoder overflows or is damaged: "
            "extract again with precision float32, or another encoder."
        )
        raise ValueError(message)


def provenance(panel: Panel, rules: Rules, bags: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return how the supervision was made, as JSON for the head.

    Args:
        panel: From choose_panel.
        rules: Rules by which spots became supervision.
        bags: From build_bags.
    """
    left_out = ("slide_id", "error", "scale")  # the scale is in the head already
    return {
        "genes": panel.info,
        "filters": asdict(rules.limits),
        "targets": "log(1 + counts per 10,000 of the genes that pass), divided by the gene's range "
        "from minimum to 95 % quantile on its slide",
        "size_factors": "counts of the genes that pass over their median on the slide"
        if rules.with_counts
        else None,
        "check_alignment": rules.check_alignment,
        "slides": {
            slide_id: {key: value for key, value in row.items() if key not in left_out}
            for slide_id, row in sorted(bags.items())
        },
    }


def _bag_list(offsets: np.ndarray, values: pa.Array, index: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.take(pa.array(index)))
