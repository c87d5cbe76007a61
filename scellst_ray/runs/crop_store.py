"""Reading crops: the crops of several runs as one store.

training/crop_order.py hands them to the training. Shapes: N crops, H W px, C channels.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.crop_files import Colours, ColourSums, file_uri, index_uri
from scellst_ray.runs.documents import read_document, warn_once
from scellst_ray.runs.records import CropIndex
from scellst_ray.storage.credentials import redact
from scellst_ray.storage.retries import call_with_retries

INDEX_KEYS = ("format_version", "set", "crop_um", "crop_px", "row_group", "slides", "failed")


@dataclass(frozen=True)
class CropFile:
    """The crops of a slide.

    Attributes:
        slide_id: The slide.
        uri: Its file.
        num_crops: Number of rows.
        row_group: Number of rows of each row group but the last.
        stamp: Stamp of the file; None from earlier releases.
    """

    slide_id: str
    uri: str
    num_crops: int
    row_group: int
    stamp: storage.TableStamp | None = None


@dataclass(frozen=True)
class CropStore:
    """The crops of one or several runs.

    Attributes:
        uris: The run folders.
        num_crops: Number of crops of all slides.
        mean: Mean of each channel over all pixels of the centres that encoders see, 0-1.
        std: Standard deviation of each channel over the same pixels, 0-1.
        crop_um: Side of a crop on the slide, um.
        crop_px: Side of a crop as stored, px.
        digest: Digest of all crops.
        slides: Number of crops of each slide, by slide_id.
        failed: Reason why a slide has no crops, by slide_id.
        files: Files of the slides, by ascending slide_id.
    """

    uris: tuple[str, ...]
    num_crops: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_um: float
    crop_px: int
    digest: str
    slides: dict[str, int]
    failed: dict[str, str] = field(default_factory=dict)
    files: tuple[CropFile, ...] = ()


def open_store(uris: Sequence[str]) -> CropStore:
    """Open the crops of run folders of `extract` (or `predict`) as one store.

    Args:
        uris: The folders, in any order.

    Raises:
        ValueError: the crops of a folder are absent, unfinished or written by a newer release, or
            two folders have crops of the same slide.
    """
    uris = tuple(storage.absolute(uri) for uri in uris)
    colours, failed, files, digests = ColourSums(), {}, {}, {}
    for uri in uris:
        index = _index(uri)
        failed.update(index["failed"])
        for slide_id, crops in index["slides"].items():
            if slide_id in files:
                message = (
                    f"{uri}: has crops of slide {slide_id!r}, and so has another of the folders; "
                    "give each slide once, or rename it in one manifest"
                )
                raise ValueError(message)
            place = file_uri(uri, index["set"], slide_id)
            stamp = storage.TableStamp.from_json(crops["file"]) if "file" in crops else None
            shape = (crops["num_crops"], index["row_group"])
            files[slide_id] = CropFile(slide_id, place, *shape, stamp)
            digests[slide_id] = crops["digest"]
            centre = crops["centre"]
            colours.join(centre["num_px"], centre["sums"], centre["squares"])
    num_crops = sum(file.num_crops for file in files.values())
    if not num_crops:
        message = f"{', '.join(uris) or 'no folder'}: no crops; give runs that found cells"
        raise ValueError(message)
    mean, std = colours.mean_std()
    content = json.dumps(sorted(digests.items())).encode()
    return CropStore(
        uris,
        num_crops,
        mean,
        std,
        schemas.STORED_CROP_UM,
        schemas.STORED_CROP_PX,
        hashlib.sha256(content).hexdigest(),
        {slide_id: files[slide_id].num_crops for slide_id in sorted(files)},
        failed,
        tuple(files[slide_id] for slide_id in sorted(files)),
    )


def colours_by_slide(uri: str) -> dict[str, Colours]:
    """Return the colours of each slide's crops (their centres, which encoders see), by slide_id.

    Args:
        uri: A run folder with crops.

    Raises:
        ValueError: its crops are absent, unfinished or written by a newer release.
    """
    slides = _index(storage.absolute(uri))["slides"]
    return {
        slide_id: ColourSums.from_json(crops["centre"]).mean_std()
        for slide_id, crops in slides.items()
        if crops["num_crops"]
    }


def _index(uri: str) -> CropIndex:
    """Read the index of a run's crops."""
    place = index_uri(uri)
    if not storage.exists(place):
        is_begun = storage.exists(place.rsplit("/", 1)[0])
        message = (
            f"{uri}: its crops are not finished; run the same `scellst-ray extract` command again"
            if is_begun
            else f"{uri}: has no crops; run `scellst-ray extract` with --crops NUMBER on it"
        )
        raise ValueError(message)
    remedy = "run the same `scellst-ray extract` command again"
    index = read_document(place, CropIndex, remedy, needed=INDEX_KEYS)
    expected: dict[Literal["format_version", "crop_um", "crop_px"], float] = {
        "format_version": schemas.FORMAT_VERSION,
        "crop_um": schemas.STORED_CROP_UM,
        "crop_px": schemas.STORED_CROP_PX,
    }
    for name, value in expected.items():
        if index[name] != value:
            message = (
                f"{place}: {name} is {index[name]}; this release reads {value}. Upgrade "
                "scellst_ray, or extract the crops again."
            )
            raise ValueError(message)
    return index


def read_index(run_uri: str) -> CropIndex | None:
    """Return the content of `crops.json`; None if the run has no finished crops.

    A damaged file counts as none, and gives a warning: the crops' records say the same.
    """
    uri = index_uri(run_uri)
    try:
        return read_document(uri, CropIndex)
    except FileNotFoundError:
        return None
    except storage.DamagedFileError as error:
        warn_once(f"{error}; it is written again")
        return None


class CropFiles:
    """Reader of row groups. Several threads may use it at once."""

    def __init__(self) -> None:
        """Start without footers; each one is read once."""
        self._footers: dict[str, pq.FileMetaData] = {}

    def read(self, file: CropFile, groups: list[int], columns: list[str]) -> pa.Table:
        """Return row groups of a file; only their bytes are read from object storage."""
        return call_with_retries(partial(self._read, file, groups, columns), redact(file.uri))

    def _read(self, file: CropFile, groups: list[int], columns: list[str]) -> pa.Table:
        footer = self._footers.get(file.uri)
        with storage.open_parquet(file.uri, file.stamp, footer) as parquet:
            if footer is None:
                schemas.check(parquet.schema_arrow, "CROPS", file.uri)
                if parquet.metadata.num_rows != file.num_crops:
                    message = (
                        f"{file.uri}: holds {parquet.metadata.num_rows} crops, and held "
                        f"{file.num_crops} when the store was opened; open the store again, while "
                        "no other job changes it"
                    )
                    raise ValueError(message)
                self._footers[file.uri] = parquet.metadata
            table = parquet.read_row_groups(groups, columns=columns, use_threads=False)
        expected = sum(
            min(file.row_group, file.num_crops - group * file.row_group) for group in groups
        )
        if len(table) != expected:
            raise storage.DamagedFileError(file.uri, f"is damaged: {len(table)} of {expected} rows")
        return table


def image_bytes(column: pa.ChunkedArray) -> list[NDArray[np.uint8]]:
    """Return the bytes of each value of a binary column, without copying them."""
    images = []
    for chunk in column.chunks:
        if len(chunk):
            _, offsets, data = chunk.buffers()
            ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            values = np.frombuffer(data, np.uint8)
            images += [values[a:b] for a, b in pairwise(ends)]
    return images
