"""Folders that other tools open, written under a temporary name and then moved into place."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scellst_ray import storage


@dataclass(frozen=True)
class Kind:
    """A kind of folder.

    Attributes:
        name: What a message calls it.
        marks: Names of files, one of which every folder of this kind has.
    """

    name: str
    marks: tuple[str, ...]


ZARR = Kind("Zarr store", ("zarr.json", ".zgroup"))
EXPLORER = Kind("folder for Xenium Explorer", ("experiment.xenium",))


def publish_store(out: str, kind: Kind, write: Callable[[Path], None]) -> None:
    """Publish a folder: `write` makes it under another name beside `out`, and it is moved there.

    Args:
        out: Local path. A folder of the same kind is replaced.
        kind: What is written.
        write: Called with the path of the folder to make, which does not exist.

    Raises:
        ValueError: `out` is no local path, or something else is there. It stays.
    """
    check_store(out, kind)
    path = Path(storage.resolve(out)[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        write(folder / "new")
        if path.exists():
            path.rename(folder / "old")
        (folder / "new").rename(path)
    finally:
        shutil.rmtree(folder)


def check_store(out: str, kind: Kind) -> None:
    """Check that a folder can be published under this name; arguments and errors as above."""
    if not storage.is_local(out):
        message = (
            f"{out}: this format is written to a local folder only; give a local path, and copy "
            "the folder to the store"
        )
        raise ValueError(message)
    path = Path(storage.resolve(out)[1])
    is_empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not is_empty and not any((path / mark).exists() for mark in kind.marks):
        message = f"{out}: exists and is no {kind.name}; give another name"
        raise ValueError(message)
