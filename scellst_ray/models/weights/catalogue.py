"""Published weights that can be fetched by name: what they are, whose, and how to know them.

No weights come with this package. `scellst-ray models fetch NAME` (fetch.py) downloads them
from where their authors publish them, and every file is checked against a digest written here.

Where the digests come from: none was computed here, since these files were out of our reach.
torchvision puts the first eight digits of the ResNet-50's SHA-256 into its file name; all of it
and the size are in many public projects. Those of CellViT are what other public projects wrote
down for their copies of the authors' files of these names: for SAM-H four agree on the whole
SHA-256, and a fifth on its first 16 digits and the size; of CellViT-256 only that fifth gives
digits and size. So `fetch` also compares with the MD5 that the Zenodo record itself states, and
says so where the two disagree.
"""

import json
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from scellst_ray.storage.cache_space import DIR_VARIABLE


@dataclass(frozen=True)
class Published:
    """A file of weights as its authors publish it.

    Attributes:
        name: What users call it.
        what: What it is, in a line.
        licence: Of the weights, as far as known.
        source: Where a person reads about it.
        url: Where the file is.
        size: Bytes.
        sha256: SHA-256 in hex, or its first digits (at least 16) where no more is known.
        record: Zenodo's description of the record that holds the file, if it is on Zenodo.
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
        """Return the name of the file, as published and in the cache."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def path(self) -> Path:
        """Return where the file is once it has been fetched."""
        return cache_folder() / self.file_name

    @property
    def lock_path(self) -> Path:
        """Return where `fetch` wrote down what it received: size, SHA-256, url and time."""
        return self.path.with_name(f"{self.file_name}.json")

    @property
    def locked(self) -> dict[str, Any]:
        """Return what `fetch` wrote down; empty before the first."""
        if not self.lock_path.is_file():
            return {}
        return dict(json.loads(self.lock_path.read_text(encoding="utf-8")))

    @property
    def expected_size(self) -> int:
        """Return the bytes of the file received, or of the one published."""
        return int(self.locked.get("size", self.size))

    @property
    def is_here(self) -> bool:
        """Tell whether the file is in the cache, whole as far as its size tells."""
        return self.path.is_file() and self.path.stat().st_size == self.expected_size


_CELLVIT_LICENCE = (
    "code: Apache-2.0 with Commons Clause (not to be sold); weights: see the record and the "
    "authors' repository"
)
_ZENODO = "https://zenodo.org/{}/15094831"

CATALOGUE = {
    published.name: published
    for published in (
        Published(
            name="cellvit-256-x40",
            what="CellViT-256, nuclei of 5 PanNuke types at 0.25 um/px, 46.8 M parameters",
            licence=_CELLVIT_LICENCE,
            source=_ZENODO.format("records"),
            url=_ZENODO.format("records") + "/files/CellViT-256-x40-AMP.pth",
            size=187_226_632,
            sha256="c58d356c92d3fd21",
            record=_ZENODO.format("api/records"),
        ),
        Published(
            name="cellvit-sam-h-x40",
            what="CellViT-SAM-H, nuclei of 5 PanNuke types at 0.25 um/px, 699.7 M parameters",
            licence=_CELLVIT_LICENCE,
            source=_ZENODO.format("records"),
            url=_ZENODO.format("records") + "/files/CellViT-SAM-H-x40-AMP.pth",
            size=2_799_319_650,
            sha256="356418f19d9d478f164c7a31f85274584fefaa02355815c09f52346c658c8ec4",
            record=_ZENODO.format("api/records"),
        ),
        Published(
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
    """Return where fetched weights are.

    $SCELLST_RAY_CACHE_DIR/models, beside copies of slides, or ~/.cache/scellst_ray/models.

    Nothing is created.
    """
    given = os.environ.get(DIR_VARIABLE)
    base = Path(given).expanduser() if given else Path.home() / ".cache" / "scellst_ray"
    return base / "models"


def is_catalogued(name: str) -> bool:
    """Tell whether this is a name of the catalogue, and not a file."""
    return name in CATALOGUE


def published(name: str) -> Published:
    """Return what is published under a name.

    Raises:
        ValueError: no such name.
    """
    if name not in CATALOGUE:
        near = get_close_matches(name, CATALOGUE, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        message = f"there are no weights {name!r}; known are {', '.join(CATALOGUE)}.{hint}"
        raise ValueError(message)
    return CATALOGUE[name]


def weights_path(name_or_path: str) -> str:
    """Return the file of a name of the catalogue; anything else is a file already, as given.

    Raises:
        ValueError: the weights of that name are not in this machine's cache, or not whole.
    """
    if not is_catalogued(name_or_path):
        return name_or_path
    found = CATALOGUE[name_or_path]
    if found.is_here:
        return str(found.path)
    state = "not here"
    if found.path.is_file():
        size = found.path.stat().st_size
        state = f"{size:,} bytes, not the {found.expected_size:,} it should be"
    message = (
        f"weights {found.name}: {found.path} is {state}; run `scellst-ray models fetch "
        f"{found.name}` on every node, or give the path of a copy that all nodes see"
    )
    raise ValueError(message)
