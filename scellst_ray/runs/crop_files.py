"""CROPS on disk: which cells are sampled, how a crop is coded, and the file of a slide.

A crop is the image around one nucleus. Each cell has a random number, its priority: a hash of the
seed, its slide and its id. The cells with the lowest priorities are a uniform sample without
replacement. The sample does not depend on who draws it or in which order. A smaller sample is the
beginning of a larger one. A slide's file holds its crops in the order of their priorities, so each
stretch of it is a random sample too.

Shapes: N crops, H W px, C channels.
"""

import hashlib
import json
import mmap
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.folder import CROPS
from scellst_ray.runs.records import ColourTotals, SampleSettings

# JPEG takes a fifth of the bytes of raw pixels, is decoded four times as fast as PNG, and has a
# mean error of one grey level (benchmarks/crop_formats.py). 4:4:4 keeps the colours of stains.
CODEC = "jpeg"
QUALITY = 95
ROW_GROUP = 128
# Highest possible priority: a cutoff that leaves out no cell.
NO_CUTOFF = (1 << 64) - 1
# Constants of splitmix64 (Steele, Lea and Flood, 2014).
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
LAST_SHIFT = np.uint64(31)


def key(*parts: object) -> np.uint64:
    """Return 64 bits that depend on all parts."""
    text = json.dumps([str(part) for part in parts])
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], "<u8")[0]  # type: ignore[no-any-return]


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the output of splitmix64 for each value: uniform 64 bits, without repeats."""
    out = values + GOLDEN
    for shift, factor in MIX:
        out = (out ^ (out >> shift)) * factor
    return np.asarray(out ^ (out >> LAST_SHIFT), np.uint64)


def permutation(num: int, *parts: object) -> NDArray[np.int64]:
    """Return the numbers below `num` in an order that depends on the parts alone.

    NumPy's own permutations may change with its version.
    """
    values = splitmix64(np.arange(num, dtype=np.uint64) + key(*parts))
    return np.argsort(values, kind="stable").astype(np.int64)


@dataclass(frozen=True)
class CropSample:
    """Rule for which cells get crops.

    Attributes:
        total: Highest number of crops of all slides together.
        per_slide: Highest number of crops of a slide; None: no limit.
        per_type: Highest number of crops of a nucleus type of a slide; None: no limit.
        seed: Seed of the priorities. Another seed draws other cells.
    """

    total: int
    per_slide: int | None = None
    per_type: int | None = None
    seed: int = 0

    def as_json(self) -> SampleSettings:
        """Return the fields as `crops.json` holds them."""
        return {
            "total": self.total,
            "per_slide": self.per_slide,
            "per_type": self.per_type,
            "seed": self.seed,
        }


def priorities(seed: int, slide_id: str, cell_id: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return each cell's priority, uint64 [N]."""
    return splitmix64(splitmix64(cell_id.astype(np.uint64)) + key("crop", seed, slide_id))


def draw(
    sample: CropSample, slide_id: str, cell_id: NDArray[np.int64], nucleus_type: pa.Array
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Draw a slide's candidates: the cells that get crops if the run has no other slide.

    Args:
        sample: The rule.
        slide_id: The slide.
        cell_id: Ids of its cells [N].
        nucleus_type: Types of these cells, strings [N].

    Returns:
        Rows of the sampled cells and their priorities, ascending.
    """
    priority_N = priorities(sample.seed, slide_id, cell_id)
    order = np.lexsort((cell_id, priority_N))
    if sample.per_type is not None:
        codes = nucleus_type.dictionary_encode().indices.to_numpy()[order]
        by_type = np.argsort(codes, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(codes))])
        rank = np.empty(len(order), np.int64)
        rank[by_type] = np.arange(len(order)) - starts[codes[by_type]]
        order = order[rank < sample.per_type]
    most = min(sample.total, len(order) if sample.per_slide is None else sample.per_slide)
    order = order[:most]
    return order, priority_N[order]


class Cutoff:
    """Search for the cutoff: the priority up to which candidates of all slides fit the total."""

    def __init__(self, total: int) -> None:
        """Start without candidates; memory stays at a few times `total` numbers."""
        self.total = total
        self.lowest: list[NDArray[np.uint64]] = []
        self.num = 0

    def add(self, priority_N: NDArray[np.uint64]) -> None:
        """Add a slide's candidates."""
        self.lowest.append(priority_N)
        self.num += len(priority_N)
        if self.num > 4 * self.total + 1_000_000:
            # One more than the total, to know whether any candidate is left out.
            lowest = np.partition(np.concatenate(self.lowest), self.total)[: self.total + 1]
            self.lowest, self.num = [lowest], len(lowest)

    def value(self) -> int:
        """Return the highest priority that at most `total` candidates do not exceed."""
        ascending = np.sort(np.concatenate([*self.lowest, np.zeros(0, np.uint64)]))
        if len(ascending) <= self.total:
            return NO_CUTOFF
        below = ascending[ascending < ascending[self.total]]
        return int(below[-1]) if len(below) else 0


# Mean and standard deviation of red, green and blue, 0-1.
Colours = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass
class ColourSums:
    """Sums over the pixels of the centres of crops. They are exact, so their order is irrelevant.

    Attributes:
        num_px: Number of pixels.
        sums: Sum of the values 0-255 of each channel.
        squares: Sum of their squares.
    """

    num_px: int = 0
    sums: list[int] = field(default_factory=lambda: [0, 0, 0])
    squares: list[int] = field(default_factory=lambda: [0, 0, 0])

    @classmethod
    def from_json(cls, stored: ColourTotals) -> Self:
        """Return the sums that a record holds; keys of later releases are passed over."""
        return cls(stored["num_px"], stored["sums"], stored["squares"])

    def add(self, crops_NHWC: NDArray[np.uint8]) -> None:
        """Add the centres of crops, the part that an encoder sees."""
        first = (crops_NHWC.shape[1] - schemas.CROP_PX) // 2
        end = first + schemas.CROP_PX
        centre = crops_NHWC[:, first:end, first:end].reshape(-1, 3).astype(np.uint64)
        self.join(len(centre), centre.sum(axis=0).tolist(), (centre**2).sum(axis=0).tolist())

    def join(self, num_px: int, sums: Iterable[int], squares: Iterable[int]) -> None:
        """Add other sums."""
        self.num_px += num_px
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares, squares, strict=True)]

    def as_json(self) -> ColourTotals:
        """Return the fields as the record of a slide's crops holds them."""
        return {"num_px": self.num_px, "sums": self.sums, "squares": self.squares}

    def mean_std(self) -> Colours:
        """Return mean and standard deviation of each channel, over all pixels, in 0-1."""
        num = max(self.num_px, 1)
        pairs = list(zip(self.sums, self.squares, strict=True))
        # In whole numbers, since it is the difference of two large ones.
        variances = [(num * squares - total**2) / num**2 for total, squares in pairs]
        return tuple(t / num / 255 for t in self.sums), tuple(v**0.5 / 255 for v in variances)


