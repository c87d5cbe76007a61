"""The spots and cells of a training slide: read, linked, and checked before the training."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core.logs import log_fields
from scellst_ray.core.resolution import CONFIRMED
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.records import SlideRecord, known_mpp
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.slides.source import ChangedFileError, open_slide
from scellst_ray.slides.tissue import TISSUE_MPP, tissue_mask
from scellst_ray.spots.alignment import Alignment, check_alignment
from scellst_ray.spots.links import Links, alignment_report, link_cells
from scellst_ray.spots.panel import DEFAULT_FILTER, CountFilter
from scellst_ray.spots.read import read_spots
from scellst_ray.spots.table import Spots, check_inside

logger = logging.getLogger(__name__)

# Every fourth px of the tissue mask is used, that is one point in 32 um.
TISSUE_STEP = 4
# A spot is on tissue if tissue, or a cell, lies within this distance. The distance to cells is
# larger, since fat, mucus and stroma have few.
PIXEL_REACH_UM, CELL_REACH_UM = 25.0, 100.0


@dataclass(frozen=True)
class Rules:
    """The rules by which spots become supervision.

    Attributes:
        limits: Thresholds of genes and spots that are measured well enough.
        with_counts: Whether to keep raw counts and size factors, for losses on counts.
        check_alignment: Whether to refuse slides whose spots do not lie on their tissue.
    """

    limits: CountFilter = DEFAULT_FILTER
    with_counts: bool = False
    check_alignment: bool = True


DEFAULT_RULES = Rules()


@dataclass(frozen=True)
class TrainingSlide:
    """A slide with spots, as found in the manifest and in the run that extracted its cells.

    Attributes:
        row: The slide's row of the manifest.
        mpp: um per level-0 px.
        size0: Width and height in level-0 px, as the run found them; None if unknown.
        source: Source in the slide's record; None in those of earlier releases.
    """

    row: SlideRow
    mpp: float
    size0: tuple[int, int] | None = None
    source: str | None = None

    def spots_row(self) -> dict[str, Any]:
        """Return the manifest row as the spot readers take it."""
        names = {"slide_id": self.row.slide_id, "mpp": self.mpp}
        return {**self.row.columns, **names, CONFIRMED: self.row.mpp_confirmed}


@dataclass(frozen=True)
class LinkedSpots:
    """The spots of a slide and the cells under them.

    Attributes:
        spots: All spots under tissue.
        links: The cells of each spot, as rows of CELLS.
        report: Shares of spots and cells for the user, and the kind of tissue compared with.
    """

    spots: Spots
    links: Links
    report: dict[str, Any]


def training_slides(
    rows: Sequence[SlideRow], run: RunFolder, wanted: Sequence[str] | None
) -> list[TrainingSlide]:
    """Match the manifest with the slides of an `extract` run.

    Args:
        rows: The manifest.
        run: The run that holds the CELLS of the slides.
        wanted: slide_ids to train on; None: all slides of the manifest with spots.

    Raises:
        ValueError: a slide is not in the manifest, has no spots there, or has no CELLS in the run.
            The message lists all such slides.
    """
    by_id = {row.slide_id: row for row in rows}
    chosen = wanted or [row.slide_id for row in rows if row.columns.get("spots")]
    records = run.records()
    problems = [f"{slide_id} is asked for twice" for slide_id in _find_repeated(chosen)]
    for slide_id in chosen:
        status = records[slide_id]["status"] if slide_id in records else None
        if slide_id not in by_id:
            problems.append(f"{slide_id} is not in the manifest")
        elif not by_id[slide_id].columns.get("spots"):
            problems.append(f"{slide_id} has no spots in the manifest")
        elif status != "done":
            problems.append(f"{slide_id} is {status or 'missing'} in {run.uri}, not done")
    if problems or not chosen:
        text = "; ".join(problems) or "no row of the manifest has spots"
        message = (
            f"cannot train: {text}. The manifest needs a `spots` column, and `scellst-ray "
            "extract` must have finished the slides."
        )
        raise ValueError(message)
    return [_training_slide(by_id[slide_id], records[slide_id]) for slide_id in chosen]


def _training_slide(row: SlideRow, record: SlideRecord) -> TrainingSlide:
    width0, height0 = record.get("width0"), record.get("height0")
    size0 = (int(width0), int(height0)) if width0 and height0 else None
    return TrainingSlide(row, known_mpp(record), size0, record.get("source"))


def _find_repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if list(names).count(name) > 1})


def link_slide(
    slide: TrainingSlide, cell_xy0: NDArray[np.floating], rules: Rules, *, see_image: bool
) -> LinkedSpots:
    """Read a slide's spots, link its cells, and check that both belong together.

    Args:
        slide: The slide.
        cell_xy0: Centroids of its cells [N, 2], level-0 px.
        rules: Whether to refuse spots that do not lie on tissue.
        see_image: Whether to find the tissue in the image, if that is a local file that can be
            read; otherwise the cells show it.

    Raises:
        ValueError: spots cannot be read, lie outside the image or off the tissue, or have no cell.
    """
    source = f"slide {slide.row.slide_id}"
    spots = read_spots(slide.spots_row(), slide.mpp)
    report: dict[str, Any] = {"num_spots_read": len(spots)}
    if rules.check_alignment and slide.size0:
        report["num_spots_outside"] = check_inside(spots, *slide.size0, source)
    links = link_cells(cell_xy0, spots)
    report |= alignment_report(links, len(cell_xy0))
    tissue_xy0 = tissue_points(slide) if see_image else None
    seen = tissue_xy0 is not None
    reach_um = max(PIXEL_REACH_UM, spots.radius0 * slide.mpp) if seen else CELL_REACH_UM
    points = cell_xy0 if tissue_xy0 is None else tissue_xy0
    found = check_alignment(spots.xy0, points, reach_um / slide.mpp, slide.size0)
    report |= {
        "share_spots_on_tissue": found.given.share_on_tissue,
        "tissue_from": "image" if seen else "cells",
    }
    _refuse_misplaced(source, links, found, rules)
    return LinkedSpots(spots, links, report)


def _refuse_misplaced(source: str, links: Links, found: Alignment, rules: Rules) -> None:
    """Refuse spots without any cell; if the rules say so, also spots that lie off the tissue."""
    remedy = (
        "Check the mpp, and that x and y of the spot positions are those of this image, or leave "
        "the slide out"
    )
    problems = []
    if not links.num_cells.any():
        problems.append(f"none of its {len(links)} spots has a cell")
    elif rules.check_alignment and found.problem:
        remedy += "; check_alignment false trains on it as it is"
    if found.problem and (rules.check_alignment or problems):
        problems.append(found.problem)
    if problems:
        message = f"{source}: {'; '.join(problems)}. {remedy}."
        raise ValueError(message)


def tissue_points(slide: TrainingSlide) -> NDArray[np.float64] | None:
    """Return points all over a slide's tissue [T, 2], level-0 px; None if it cannot be seen.

    Images on object storage are not fetched, since training needs no pixels.
    """
    if not storage.is_local(slide.row.uri):
        return None
    try:
        with open_slide(slide.row.uri, slide.mpp, recorded=slide.source) as opened:
            mpp = max(TISSUE_MPP, opened.slide.mpp)
            view, frame = opened.slide.overview(mpp)
            opened.check()
    except (OSError, ValueError) as error:
        log_args = (slide.row.slide_id, error)
        logger.log(
            logging.WARNING if isinstance(error, ChangedFileError) else logging.INFO,
            "slide %s: its cells show the tissue, since the image cannot be read: %s",
            *log_args,
            extra=log_fields(slide.row.slide_id),
        )
        return None
    mask = tissue_mask(view, mpp)[::TISSUE_STEP, ::TISSUE_STEP]
    rows, columns = np.nonzero(mask)
    return frame.to_level0(np.column_stack([columns, rows]) * TISSUE_STEP + 0.5)
