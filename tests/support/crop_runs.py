"""Run folders with crops made by hand, and crops of runs in memory.

Every crop that is made shows its own number, which JPEG cannot blur.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.crop_files import ROW_GROUP, Spool, decode_into, file_uri, index_uri
from scellst_ray.runs.crop_store import CropFiles, image_bytes

PX = schemas.STORED_CROP_PX
BLOCK = 8  # px of a bit


def numbered(numbers):
    """Return crops uint8 [N, 72, 72, 3] that show these numbers in black and white squares."""
    bits_N81 = (np.asarray(numbers)[:, None] >> np.arange(81).clip(max=62)) & 1
    squares = bits_N81.reshape(-1, 9, 9).astype(np.uint8) * 255
    return squares.repeat(BLOCK, axis=1).repeat(BLOCK, axis=2)[..., None].repeat(3, axis=3)


def numbers_of(crops):
    """Return the numbers that crops show."""
    bits = crops[:, BLOCK // 2 :: BLOCK, BLOCK // 2 :: BLOCK, 0].reshape(len(crops), 81) > 127
    return bits[:, :20].astype(np.int64) @ (1 << np.arange(20))


def write_crop_run(folder, num_crops, images=None):
    """Write a run folder whose slides have these numbers of crops, numbered through from 0.

    Args:
        folder: The run folder.
        num_crops: By slide_id.
        images: Crops instead of numbered ones, by slide_id.
    """
    slides, first = {}, 0
    for slide_id, num in num_crops.items():
        cells = pa.table(
            {
                "slide_id": pa.repeat(slide_id, num),
                "cell_id": np.arange(first, first + num),
                "nucleus_type": pa.array([("a", "b")[i % 2] for i in range(num)], pa.string()),
            }
        )
        crops = numbered(np.arange(first, first + num)) if images is None else images[slide_id]
        with Spool(num) as spool:
            # Not in the order they are published in.
            rows = np.arange(num)[::-1]
            spool.add(rows, crops[rows])
            digest, _ = spool.publish(file_uri(str(folder), "set", slide_id), cells, "0123")
            totals = spool.colours.as_json()
        counts = {"num_crops": num, "num_types": {}, "num_bytes": int(spool.num_bytes.sum())}
        slides[slide_id] = counts | {"digest": digest, "centre": totals}
        first += num
    index = {
        "format_version": schemas.FORMAT_VERSION,
        "set": "set",
        "crop_um": schemas.STORED_CROP_UM,
        "crop_px": PX,
        "row_group": ROW_GROUP,
        "slides": slides,
        "failed": {},
    }
    storage.publish_json(index_uri(str(folder)), index)
    return str(folder)


def write_cells(run, slide_id, xy0, types=None):
    """Write CELLS at these places [N, 2]."""
    num = len(xy0)
    table = pa.table(
        {
            "slide_id": pa.repeat(slide_id, num),
            "cell_id": np.arange(num) * 3,
            "x0": xy0[:, 0].astype(np.float32),
            "y0": xy0[:, 1].astype(np.float32),
            "area_um2": np.ones(num, np.float32),
            "nucleus_type": pa.array(["ab"[i % 2] for i in range(num)] if types is None else types),
            "type_prob": pa.nulls(num, pa.float32()),
            "polygon": pa.repeat(b"", num),
        }
    )
    signed = schemas.conform(
        table, schemas.cells_schema(None, with_bbox=False), "CELLS", run.digest
    )
    storage.publish_table(run.cells_uri(slide_id), signed)


@dataclass(frozen=True)
class Crops:
    """Some crops in memory.

    Attributes:
        slide_id: Slides, strings [N].
        cell_id: Ids of the cells within their slides, int64 [N].
        nucleus_type: Types, strings [N].
        images_NHWC: RGB images, uint8 [N, 72, 72, 3].
    """

    slide_id: np.ndarray
    cell_id: np.ndarray
    nucleus_type: np.ndarray
    images_NHWC: np.ndarray


def read_crops(store, slide_ids=None, per_slide=None):
    """Read crops into memory.

    Args:
        store: The store.
        slide_ids: The slides, in this order; all by slide_id if None.
        per_slide: Highest number of crops of each slide, a uniform sample; all if None.

    Raises:
        ValueError: a slide has no crops in the store.
    """
    by_id = {file.slide_id: file for file in store.files}
    unknown = [s for s in slide_ids or () if s not in by_id]
    if unknown:
        message = f"no crops of slides {unknown}; choose from those of the store: {sorted(by_id)}"
        raise ValueError(message)
    tables = [schemas.CROPS.empty_table()]
    for slide_id in store.slides if slide_ids is None else slide_ids:
        file = by_id[slide_id]
        num = file.num_crops if per_slide is None else min(per_slide, file.num_crops)
        groups = range(-(-num // file.row_group))
        tables.append(CropFiles().read(file, list(groups), schemas.CROPS.names).slice(0, num))
    table = pa.concat_tables(tables).combine_chunks()
    images = np.empty((len(table), store.crop_px, store.crop_px, 3), np.uint8)
    decode_into(image_bytes(table["image"]), images)
    slides, types = (np.array(table[n].to_pylist(), str) for n in ("slide_id", "nucleus_type"))
    return Crops(slides, table["cell_id"].to_numpy(), types, images)
