"""`scellst-ray evaluate segmentation`: predicted nuclei against annotated nuclei.

This module pairs the files and finds the frame of each annotation. annotations.py reads files,
image_scores.py computes scores, commands/evaluate_segmentation.py prints and writes them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from scellst_ray import storage
from scellst_ray.core.geometry import Frame
from scellst_ray.evaluation.segmentation.annotations import (
    CELL_COLUMNS,
    NucleiFile,
    nuclei_of_cells,
    read_nuclei,
)
from scellst_ray.evaluation.segmentation.config import EvaluateSegmentationConfig, parse_region
from scellst_ray.evaluation.segmentation.detection_metrics import UNKNOWN, common_types
from scellst_ray.evaluation.segmentation.image_scores import (
    Annotated,
    ImageScores,
    score_image,
    summary,
)
from scellst_ray.runs.reading import Run, open_run
from scellst_ray.slides.manifest import absolute
from scellst_ray.slides.text_tables import number_text, read_text_table

# Columns of a manifest besides slide_id. Each is the setting of the same name for one image.
FILE_COLUMNS = ("truth", "predicted", "truth_types", "predicted_types")
COLUMNS = (*FILE_COLUMNS, "mpp", "truth_mpp", "region")


@dataclass(frozen=True)
class Evaluation:
    """Scores of all images.

    Attributes:
        images: Scores by slide_id, or by file name if the image has no slide_id.
        all: Scores of all images as one (see `image_scores.summary`).
        typed: Whether annotations and predictions have types in common.
        notes: Remarks a reader needs to interpret the scores.
    """

    images: dict[str, ImageScores]
    all: ImageScores
    typed: bool
    notes: list[str]


def evaluate_segmentation(config: EvaluateSegmentationConfig) -> Evaluation:
    """Score predicted nuclei against annotated ones.

    Raises:
        ValueError: files cannot be read or compared; the message names them.
        FileNotFoundError: a file or run does not exist.
    """
    run = open_run(config.run) if config.run is not None else None
    names = common_types(config.same_types())
    images, true_names, predicted_names = {}, set[str](), set[str]()
    for name, case in _cases(config).items():
        truth = read_nuclei(case["truth"], case.get("truth_types"))
        predicted = _read_predicted(name, case, run)
        mpp = _number(case, "mpp", name)
        if mpp is None and run is not None:
            mpp = run.records[name].get("mpp") if name in run.records else None
        annotated = _place_annotation(name, case, mpp)
        images[name] = score_image(truth, predicted, annotated, names, config.radius_um)
        true_names.update(truth.types_N.tolist())
        predicted_names.update(predicted.types_N.tolist())
    notes, typed = _about_types(config, true_names, predicted_names, names)
    return Evaluation(images, summary(list(images.values())), typed, notes)


def _cases(config: EvaluateSegmentationConfig) -> dict[str, dict[str, str]]:
    """Return the settings of every image by its name; its row goes over the common settings.

    Raises:
        ValueError: the manifest has no rows, or a row is incomplete.
    """
    common = {name: str(getattr(config, name)) for name in COLUMNS if getattr(config, name)}
    if config.manifest is None:
        return {config.slide or str(config.truth): common}
    rows = _rows(config.manifest)
    base = storage.resolve(config.manifest)[1] if storage.is_local(config.manifest) else ""
    base = (base or config.manifest).rsplit("/", 1)[0]
    cases: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, start=1):
        own = {name: text for name in COLUMNS if (text := row.get(name))}
        own |= {name: number_text(own[name]) for name in ("mpp", "truth_mpp") if name in own}
        own |= {name: absolute(own[name], base) for name in FILE_COLUMNS if name in own}
        slide_id, problem = row["slide_id"] or "", ""
        if not slide_id or slide_id in cases:
            problem = f"slide_id {slide_id!r} is empty or given twice"
        elif "truth" not in own:
            problem = f"slide {slide_id!r} has no truth; name a file with annotated nuclei"
        elif config.run is None and "predicted" not in own:
            problem = f"slide {slide_id!r} has no predicted; give one, or --run"
        if problem:
            message = f"{config.manifest}: row {number}: {problem}"
            raise ValueError(message)
        cases[slide_id] = common | own
    if not cases:
        message = f"{config.manifest}: has no rows; list at least one image"
        raise ValueError(message)
    return cases


def _rows(manifest: str) -> list[dict[str, str | None]]:
    """Return the rows of a manifest of annotated images.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is no table, or a column is missing.
    """
    if not storage.exists(manifest):
        message = f"{manifest}: no such file; check the path"
        raise FileNotFoundError(message)
    try:
        table = read_text_table(storage.read_bytes(manifest))
    except ValueError as error:
        message = f"{manifest}: cannot be read as a table: {error}"
        raise ValueError(message) from error
    for name in ("slide_id", "truth"):
        if name not in table.columns:
            near = get_close_matches(name, table.columns, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            message = (
                f"{manifest}: column {name} not found; it has {', '.join(table.columns)}{hint}"
            )
            raise ValueError(message)
    return table.rows


def _read_predicted(name: str, case: Mapping[str, str], run: Run | None) -> NucleiFile:
    """Return the nuclei to score."""
    if "predicted" in case or run is None:
        return read_nuclei(case["predicted"], case.get("predicted_types"))
    return nuclei_of_cells(run.cells(name, CELL_COLUMNS), f"CELLS of slide {name!r} of {run.uri}")


def _place_annotation(name: str, case: Mapping[str, str], mpp: float | None) -> Annotated:
    """Return the frame and the size of an annotation.

    Raises:
        ValueError: truth_mpp is given without mpp.
    """
    truth_mpp = _number(case, "truth_mpp", name)
    if truth_mpp is not None and mpp is None:
        message = f"{name}: with truth_mpp, mpp (um per px of the slide) is needed too"
        raise ValueError(message)
    ratio = truth_mpp / mpp if truth_mpp is not None and mpp is not None else 1.0
    x0, y0, *size0 = parse_region(case.get("region")) or (0.0, 0.0)
    size_px = (size0[0] / ratio, size0[1] / ratio) if size0 else None
    return Annotated(Frame(x0, y0, ratio, ratio), truth_mpp or mpp, size_px)


def _number(case: Mapping[str, str], key: str, name: str) -> float | None:
    """Return a positive number of a case; None if it is not given.

    Raises:
        ValueError: the text is no positive number.
    """
    if key not in case:
        return None
    text = case[key]
    if not re.fullmatch(r"\d*\.?\d+(e[+-]?\d+)?", text) or float(text) <= 0:
        message = f"{name}: {key} is {text!r}; expected a positive number, um per px"
        raise ValueError(message)
    return float(text)


def _about_types(
    config: EvaluateSegmentationConfig,
    true_names: set[str],
    predicted_names: set[str],
    names: tuple[Mapping[str, str], Mapping[str, str]],
) -> tuple[list[str], bool]:
    """Return notes about type names, and whether both sides have a type in common."""
    notes = []
    for side, present, index in (("annotation", true_names, 0), ("prediction", predicted_names, 1)):
        given = {pair[index] for pair in config.same_types()} - {UNKNOWN}
        if given - present:
            listed = ", ".join(sorted(given - present))
            notes.append(f"types given in --types but not in the {side}: {listed}")
    common = [
        {side.get(name, name) for name in present} - {UNKNOWN}
        for side, present in zip(names, (true_names, predicted_names), strict=True)
    ]
    for side, only in (
        ("annotation", common[0] - common[1]),
        ("prediction", common[1] - common[0]),
    ):
        if only and all(common):
            notes.append(f"types only in the {side}: {', '.join(sorted(only))} (see --types)")
    return notes, bool(common[0] & common[1])
