"""Crops of one slide: a sample of its CELLS, cut from its pixels and written in random order.

Plain functions, which pipelines/crops.py maps over slides.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.core.geometry import Box
from scellst_ray.core.version import __version__
from scellst_ray.nuclei.crops import crop_nuclei
from scellst_ray.runs.crop_files import CropSample, Spool, draw, file_uri, set_uri
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.records import CropRecord, CropStatus
from scellst_ray.runs.tables import read_slide_table
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.source import open_slide
from scellst_ray.stages.rows import CropSlide

# Cells are cut in squares of this side in px read. Of a square only the part with cells is read.
WINDOW_PX = 512
# Px read beyond the crop, for interpolation.
MARGIN_PX = 2


@dataclass(frozen=True)
class CropSet:
    """A set of crops: one sample of the cells that a run had at one time.

    Attributes:
        run: The run.
        set_id: Hash of the sample and of the cells.
        sample: The size of the sample, and the seed that draws it.
        cutoff: Highest priority of a cell in the sample.
    """

    run: RunFolder
    set_id: str
    sample: CropSample
    cutoff: int

    def record_uri(self, slide_id: str) -> str:
        """Return the URI of the record of a slide's crops."""
        return storage.join(set_uri(self.run.uri, self.set_id), "records", f"{slide_id}.json")


def candidates(
    run: RunFolder, slide_id: str, sample: CropSample
) -> tuple[pa.Table, NDArray[np.uint64]]:
    """Return the cells that a slide would add if it were alone, and their ascending priorities."""
    columns = ["slide_id", "cell_id", "x0", "y0", "nucleus_type"]
    cells = read_slide_table(run, slide_id, "CELLS", columns)
    types = cells["nucleus_type"].combine_chunks()
    index, priority_N = draw(sample, slide_id, cells["cell_id"].to_numpy(), types)
    return cells.take(pa.array(index)), priority_N


def cut_slide(crops: CropSet, row: CropSlide) -> CropRecord:
    """Write the crops of a slide; return its record, not yet published.

    Args:
        crops: The set of crops.
        row: The slide.

    Raises:
        ValueError: the slide or its cells cannot be read, or its file is not that of its record.
        OSError: a file of the slide or of its cells cannot be read.
    """
    started = time.perf_counter()
    cells, priority_N = candidates(crops.run, row["slide_id"], crops.sample)
    num = int(np.searchsorted(priority_N, np.uint64(crops.cutoff), "right"))
    cells = cells.slice(0, num)
    record = record_of(crops, row["slide_id"], "done" if num else "empty")
    if not num:
        return record
    with Spool(num) as spool:
        with open_slide(row["uri"], row["mpp"], recorded=row["source"]) as opened:
            xy0 = np.column_stack([cells["x0"].to_numpy(), cells["y0"].to_numpy()])
            for rows in windows(xy0, row["read_mpp"] / row["mpp"]):
                spool.add(rows, cut_window(opened.slide, xy0[rows], row["read_mpp"]))
            opened.check()
        uri = file_uri(crops.run.uri, crops.set_id, row["slide_id"])
        digest, stamp = spool.publish(uri, cells.select(schemas.CROPS.names[:-1]), crops.run.digest)
        counts = cells["nucleus_type"].value_counts().to_pylist()
        record["num_crops"] = num
        record["num_types"] = {count["values"]: count["counts"] for count in counts}
        record["num_bytes"] = int(spool.num_bytes.sum())
        record["digest"] = digest
        record["file"] = stamp.as_json()
        record["centre"] = spool.colours.as_json()
        record["seconds"] = round(time.perf_counter() - started, 3)
        return record


def windows(xy0: NDArray[np.floating], ratio: float) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of cells that are cut together.

    Args:
        xy0: Centroids [N, 2] (x, y), level-0 px.
        ratio: Level-0 px per px read.
    """
    square_N2 = np.floor(xy0.astype(np.float64) / (WINDOW_PX * ratio)).astype(np.int64)
    order = np.lexsort((square_N2[:, 0], square_N2[:, 1]))
    changes = np.flatnonzero((np.diff(square_N2[order], axis=0) != 0).any(axis=1)) + 1
    yield from np.split(order, changes)


def cut_window(slide: Slide, xy0: NDArray[np.floating], read_mpp: float) -> NDArray[np.uint8]:
    """Read the pixels around cells and cut their crops, uint8 [N, 72, 72, 3].

    Args:
        slide: The open slide.
        xy0: Centroids [N, 2] (x, y), level-0 px.
        read_mpp: The um per px at which the cells were found, so that crops have the same pixels.
    """
    reach0 = (schemas.STORED_CROP_UM / 2 + MARGIN_PX * read_mpp) / slide.mpp
    left, top = (math.floor(value - reach0) for value in xy0.min(axis=0))
    right, bottom = (math.ceil(value + reach0) for value in xy0.max(axis=0))
    image, frame = slide.read(Box(left, top, right - left, bottom - top), read_mpp)
    px_per_um = (1 / (frame.ratio_x * slide.mpp), 1 / (frame.ratio_y * slide.mpp))
    size = (schemas.STORED_CROP_UM, schemas.STORED_CROP_PX)
    return crop_nuclei(image, frame.from_level0(xy0), px_per_um, *size)


def record_of(crops: CropSet, slide_id: str, status: CropStatus) -> CropRecord:
    """Return the fields that every record of a slide's crops has, also one without crops.

    Args:
        crops: The set of crops.
        slide_id: The slide.
        status: done, empty or failed.
    """
    return {
        "slide_id": slide_id,
        "status": status,
        "num_crops": 0,
        "cutoff": crops.cutoff,
        "scellst_ray": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