def encode(crop_HWC: NDArray[np.uint8]) -> bytes:
    """Return a crop, RGB, as it is stored."""
    import cv2  # noqa: PLC0415 - 18 MB that reading a run's state does not need

    parameters = (
        cv2.IMWRITE_JPEG_QUALITY,
        QUALITY,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    )
    done, coded = cv2.imencode(".jpg", cv2.cvtColor(crop_HWC, cv2.COLOR_RGB2BGR), parameters)
    assert done
    return bytes(coded.tobytes())


def decode_into(images: Sequence[NDArray[np.uint8]], out_NHWC: NDArray[np.uint8]) -> None:
    """Decode stored crops (uint8 arrays of bytes) into the rows of an array."""
    import cv2  # noqa: PLC0415 - as in encode

    for image, out in zip(images, out_NHWC, strict=True):
        decoded = cv2.imdecode(image, cv2.IMREAD_COLOR)
        if decoded is None or decoded.shape != out.shape:
            message = f"a crop of {len(image)} bytes cannot be decoded; extract the crops again"
            raise ValueError(message)
        cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB, dst=out)


class Spool:
    """Coded crops on this node's disk, which are cut by place and written by priority."""

    def __init__(self, num_crops: int) -> None:
        """Prepare for `num_crops` crops."""
        self.start = np.zeros(num_crops, np.int64)
        self.num_bytes = np.zeros(num_crops, np.int64)
        self.colours = ColourSums()
        self._end = 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the spool

    def __enter__(self) -> Self:
        """Return this spool."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the file."""
        self._file.close()

    def add(self, rows: NDArray[np.int64], crops_NHWC: NDArray[np.uint8]) -> None:
        """Add the crops of some rows."""
        self.colours.add(crops_NHWC)
        for row, crop_HWC in zip(rows, crops_NHWC, strict=True):
            image = encode(crop_HWC)
            self._file.write(image)
            self.start[row], self.num_bytes[row] = self._end, len(image)
            self._end += len(image)

    def publish(self, uri: str, cells: pa.Table, run_digest: str) -> tuple[str, storage.TableStamp]:
        """Write the file of a slide; return a digest of its content, and the file's stamp.

        Args:
            uri: URI of the file.
            cells: slide_id, cell_id and nucleus_type of the rows.
            run_digest: Digest of the run that has the cells.
        """
        extra = {
            b"scellst_ray.codec": CODEC.encode(),
            b"scellst_ray.crop_um": str(schemas.STORED_CROP_UM).encode(),
            b"scellst_ray.crop_px": str(schemas.STORED_CROP_PX).encode(),
        }
        schema = schemas.sign_schema(schemas.CROPS, "CROPS", run_digest, extra)
        digest = hashlib.sha256()
        self._file.flush()

        def write(writer: pq.ParquetWriter) -> None:
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                for first in range(0, len(cells), ROW_GROUP):
                    rows = range(first, min(first + ROW_GROUP, len(cells)))
                    images = [data[self.start[i] : self.start[i] + self.num_bytes[i]] for i in rows]
                    group = cells.slice(first, len(rows)).append_column(
                        "image", pa.array(images, pa.binary())
                    )
                    digest.update(group["cell_id"].to_numpy().astype("<i8").tobytes())
                    digest.update(b"".join(images))
                    writer.write_table(group.select(schema.names).cast(schema))

        options: dict[str, object] = {
            # Coded images do not shrink, and the least and greatest of them say nothing.
            "compression": {n: storage.COMPRESSION for n in schema.names if n != "image"},
            "write_statistics": ["slide_id", "cell_id"],
        }
        stamp = storage.publish_stamped(uri, schema, write, **options)
        return digest.hexdigest(), stamp


def crops_uri(run_uri: str) -> str:
    """Return the folder of all crops of a run."""
    return storage.join(run_uri, CROPS)


def index_uri(run_uri: str) -> str:
    """Return the URI of the index of a run's crops."""
    return storage.join(crops_uri(run_uri), "crops.json")


def set_uri(run_uri: str, set_id: str) -> str:
    """Return the folder of one set of crops."""
    return storage.join(crops_uri(run_uri), set_id)


def file_uri(run_uri: str, set_id: str, slide_id: str) -> str:
    """Return the URI of the crops of a slide."""
    return storage.join(set_uri(run_uri, set_id), f"{slide_id}.parquet")
