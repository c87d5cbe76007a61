"""Rates of earlier runs: seconds of every stage in their records, over what it went over."""

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

# Slides whose tables are measured: on object storage that is a request each.
SIZED_SLIDES = 50
# Tiles or slides from which on two rates are told apart.
FIT_LEAST = 6
Setting = Literal[
    "segmenter", "segmenter_weights", "encoder", "store_embeddings", "precision", "head"
]
SAME: tuple[Setting, ...] = get_args(Setting)


def with_runs(
    rates: Rates, uris: Iterable[str], identity: StoredIdentity, *, on_gpu: bool
) -> tuple[Rates, list[str]]:
    """Return rates with those of earlier runs in their place, and what is to be known of them.

    Args:
        rates: Those to replace, as far as the runs tell.
        uris: Run folders.
        identity: Identity of the planned run, as far as it is known.
        on_gpu: Whether networks are to run on GPUs.

    Raises:
        FileNotFoundError: no run there.
        ValueError: none of a run's slides is finished, or a newer release wrote it.
    """
    units = dict.fromkeys(("tiles", "cells", "mpx", "side_mpx", "mm2", "sized", "bytes"), 0.0)
    seconds: dict[str, float] = {}
    notes: list[str] = []
    by_slide: list[tuple[float, float, float]] = []
    for uri in uris:
        run = open_run(uri)
        found = _units(run)
        if not found["tiles"]:
            message = f"{uri}: no slide of it was worked on yet; give a run that is further"
            raise ValueError(message)
        units = sum_by_key([units, found])
        by_slide += _segmented(run)
        suffix = "_gpu" if _on_gpu(run, notes, on_gpu=on_gpu) else ""
        seconds = sum_by_key([seconds, _seconds(run, suffix)])
        known = run.info["identity"]
        other = [k for k in SAME if k in identity and k in known and known[k] != identity[k]]
        notes += [f"run {uri}: {k} was {known[k]}, and now is {identity[k]}" for k in other]
    values = {
        name: value / units[UNITS[name.removesuffix("_gpu")]]
        for name, value in seconds.items()
        if value and units[UNITS[name.removesuffix("_gpu")]]
    }
    values |= split_segment(*(np.array(column) for column in zip(*by_slide, strict=True)))
    values["cells_per_mm2"] = units["cells"] / units["mm2"]
    values["cells_per_tissue_mm2"] = math.nan  # records do not tell of tissue
    if units["sized"]:
        values["stored_cell_bytes"] = units["bytes"] / units["sized"]
    if "read" in values:
        values["open"] = 0.0  # part of reading
    return rates.replaced(values, f"run {', '.join(uris)}"), notes


def _worked_on(run: Run) -> list[SlideRecord]:
    """Return the records of slides that had tiles, and not only failed ones."""
    return [r for r in run.records.values() if r["status"] != "failed" and r["num_tiles"]]


def _units(run: Run) -> dict[str, float]:
    """Return what a run went over."""
    records = _worked_on(run)
    parts = [_areas(record, *_sides_px(run)) for record in records]
    with_cells = [r for r in records if r["num_cells"]][:SIZED_SLIDES]
    sized = {
        "sized": float(sum(record["num_cells"] for record in with_cells)),
        "bytes": float(sum(_table_bytes(run, record) for record in with_cells)),
    }
    return sum_by_key([{"tiles": 0.0}, sized, *parts])


def _sides_px(run: Run) -> tuple[int, int]:
    """Return the sides of a tile's core and of all of it, px read."""
    core_px = int(run.info["identity"]["core_px"])
    return core_px, core_px + 2 * int(run.info["identity"]["halo_px"])


def _areas(record: SlideRecord, core_px: int, side_px: int) -> dict[str, float]:
    """Return what a slide's tiles were; areas as their share of the slide's whole grid."""
    tiles = record["num_tiles"] - record["num_failed_tiles"]
    read_mpp = known_mpp(record, "read_mpp")
    ratio = read_mpp / known_mpp(record)
    sides_px = [side / ratio for side in known_size0(record)]
    counts = [math.ceil(side / core_px) for side in sides_px]
    share = tiles / math.prod(counts)
    halos_px = side_px - core_px
    read_px2 = math.prod(s + n * halos_px for s, n in zip(sides_px, counts, strict=True))
    return {
        "tiles": tiles,
        "cells": record["num_cells"],
        "mpx": read_px2 * share / 1e6,
        "mm2": math.prod(sides_px) * share * read_mpp**2 / 1e6,
        "side_mpx": tiles * side_px**2 / 1e6,
    }


def _table_bytes(run: Run, record: SlideRecord) -> int:
    """Return the bytes of a slide's tables."""
    slide_id = record["slide_id"]
    of_table = {"CELLS": run.folder.cells_uri, "EXPRESSION": run.folder.expression_uri}
    uris = (of_table[name](slide_id) for name in record["tables"])
    return sum(sum(storage.sizes(uri).values()) for uri in uris)


def _segmented(run: Run) -> list[tuple[float, float, float]]:
    """Return seconds of segmenting, Mpx and cells of each slide."""
    sides_px = _sides_px(run)
    return [
        (r["seconds"]["segment"], _areas(r, *sides_px)["mpx"], float(r["num_cells"]))
        for r in _worked_on(run)
    ]


def split_segment(
    seconds: NDArray[np.float64], mpx: NDArray[np.float64], num_cells: NDArray[np.float64]
) -> dict[str, float]:
    """Return what segmenting takes for a Mpx, and for a cell on top.

    Least squares with no negative part, then scaled so that the sum is what it was. All of it is
    by Mpx where there is too little to tell them apart.

    Args:
        seconds: [N], of tiles or slides.
        mpx: [N], read.
        num_cells: [N], found.
    """
    if not seconds.sum() or not mpx.sum():
        return {}
    parts = np.stack([mpx, num_cells], axis=1)
    if len(seconds) < FIT_LEAST or np.linalg.matrix_rank(parts) < 2:
        return {"segment": float(seconds.sum() / mpx.sum()), "segment_cell": 0.0}
    found, _ = nnls(parts, seconds)
    found *= seconds.sum() / (parts @ found).sum()
    return {"segment": float(found[0]), "segment_cell": float(found[1])}


def _seconds(run: Run, suffix: str) -> dict[str, float]:
    """Return the seconds of a run's stages, those of networks under the name of their device."""
    parts = sum_by_key([record["seconds"] for record in _worked_on(run)])
    named = {"network": f"network{suffix}", "embed": f"embed{suffix}"}
    return {named.get(stage, stage): s for stage, s in parts.items() if stage in UNITS}


def _on_gpu(run: Run, notes: list[str], *, on_gpu: bool) -> bool:
    """Tell whether a run's networks were on GPUs: as its command said, else as is planned now."""
    gpus = read_config(run.uri).get("gpus")
    if gpus is None and on_gpu:
        notes.append(f"run {run.folder.uri}: not known whether it had GPUs; taken to have had them")
    return on_gpu if gpus is None else bool(gpus)
