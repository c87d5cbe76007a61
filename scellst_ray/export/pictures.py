"""Pictures of whole slides for exports."""

import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scellst_ray.core.logs import log_fields
from scellst_ray.runs.reading import Run
from scellst_ray.slides.source import ChangedFileError, open_slide

logger = logging.getLogger(__name__)
THUMBNAIL_PX = 1000
BLANK_PX = 50


class Thumbnail(NamedTuple):
    """A picture of a whole slide.

    Attributes:
        image: RGB uint8 [H, W, 3].
        ratio: Level-0 px per px of the image.
    """

    image: NDArray[np.uint8]
    ratio: float


def read_thumbnail(run: Run, slide_id: str, longest_px: int = THUMBNAIL_PX) -> Thumbnail | None:
    """Read a slide's picture; return None and log a warning if the slide's file is gone.

    The same if the file is another one than that in which the run found the cells.

    Args:
        run: The run, which knows the slide's URI and resolution.
        slide_id: The slide.
        longest_px: Length of the picture's longer side, px.
    """
    record, uri = run.records[slide_id], run.sources[slide_id]["uri"]
    try:
        opened = open_slide(uri, record["mpp"], recorded=record.get("source"))
    except (FileNotFoundError, ChangedFileError) as error:
        what = "is another file now" if isinstance(error, ChangedFileError) else "is gone"
        text = "slide %s: %s %s; it is exported with a blank picture"
        logger.warning(text, slide_id, uri, what, extra=log_fields(slide_id))
        return None
    with opened:
        slide = opened.slide
        longest0 = max(slide.width0, slide.height0)
        image, _ = slide.overview(slide.mpp * max(1.0, longest0 / longest_px))
    return Thumbnail(image, longest0 / max(image.shape[:2]))


def blank_picture(width0: int, height0: int) -> Thumbnail:
    """Return a white picture of a slide. Without a picture, scanpy and squidpy do not plot."""
    ratio = max(width0, height0) / BLANK_PX
    shape = (max(1, round(height0 / ratio)), max(1, round(width0 / ratio)), 3)
    return Thumbnail(np.full(shape, 255, np.uint8), ratio)
