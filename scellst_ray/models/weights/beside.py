"""The note beside stored weights: a JSON file of the same name, with their SHA-256.

`train` and `pretrain` write it. So a head or encoder that was replaced or damaged later is refused
at every use, wherever its folder is used.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scellst_ray import storage
from scellst_ray.models.weights.digests import file_digest

logger = logging.getLogger(__name__)
SUFFIX = ".safetensors"


def note_uri(uri: str) -> str | None:
    """Return the address of the note beside a file of weights; None if it can have none."""
    return f"{uri.removesuffix(SUFFIX)}.json" if uri.endswith(SUFFIX) else None


def publish_with_note(uri: str, info: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """Publish the note beside a file of weights, then the file.

    Args:
        uri: Path or URI of the file, ending in `.safetensors`.
        info: Content of the note; the SHA-256 of the file is added.
        write: Function that fills a local file.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "weights")
        write(made)
        sha256 = file_digest(made).removeprefix("sha256:")
        storage.publish_json(f"{uri.removesuffix(SUFFIX)}.json", {**info, "sha256": sha256})

        def copy(path: Path) -> None:
            shutil.copyfile(made, path)

        storage.publish(uri, copy)


def check_beside(uri: str, sha256: str) -> None:
    """Refuse weights whose SHA-256 is not that of the note beside them, if there is one.

    Args:
        uri: Path or URI of the file.
        sha256: SHA-256 of the file in hex, with or without 'sha256:' before it.

    Raises:
        ValueError: The note states another SHA-256.
    """
    note = note_uri(uri)
    if note is None or not storage.exists(note):
        return
    try:
        content = storage.read_json(note)
    except (ValueError, RecursionError) as error:
        logger.warning("%s: cannot be read (%s); %s is used unverified", note, error, uri)
        return
    stated = content.get("sha256") if isinstance(content, dict) else None
    found = sha256.removeprefix("sha256:")
    if stated is not None and stated != found:
        message = (
            f"{uri}: its SHA-256 is {found[:16]}..., and {note} states {str(stated)[:16]}...; the "
            "file was replaced or damaged: put the right one back, or remove the note to use this"
        )
        raise ValueError(message)
