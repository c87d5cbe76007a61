"""Small runs to export: two slides with pictures, written by the real writers."""

import cv2
import numpy as np
import pyarrow as pa
import pytest
import shapely

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs import compaction
from scellst_ray.runs.folder import begin_run
from scellst_ray.runs.known_slides import accept_slides
from scellst_ray.runs.reading import open_run
from tests.support.run_folders import Settings
from tests.support.stored_heads import write_head

GENES = ["EPCAM", "CD3E", "ERBB2"]
TYPES = ["Neoplastic", "immune", "stroma"]
# Rows of cells whose hidden factor is NaN.
NAN_CELLS: list[int] = []
WIDTH0, HEIGHT0, MPP = 600, 400, 0.5


def vectors(values):
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def add_slide(folder, slide_id, count, *, embedding, hidden, missing_tiles=0):
    """Finish a slide of one tile with `count` cells, through the real writer."""
    rng = np.random.default_rng(count)
    xy = (rng.uniform(0, 1, (count, 2)) * (WIDTH0, HEIGHT0)).astype(np.float32)
    columns = {
        "slide_id": pa.repeat(slide_id, count),
        "cell_id": pa.array(np.arange(count)),
        "x0": xy[:, 0],
        "y0": xy[:, 1],
        "area_um2": rng.uniform(20, 90, count).astype(np.float32),
        "nucleus_type": rng.choice(TYPES, count).tolist(),
        "type_prob": pa.nulls(count, pa.float32()),
        "polygon": shapely.to_wkb(shapely.box(*xy.T, *(xy.T + 5))).tolist(),
        "seam": np.zeros(count, np.uint8),
    }
    if embedding:
        columns["embedding"] = vectors(rng.normal(size=(count, 2048)).astype(np.float16))
    if hidden:
        hidden_NH = rng.uniform(0, 3, (count, 256)).astype(np.float16)
        hidden_NH[NAN_CELLS] = np.nan
        columns["hidden"] = vectors(hidden_NH)
    storage.publish_table(folder.shard_uri(f"{slide_id}.parquet"), pa.table(columns))
    tile = {"slide_id": slide_id, "num_tiles": 1 + missing_tiles, "num_cells": 0, "mpp": MPP}
    tile |= {"width0": WIDTH0, "height0": HEIGHT0}
    rows = [
        tile | {"tile_id": 0, "num_cells": count, "shard": f"{slide_id}.parquet", "shard_row": 0}
    ]
    rows += [tile | {"tile_id": 1 + i, "error": "cut off"} for i in range(missing_tiles)]
    receipts = {f.name: pa.array([r.get(f.name) for r in rows], f.type) for f in schemas.RECEIPTS}
    compaction.finish_slide(folder, slide_id, pa.table(receipts, schema=schemas.RECEIPTS))


def make_run(tmp_path, *, head, names=("b", "a")):
    """A run of slides b (40 cells) and a (30), with their images; or of these names."""
    uri = str(tmp_path / "run")
    identity = {"store_embeddings": not head}
    folder = begin_run(uri, "predict" if head else "extract", Settings(identity), {})
    if head:
        write_head(f"{uri}/head.safetensors", GENES)
    slides = {}
    for slide_id, count in zip(names, (40, 30), strict=True):
        add_slide(folder, slide_id, count, embedding=not head, hidden=head)
        image = np.full((HEIGHT0, WIDTH0, 3), (200, 120, 180), np.uint8)
        image[:, WIDTH0 // 2 :] = (90, 60, 140)
        cv2.imwrite(str(tmp_path / f"{slide_id}.png"), image[..., ::-1])
        slides[slide_id] = {"uri": str(tmp_path / f"{slide_id}.png"), "mpp": MPP}
    accept_slides(folder, slides, {})
    return open_run(uri)


@pytest.fixture
def predicted(tmp_path):
    return make_run(tmp_path, head=True)
