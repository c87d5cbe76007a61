"""Sources of a run's slides: the files behind each slide_id, so that a later change is noticed."""

from collections.abc import Sequence

from scellst_ray import storage
from scellst_ray.runs.crop_files import Colours
from scellst_ray.runs.records import SlideSource
from scellst_ray.slides.manifest import SlideRow


def sources_of(
    slides: Sequence[SlideRow], colours: dict[str, Colours] | None, *, imported: bool
) -> dict[str, SlideSource]:
    """Return the sources that decide each slide's result besides the run's settings, by slide_id.

    Args:
        slides: The manifest.
        colours: Mean and deviation of RGB by slide_id, if each slide's own normalise its crops.
        imported: Whether nuclei come from files.
    """
    sources = {}
    for slide in slides:
        source = _image(slide)
        segmentation = slide.columns.get("segmentation")
        if imported and segmentation is not None:
            source["segmentation"] = segmentation
            source["segmentation_bytes"] = storage.content_size(segmentation)
            named = _below(slide.folder, segmentation)
            if named is not None:
                source["segmentation_named"] = named
        if colours is not None:
            source["colours"] = _lists(colours.get(slide.slide_id))
        sources[slide.slide_id] = source
    return sources


def _image(slide: SlideRow) -> SlideSource:
    size = storage.content_size(slide.uri)
    source: SlideSource = {"uri": slide.uri, "mpp": slide.mpp, "bytes": size}
    named = _below(slide.folder, slide.uri)
    return source if named is None else {**source, "named": named}


def _below(folder: str, uri: str) -> str | None:
    """Return the path of a file from a folder; None if it does not lie below it."""
    return uri[len(folder) + 1 :] if folder and uri.startswith(f"{folder}/") else None


def _lists(colours: Colours | None) -> list[list[float]] | None:
    """Return colours as lists, which JSON gives back unchanged."""
    return None if colours is None else [list(part) for part in colours]
