"""The catalogue: published weights that can be fetched by name, with licence, source and digest.

This package contains no weights. `scellst-ray models fetch NAME` (fetch.py) downloads them from
the place where their authors publish them. Every file is checked against a digest in this file.

These files were out of our reach, so the digests come from other sources:

- ResNet-50: torchvision's file name holds the first eight digits of the SHA-256. Many public
  projects state the whole SHA-256 and the size.
- CellViT-SAM-H: four public projects agree on the whole SHA-256 of their copies. A fifth project
  states its first 16 digits and the size.
- CellViT-256: only that fifth project states 16 digits and the size.

Therefore `fetch` also compares files with the MD5 that the Zenodo record states, and reports a
disagreement.
"""

import json
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from scellst_ray.models.weights.digests import file_digest
from scellst_ray.storage.cache_space import DIR_VARIABLE


@dataclass(frozen=True)
class PublishedFile:
    """A file of weights as its authors publish it.

    Attributes:
        name: Name in the catalogue.
        what: Description in one line.
        licence: Licence of the weights, as far as known.
        source: Address of a page about the weights.
        url: Address of the file.
        size: Size in bytes.
        sha256: SHA-256 in hex, or its first digits (at least 16) if no more are known.
        record: Address of the description of the Zenodo record that holds the file; None if the
            file is not on Zenodo.
    """

    name: str
    what: str
    licence: str
    source: str
    url: str
    size: int
    sha256: str
    record: str | None = None

    @property
    def file_name(self) -> str:
        """Name of the file, as published and in the cache."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def path(self) -> Path:
        """Path of the file after `fetch`."""
        return cache_folder() / self.file_name

    @property
    def lock_path(self) -> Path:
        """Path of the file where `fetch` records size, SHA-256, url and time of the download."""
        return self.path.with_name(f"{self.file_name}.json")

    @property
    def lock_content(self) -> dict[str, Any]:
        """Content of `lock_path`; empty before the first `fetch`."""
        if not self.lock_path.is_file():
            return {}
        try:
            content = dict(json.loads(self.lock_path.read_text(encoding="utf-8")))
            int(content["size"]), str(content["sha256"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            message = (
                f"{self.lock_path}: damaged ({error!r}); remove it and run `scellst-ray models "
                f"fetch {self.name}`"
            )
            raise ValueError(message) from error
        return content

    @property
    def expected_size(self) -> int:
        """Size in bytes of the received file; before the first `fetch` of the published file."""
        return int(self.lock_content.get("size", self.size))

    @property
    def expected_sha256(self) -> str:
        """SHA-256 in hex (or its first digits) of the received file; before that as published."""
        return str(self.lock_content.get("sha256", self.sha256)).lower()

    @property
    def is_here(self) -> bool:
        """Whether the file is in the cache and has the expected size."""
        return self.path.is_file() and self.path.stat().st_size == self.expected_size


_CELLVIT_LICENCE = (
    "code: Apache-2.0 with Commons Clause (not to be sold); weights: see the record and the "
    "authors' repository"
)
_ZENODO = "https://zenodo.org/{}/15094831"

CATALOGUE = {
    file.name: file
    for file in (
        PublishedFile(
            name="cellvit-256-x40",
            what="CellViT-256, nuclei of 5 PanNuke types at 0.25 um/px, 46.8 M parameters",
            licence=_CELLVIT_LICENCE,
            source=_ZENODO.format("records"),
            url=_ZENODO.format("records") + "/files/CellViT-256-x40-AMP.pth",
            size=187_226_632,
            sha256="c58d356c92d3fd21",
            record=_ZENODO.format("api/records"),
        ),
        PublishedFile(
            name="cellvit-sam-h-x40",
            what="CellViT-SAM-H, nuclei of 5 PanNuke types at 0.25 um/px, 699.7 M parameters",
            licence=_CELLVIT_LICENCE,
            source=_ZENODO.format("records"),
            url=_ZENODO.format("records") + "/files/CellViT-SAM-H-x40-AMP.pth",
            size=2_799_319_650,
            sha256="356418f19d9d478f164c7a31f85274584fefaa02355815c09f52346c658c8ec4",
            record=_ZENODO.format("api/records"),
        ),
        PublishedFile(
            name="resnet50-imagenet",
            what="ResNet-50 of torchvision, IMAGENET1K_V2: the encoder 'imagenet'",
            licence="code: BSD-3-Clause; trained on ImageNet, whose terms are for research",
            source="https://docs.pytorch.org/vision/stable/models.html",
            url="https://download.pytorch.org/models/resnet50-11ad3fa6.pth",
            size=102_540_417,
            sha256="11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",
        ),
    )
}


def cache_folder() -> Path:
    """Return the folder of fetched weights; it need not exist.

    It is $SCELLST_RAY_CACHE_DIR/models, next to the copies of slides. Without that variable it is
    ~/.cache/scellst_ray/models.
    """
    given = os.environ.get(DIR_VARIABLE)
    base = Path(given).expanduser() if given else Path.home() / ".cache" / "scellst_ray"
    return base / "models"


def is_catalogued(name: str) -> bool:
    """Return whether this is a name of the catalogue and not a file."""
    return name in CATALOGUE


def find_published(name: str) -> PublishedFile:
    """Return the entry of the catalogue under a name.

    Raises:
        ValueError: The catalogue has no such name.
    """
    if name not in CATALOGUE:
        near = get_close_matches(name, CATALOGUE, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        message = f"weights {name!r} are unknown; expected one of {', '.join(CATALOGUE)}.{hint}"
        raise ValueError(message)
    return CATALOGUE[name]


def weights_path(name_or_path: str) -> str:
    """Return the fetched file of a name of the catalogue; a path is returned as it is.

    The file's SHA-256 is compared with that of its download at every use.

    Raises:
        ValueError: The weights of that name are not in this machine's cache, or are not whole.
    """
    if not is_catalogued(name_or_path):
        return name_or_path
    entry = CATALOGUE[name_or_path]
    problem = "does not exist on this node"
    remove = "remove it and " if entry.path.is_file() else ""
    if entry.is_here:
        digest = file_digest(entry.path).removeprefix("sha256:")
        if digest.startswith(entry.expected_sha256):
            return str(entry.path)
        problem = f"has the SHA-256 {digest}, expected {entry.expected_sha256}"
    elif entry.path.is_file():
        size = entry.path.stat().st_size
        problem = f"has {size:,} bytes, expected {entry.expected_size:,}"
    message = (
        f"weights {entry.name}: {entry.path} {problem}; {remove}run `scellst-ray models fetch "
        f"{entry.name}` on every node, or give the path of a copy that all nodes see"
    )
    raise ValueError(message)
