"""`scellst-ray simulate`: the paper's simulation study, condition by condition.

The study measures how well a head trained on bags predicts the expression of single cells. cells.py
and reference.py make the data, fit.py fits heads, conditions.py runs one condition.
commands/simulate.py prints, draws and writes the results.
"""

from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core.version import __version__
from scellst_ray.evaluation.simulation.cells import (
    SCENARIOS,
    choose_image_cells,
    split_cells,
    synthetic_embeddings,
)
from scellst_ray.evaluation.simulation.conditions import (
    INPUTS,
    SUPERVISIONS,
    Image,
    SpotPlan,
    make_case,
    run_condition,
)
from scellst_ray.evaluation.simulation.config import SimulateConfig
from scellst_ray.evaluation.simulation.reference import (
    Reference,
    marker_panel,
    read_reference,
    variable_panel,
)
from scellst_ray.runs.reading import open_run

PANELS = ("hvg", "markers")
CONDITION = ("panel", "scenario", "inputs", "supervision")


def simulate(config: SimulateConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the conditions of the study that have no result in `config.out` yet.

    The result of every condition (panel, scenario, inputs, supervision) is a file below
    `conditions`. After an interruption, the same call runs only the missing conditions.

    Args:
        config: Settings of the study.
        say: Called with a line of text for each finished condition.

    Returns:
        `conditions` (see run_condition), `panels`, `image`, `reference`, `config`, `scellst_ray`.

    Raises:
        ValueError: `out` holds a study with other settings, or inputs cannot be used.
    """
    out = storage.absolute(config.out)
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    reference = read_reference(
        config.reference, config.reference_types, config.num_types, config.seed
    )
    image = read_image(config)
    _check_settings(storage.join(out, "config.json"), settings)
    parts = tuple(
        split_cells(groups, config.val_share, config.seed + turn)
        for turn, groups in enumerate((image.cluster_N, reference.type_C))
    )
    panels = {name: choose_panel(config, reference, parts[1].train, name) for name in PANELS}
    plan = SpotPlan(config.num_spots, config.cells_per_spot, config.val_share, config.seed)
    results = []
    for panel, scenario in product(PANELS, SCENARIOS):
        case = make_case(image, reference, (parts[0], parts[1]), (scenario, panels[panel]), plan)
        for inputs, supervision in product(INPUTS, SUPERVISIONS):
            names = dict(zip(CONDITION, (panel, scenario, inputs, supervision), strict=True))
            uri = storage.join(out, "conditions", "_".join(names.values()) + ".json")
            if not storage.exists(uri):
                result = run_condition(image, case, inputs, supervision, config.search())
                storage.publish_json(uri, names | result)
            results.append(dict(storage.read_json(uri)))
            say(_format_condition(results[-1]))
    return {
        "conditions": results,
        "panels": panels,
        "image": image.info,
        "reference": reference.info(),
        "config": settings,
        "scellst_ray": __version__,
    }


def _check_settings(uri: str, settings: dict[str, Any]) -> None:
    """Write the settings of a new study; raise ValueError if the stored settings differ."""
    if not storage.exists(uri):
        storage.publish_json(uri, settings)
        return
    stored = storage.read_json(uri)
    changed = sorted(name for name in settings if stored.get(name) != settings[name])
    if changed:
        message = (
            f"{uri}: the stored study has another {', '.join(changed)}; give another --out, or the "
            "same settings to continue it"
        )
        raise ValueError(message)


def read_image(config: SimulateConfig) -> Image:
    """Return the image cells of the study, from a run or synthetic.

    Raises:
        ValueError: the run stores no embeddings, or has too few cells.
        FileNotFoundError: the run does not exist.
    """
    num_types, types = config.num_types, None
    if config.cells is None:
        # 1.5 times as many as needed, so that the cells nearest to the centroid are a selection.
        num_cells = num_types * (config.cells_per_cluster * 3 // 2)
        drawn = (num_cells, config.embedding_dim, num_types, config.spread, config.seed)
        embeddings, source = synthetic_embeddings(*drawn), f"synthetic, seed {config.seed}"
    else:
        embeddings, types = _read_run(config)
        source = config.cells
    rows, cluster_N = choose_image_cells(
        embeddings, num_types, config.cells_per_cluster, config.seed
    )
    info: dict[str, Any] = {
        "source": source,
        "num_cells_clustered": len(embeddings),
        "cells_per_cluster": len(rows) // num_types,
        "embedding_dim": int(embeddings.shape[1]),
    }
    if types is not None:
        info["nucleus_types"] = [_shares(types[rows[cluster_N == k]]) for k in range(num_types)]
    return Image(np.asarray(embeddings[rows], np.float32), cluster_N, info)


def _read_run(config: SimulateConfig) -> tuple[NDArray[np.floating], NDArray[np.str_]]:
    """Return embeddings and nucleus types of up to max_cells cells, the same share per slide."""
    assert config.cells is not None
    run = open_run(config.cells)
    slides = run.choose(config.slides)
    total = sum(run.records[slide_id].get("num_cells", 0) for slide_id in slides)
    share = min(1.0, config.max_cells / max(total, 1))
    rng = np.random.default_rng([config.seed, 6])
    blocks, types = [], []
    for slide_id in slides:
        embeddings = run.embeddings(slide_id)
        chosen = np.sort(rng.permutation(len(embeddings))[: int(share * len(embeddings))])
        blocks.append(embeddings[chosen])
        names = run.cells(slide_id, ["nucleus_type"])["nucleus_type"].to_pylist()
        types.append(np.array([str(name) for name in names], np.str_)[chosen])
    if not blocks:
        message = f"{config.cells}: no slide has cells; extract slides first"
        raise ValueError(message)
    return np.concatenate(blocks), np.concatenate(types)


def _shares(names: NDArray[np.str_]) -> dict[str, float]:
    """Return the share of every name, rounded to 4 decimals."""
    values, counts = np.unique(names, return_counts=True)
    return {str(v): round(float(c) / len(names), 4) for v, c in zip(values, counts, strict=True)}


def choose_panel(
    config: SimulateConfig, reference: Reference, rows: NDArray[np.int64], name: str
) -> list[str]:
    """Return the panel "hvg" or "markers", chosen on these cells of the reference."""
    if name == "hvg":
        return variable_panel(reference, rows, config.num_variable)
    return marker_panel(reference, rows, config.num_markers)


def _format_condition(result: dict[str, Any]) -> str:
    """Return the result of a condition in one line of text."""
    names = ", ".join(result[name] for name in CONDITION)
    return (
        f"{names}: PCC {result['pearson']:.3f} ({result['seconds']:.0f} s, "
        f"rate {result['learning_rate']:g}, {result['num_epochs']} epochs)"
    )
