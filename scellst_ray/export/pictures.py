"""Pictures of whole slides for exports."""

import logging
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scellst_ray.core.logs import log_fields, one_line
from scellst_ray.export.label_image import label_image
from scellst_ray.runs.reading import Run
from scellst_ray.runs.records import SlideRecord, known_mpp, known_size0
from scellst_ray.runs.thumbnails import Thumbnail, read_thumbnail
from scellst_ray.slides.source import ChangedFileError, open_slide
from scellst_ray.storage import DamagedFileError

logger = logging.getLogger(__name__)
PICTURE_PX = 1000
BLANK_PX = 50
# Beside outlines, a picture has 1 um per px, and at most so many px along a side.
OUTLINES_PX = 8000


@dataclass(frozen=True)
class SlideImages:
    """The images of a slide, all of one size.

    Attributes:
        picture: The slide.
        is_blank: Whether it is white, and not the slide.
        labels: Number of the cell of each px, int32 [H, W], see `label_image`; None: not wanted.
    """

    picture: Thumbnail
    is_blank: bool
    labels: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Pictures:
    """What images an export has.

    Attributes:
        run: The run.
        longest_px: Longer side, px; 0: blank pictures; None: PICTURE_PX, or with outlines what
            OUTLINES_PX says.
        outlines: Whether there is an image of the outlines.
    """

    run: Run
    longest_px: int | None
    outlines: bool = False

    def of(self, slide_id: str) -> SlideImages:
        """Make the images of a slide with cells."""
        record = self.run.records[slide_id]
        width0, height0 = known_size0(record)
        side = self.longest_px
        if side is None:
            side_um = math.ceil(max(width0, height0) * known_mpp(record))
            side = min(OUTLINES_PX, side_um) if self.outlines else PICTURE_PX
        picture = slide_picture(self.run, slide_id, side) if side else None
        images = images_of(record, picture, blank_px=side if self.outlines and side else BLANK_PX)
        if not self.outlines:
            return images
        shape = images.picture.image.shape[:2]
        labels, lost = label_image(self.run, slide_id, shape, images.picture.ratio)
        if lost:
            text = (
                "slide %s: %d of its cells have no px in the image of outlines, so squidpy may give"
                " cells the colours of others: give a larger --picture-px"
            )
            logger.warning(text, slide_id, lost, extra=log_fields(slide_id))
        return replace(images, labels=labels)


def images_of(
    record: SlideRecord, picture: Thumbnail | None, blank_px: int = BLANK_PX
) -> SlideImages:
    """Return a slide's picture, or a white one of so many px if there is none."""
    if picture is not None:
        return SlideImages(picture, is_blank=False)
    return SlideImages(blank_picture(*known_size0(record), blank_px), is_blank=True)


def slide_picture(run: Run, slide_id: str, longest_px: int = PICTURE_PX) -> Thumbnail | None:
    """Return a slide's picture: the thumbnail that the run keeps, or a larger one of the slide.

    The slide is read only if the thumbnail has fewer px. If it cannot be read, or its file is gone
    or another one than that in which the run found the cells, the thumbnail is returned; without
    one, None, and a warning is logged.

    Args:
        run: The run, which knows the slide's URI and resolution.
        slide_id: The slide.
        longest_px: Length of the picture's longer side at most, px.
    """
    record = run.records[slide_id]
    try:
        kept = read_thumbnail(run.folder, record)
    except DamagedFileError as error:
        logger.warning("slide %s: %s", slide_id, error, extra=log_fields(slide_id))
        kept = None
    if kept is not None and max(kept.image.shape) >= longest_px:
        return _smaller(kept, longest_px)
    uri = run.sources[slide_id]["uri"]
    try:
        with open_slide(uri, record["mpp"], recorded=record.get("source")) as opened:
            slide = opened.slide
            longest0 = max(slide.width0, slide.height0)
            image, _ = slide.overview(slide.mpp * max(1.0, longest0 / longest_px))
        return Thumbnail(image, longest0 / max(image.shape[:2]))
    except (OSError, ValueError) as error:
        if kept is None:
            text = "slide %s: %s; it is exported with a blank picture"
            logger.warning(text, slide_id, _reason(uri, error), extra=log_fields(slide_id))
        return kept


def _reason(uri: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{uri} is gone"
    if isinstance(error, ChangedFileError):
        return f"{uri} is another file now"
    text = one_line(str(error))
    return text if uri in text else f"{uri}: {text}"


def _smaller(picture: Thumbnail, longest_px: int) -> Thumbnail:
    """Return a picture whose longer side has so many px."""
    height, width = picture.image.shape[:2]
    factor = max(height, width) / longest_px
    size = (max(1, round(width / factor)), max(1, round(height / factor)))
    image = Image.fromarray(picture.image).resize(size, Image.Resampling.BOX)
    return Thumbnail(np.asarray(image), picture.ratio * max(height, width) / max(size))


def blank_picture(width0: int, height0: int, longest_px: int = BLANK_PX) -> Thumbnail:
    """Return a white picture of a slide. Without a picture, scanpy and squidpy do not plot."""
    ratio = max(width0, height0) / longest_px
    shape = (max(1, round(height0 / ratio)), max(1, round(width0 / ratio)), 3)
    return Thumbnail(np.full(shape, 255, np.uint8), ratio)
