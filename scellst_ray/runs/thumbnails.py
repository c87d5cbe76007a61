"""Thumbnails: a small picture of each slide, kept when the slide is planned.

Planning looks at the whole slide anyway. So whoever shows the run later reads no slide again. A
thumbnail is a JPEG whose comment says what it was made of, and has a digest of the rest.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scellst_ray import storage
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.records import SlideRecord

# Longer side of a thumbnail at most, px.
LONGEST_PX = 1000
QUALITY = 90
REMEDY = "remove it: a report then shows the slide without its picture"
# A JPEG begins with START. A segment of text begins with COMMENT and two bytes of its length.
START, COMMENT = b"\xff\xd8", b"\xff\xfe"


class Thumbnail(NamedTuple):
    """A small picture of a whole slide.

    Attributes:
        image: RGB uint8 [H, W, 3].
        ratio: Level-0 px for each of its px.
    """

    image: NDArray[np.uint8]
    ratio: float


class Origin(TypedDict):
    """What a thumbnail was made of.

    Attributes:
        slide_id: The slide.
        source: Source of the slide, as in its record; None: not known.
        ratio: Level-0 px for each px.
    """

    slide_id: str
    source: str | None
    ratio: float


def publish_thumbnail(uri: str, image: NDArray[np.uint8], origin: Origin) -> None:
    """Publish a view of a whole slide, made smaller if it is large.

    Args:
        uri: The file.
        image: RGB uint8 [H, W, 3].
        origin: What the image was made of.
    """
    height, width = image.shape[:2]
    factor = max(1.0, max(height, width) / LONGEST_PX)
    size = (max(1, round(width / factor)), max(1, round(height / factor)))
    small = Image.fromarray(image).resize(size, Image.Resampling.BOX)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    rest = buffer.getvalue().removeprefix(START)
    about = {**origin, "ratio": origin["ratio"] * width / size[0]}
    about["sha256"] = _digest(about, rest)
    text = json.dumps(about, sort_keys=True).encode()
    segment = COMMENT + (len(text) + 2).to_bytes(2, "big") + text
    storage.publish_bytes(uri, START + segment + rest)


def read_thumbnail(run: RunFolder, record: SlideRecord) -> Thumbnail | None:
    """Return the thumbnail of a slide; None if the run has none, as those of earlier releases.

    Raises:
        DamagedFileError: the file is damaged, or is of another slide or source.
    """
    uri = run.thumbnail_uri(record["slide_id"])
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    about = _origin(content, uri)
    source, made_of = record.get("source"), about.get("source")
    is_other = about["slide_id"] != record["slide_id"]
    # The first part is the content; a copy of the file may have another time.
    if source and made_of:
        is_other |= source.split("-")[0] != made_of.split("-")[0]
    if is_other:
        raise storage.DamagedFileError(uri, "is the thumbnail of another slide", REMEDY)
    with Image.open(io.BytesIO(content)) as image:
        return Thumbnail(np.asarray(image.convert("RGB")), float(about["ratio"]))


def _digest(about: Mapping[str, object], rest: bytes) -> str:
    """Return the digest of what a thumbnail says and of all bytes after that."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode() + rest).hexdigest()


def _origin(content: bytes, uri: str) -> dict[str, Any]:
    """Return what a thumbnail says that it was made of.

    Raises:
        DamagedFileError: the file is not what was written.
    """
    end = 4 + int.from_bytes(content[4:6], "big")
    about = None
    with suppress(ValueError, RecursionError):
        about = json.loads(content[6:end]) if content[:4] == START + COMMENT else None
    if not isinstance(about, dict):
        raise storage.DamagedFileError(uri, "is damaged", REMEDY)
    stated = about.pop("sha256", None)
    if stated != _digest(about, content[end:]):
        raise storage.DamagedFileError(uri, "is damaged: its digest differs", REMEDY)
    return about
