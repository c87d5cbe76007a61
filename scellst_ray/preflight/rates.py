"""Rates from earlier runs: seconds of every stage in their records, per unit of work."""

import math
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from scellst_ray import storage
from scellst_ray.preflight.costs import UNITS, Rates, sum_by_key
from scellst_ray.runs.folder import read_config
from scellst_ray.runs.identity import StoredIdentity
from scellst_ray.runs.reading import Run, open_run
from scellst_ray.runs.records import SlideRecord, known_mpp, known_size0

# Number of slides whose tables are measured; on object storage each takes a request.
SIZED_SLIDES = 50
# Smallest number of tiles or slides from which two rates are fitted.
FIT_LEAST = 6
Setting = Literal[
    "segmenter", "segmenter_weights", "encoder", "store_embeddings", "precision", "head"
]
SAME: tuple[Setting, ...] = get_args(Setting)


def with_runs(
    rates: Rates, uris: Iterable[str], identity: StoredIdentity, *, on_gpu: bool
) -> tuple[Rates, list[str]]:
    """Return rates, replaced by those of earlier runs where known, and notes about these runs.

    Args:
        rates: Rates to replace.
        uris: Run folders.
        identity: Identity of the planned run, as far as it is known.
        on_gpu: Whether networks of the planned run use GPUs.

    Raises:
        FileNotFoundError: a run does not exist.
        ValueError: no slide of a run is finished, or a newer release wrote the run.
    """
    units = dict.fromkeys(("tiles", "cells", "mpx", "side_mpx", "mm2", "sized", "bytes"), 0.0)
    seconds: dict[str, float] = {}
    notes: list[str] = []
    by_slide: list[tuple[float, float, float]] = []
    for uri in uris:
        run = open_run(uri)
        units_of_run = _units(run)
        if not units_of_run["tiles"]:
            message = f"{uri}: no slide of this run is finished; give a run with finished slides"
            raise ValueError(message)
        units = sum_by_key([units, units_of_run])
        by_slide += _list_segmenting(run)
        suffix = "_gpu" if _on_gpu(run, notes, on_gpu=on_gpu) else ""
        seconds = sum_by_key([seconds, _seconds(run, suffix)])
        known = run.info["identity"]
        changed = [k for k in SAME if k in identity and k in known and known[k] != identity[k]]
        notes += [f"run {uri}: {k} was {known[k]}, and now is {identity[k]}" for k in changed]
    values = {
        name: value / units[UNITS[name.removesuffix("_gpu")]]
        for name, value in seconds.items()
        if value and units[UNITS[name.removesuffix("_gpu")]]
    }
    values |= split_segment(*(np.array(column) for column in zip(*by_slide, strict=True)))
    values["cells_per_mm2"] = units["cells"] / units["mm2"]
    values["cells_per_tissue_mm2"] = math.nan  # records hold no area of tissue
    if units["sized"]:
        values["stored_cell_bytes"] = units["bytes"] / units["sized"]
    if "read" in values:
        values["open"] = 0.0  # included in "read"
    return rates.replaced(values, f"run {', '.join(uris)}"), notes


def _worked_on(run: Run) -> list[SlideRecord]:
    """Return the records of slides that have tiles and did not fail."""
    return [r for r in run.records.values() if r["status"] != "failed" and r.get("num_tiles")]


def _units(run: Run) -> dict[str, float]:
    """Return the units of work of a run, by name."""
    records = _worked_on(run)
    parts = [_areas(record, *_sides_px(run)) for record in records]
    with_cells = [r for r in records if r.get("num_cells")][:SIZED_SLIDES]
    sized = {
        "sized": float(sum(record["num_cells"] for record in with_cells)),
        "bytes": float(sum(_table_bytes(run, record) for record in with_cells)),
    }
    return sum_by_key([{"tiles": 0.0}, sized, *parts])


def _sides_px(run: Run) -> tuple[int, int]:
    """Return the side of a tile's core and of the whole tile, in px as read."""
    core_px = int(run.info["identity"]["core_px"])
    return core_px, core_px + 2 * int(run.info["identity"]["halo_px"])


def _areas(record: SlideRecord, core_px: int, side_px: int) -> dict[str, float]:
    """Return the units of work of a slide; areas are its tiles' share of the whole grid."""
    tiles = record["num_tiles"] - record.get("num_failed_tiles", 0)
    read_mpp = known_mpp(record, "read_mpp")
    ratio = read_mpp / known_mpp(record)
    sides_px = [side / ratio for side in known_size0(record)]
    counts = [math.ceil(side / core_px) for side in sides_px]
    share = tiles / math.prod(counts)
    halos_px = side_px - core_px
    read_px2 = math.prod(s + n * halos_px for s, n in zip(sides_px, counts, strict=True))
    return {
        "tiles": tiles,
        "cells": record.get("num_cells", 0),
        "mpx": read_px2 * share / 1e6,
        "mm2": math.prod(sides_px) * share * read_mpp**2 / 1e6,
        "side_mpx": tiles * side_px**2 / 1e6,
    }


def _table_bytes(run: Run, record: SlideRecord) -> int:
    """Return the bytes of all tables of a slide."""
    slide_id = record["slide_id"]
    of_table = {"CELLS": run.folder.cells_uri, "EXPRESSION": run.folder.expression_uri}
    uris = (of_table[name](slide_id) for name in record.get("tables", []))
    return sum(sum(storage.sizes(uri).values()) for uri in uris)


def _list_segmenting(run: Run) -> list[tuple[float, float, float]]:
    """Return (seconds of segmenting, Mpx, cells) of each slide."""
    sides_px = _sides_px(run)
    return [
        (r["seconds"]["segment"], _areas(r, *sides_px)["mpx"], float(r.get("num_cells", 0)))
        for r in _worked_on(run)
    ]


def split_segment(
    seconds: NDArray[np.float64], mpx: NDArray[np.float64], num_cells: NDArray[np.float64]
) -> dict[str, float]:
    """Return the seconds of segmenting per Mpx ("segment") and per cell ("segment_cell").

    Both are fitted by least squares without negative values, and then scaled so that the predicted
    sum equals the measured one. With too few data, all seconds are attributed to Mpx.

    Args:
        seconds: [N], seconds of tiles or slides.
        mpx: [N], million px read.
        num_cells: [N], cells found.
    """
    if not seconds.sum() or not mpx.sum():
        return {}
    parts = np.stack([mpx, num_cells], axis=1)
    if len(seconds) < FIT_LEAST or np.linalg.matrix_rank(parts) < 2:
        return {"segment": float(seconds.sum() / mpx.sum()), "segment_cell": 0.0}
    fitted, _ = nnls(parts, seconds)
    fitted *= seconds.sum() / (parts @ fitted).sum()
    return {"segment": float(fitted[0]), "segment_cell": float(fitted[1])}


def _seconds(run: Run, suffix: str) -> dict[str, float]:
    """Return the seconds of a run's stages by name; `suffix` is added to names of networks."""
    parts = sum_by_key([record["seconds"] for record in _worked_on(run)])
    named = {"network": f"network{suffix}", "embed": f"embed{suffix}"}
    return {named.get(stage, stage): s for stage, s in parts.items() if stage in UNITS}


def _on_gpu(run: Run, notes: list[str], *, on_gpu: bool) -> bool:
    """Return whether a run used GPUs: as its configuration says, else as `on_gpu`."""
    gpus = read_config(run.uri).get("gpus")
    if gpus is None and on_gpu:
        notes.append(f"run {run.folder.uri}: unknown whether it used GPUs; the plan assumes it did")
    return on_gpu if gpus is None else bool(gpus)
