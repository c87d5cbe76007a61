"""The file of torchvision's ImageNet weights: found on this machine or downloaded, and verified.

torchvision verifies what it downloads but not what it finds, and opens it so that code in it runs.
Therefore this module finds and downloads the file itself. Its content is known by its SHA-256, so a
digest of the name identifies the content.
"""

import os
from pathlib import Path

from filelock import FileLock

from scellst_ray.models.weights.catalogue import CATALOGUE
from scellst_ray.models.weights.digests import ExpectedFile, file_digest
from scellst_ray.models.weights.fetch import Patience, download

ENTRY = CATALOGUE["resnet50-imagenet"]


def torch_checkpoints() -> Path:
    """Return the folder in which torch keeps files that it downloaded; it need not exist."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("TORCH_HOME") or cache / "torch").expanduser()
    return home / "hub" / "checkpoints"


def find_imagenet() -> Path | None:
    """Return the file in the cache of this project or of torch; None if both lack it.

    Raises:
        ValueError: The file there is not the published one.
    """
    places = (ENTRY.path, torch_checkpoints() / ENTRY.file_name)
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        return None
    digest = file_digest(path).removeprefix("sha256:")
    if digest != ENTRY.sha256:
        message = (
            f"encoder imagenet: {path} is not torchvision's published file: its SHA-256 is "
            f"{digest[:16]}..., expected {ENTRY.sha256[:16]}... Remove it and start again, which "
            "downloads the right one; or give your own weights as a file to --encoder"
        )
        raise ValueError(message)
    return path


def imagenet_path(patience: Patience | None = None) -> Path:
    """Return the verified file, downloaded into the cache of this project if it is absent.

    Raises:
        ValueError: The file in a cache, or the received one, is not the published one.
        OSError: The file cannot be downloaded.
    """
    found = find_imagenet()
    if found is not None:
        return found
    ENTRY.path.parent.mkdir(parents=True, exist_ok=True)
    # The processes of a node start together: one downloads, and the rest wait for it.
    with FileLock(ENTRY.path.with_name(f".{ENTRY.file_name}.wanted")):
        found = find_imagenet()
        if found is None:
            try:
                expected = ExpectedFile(ENTRY.size, ENTRY.sha256)
                download(ENTRY.url, ENTRY.path, expected, patience=patience)
            except ConnectionError as error:
                error.add_note(
                    f"encoder imagenet needs this file: copy it to {ENTRY.path} on every node, or "
                    f"run `scellst-ray models fetch {ENTRY.name} --url MIRROR`"
                )
                raise
        return found or ENTRY.path
