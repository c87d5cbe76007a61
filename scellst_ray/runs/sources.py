"""What a slide_id stands for in a run: noted when it begins, so that nobody changes it later."""

from collections.abc import Sequence
from typing import Any

from scellst_ray import storage
from scellst_ray.runs.crop_files import Colours
from scellst_ray.slides.manifest import SlideRow


def sources_of(
    slides: Sequence[SlideRow], colours: dict[str, Colours] | None, *, imported: bool
) -> dict[str, dict[str, Any]]:
    """Return, by slide_id, what decides a slide's result beside the settings of the run.

    Args:
        slides: The manifest.
        colours: What crops are normalised with, if slides have their own.
        imported: Whether nuclei come from files.
    """
    return {
        slide.slide_id: _image(slide)
        | (_segmentation(slide) if imported else {})
        | ({} if colours is None else {"colours": _lists(colours.get(slide.slide_id))})
        for slide in slides
    }


def _image(slide: SlideRow) -> dict[str, Any]:
    return {"uri": slide.uri, "mpp": slide.mpp, "bytes": storage.content_size(slide.uri)}


def _segmentation(slide: SlideRow) -> dict[str, Any]:
    uri = slide.columns.get("segmentation")
    if uri is None:
        return {}
    return {"segmentation": uri, "segmentation_bytes": storage.content_size(uri)}


def _lists(colours: Colours | None) -> list[list[float]] | None:
    """Return what JSON gives back unchanged."""
    return None if colours is None else [list(part) for part in colours]
