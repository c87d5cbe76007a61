"""The source of a slide: a short text for all that decides its result besides the run's settings.

A source has three parts joined by '-': CONTENT and CHANGED of the slide's file (see
storage/fingerprint.py), and REST, a digest of what else the manifest and other files say of the
slide. Tiles of two sources never meet in one table.
"""

import hashlib
import json

from scellst_ray.stages.rows import PendingSlide
from scellst_ray.stages.tiles import CellsSpec
from scellst_ray.storage import node_cache
from scellst_ray.storage.fingerprint import Fingerprint


def source_of(
    row: PendingSlide, spec: CellsSpec, file: Fingerprint, segmentation: Fingerprint | None
) -> str:
    """Return the source of a slide.

    Args:
        row: The slide.
        spec: Settings of the computation.
        file: Fingerprint of the slide's file.
        segmentation: Fingerprint of its file of imported nuclei; None without one.
    """
    colours = None if spec.colours is None else spec.colours.get(row["slide_id"])
    rest = json.dumps([row["mpp"], None if segmentation is None else str(segmentation), colours])
    return f"{file}-{hashlib.sha256(rest.encode()).hexdigest()[:8]}"


def present_source(row: PendingSlide, spec: CellsSpec) -> str | None:
    """Return the source of a slide as its files are now; None if they cannot be found.

    Args:
        row: The slide. Its files are looked up and not fetched.
        spec: Settings of the computation.
    """
    file, segmentation = node_cache.fingerprint(row["uri"]), None
    if spec.segmenter == "imported" and row["segmentation"]:
        segmentation = node_cache.fingerprint(row["segmentation"])
        if segmentation is None:
            return None
    return None if file is None else source_of(row, spec, file, segmentation)
