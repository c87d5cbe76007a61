"""A small run folder with every kind of file, made without Ray, and what readers make of it.

Slides: `a` and `b` are done, `c` is partial, `d` failed, `e` has shards and receipts only.
"""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import shapely
import torch

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.models.mil.head import MilHead, save_head
from scellst_ray.models.mil.stored_head import HEAD_FILE
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.crop_files import index_uri
from scellst_ray.runs.crop_store import CropFiles, colours_by_slide, open_store
from scellst_ray.runs.documents import publish_document, publish_sources
from scellst_ray.runs.folder import LEASE_FILE, begin_run, read_config
from scellst_ray.runs.lease import hold_lease
from scellst_ray.runs.reading import open_run
from scellst_ray.runs.state import read_state
from scellst_ray.runs.summary import write_summary
from scellst_ray.stages.networks import vectors
from scellst_ray.stages.tiles import MAX_CELLS_PER_TILE
from scellst_ray.stages.write import WriteShards
from tests.support.crop_runs import write_crop_run
from tests.support.mil_heads import info_of
from tests.support.run_folders import Settings, write_lease

DIM, HIDDEN = 20, 256
LEASE_S = 1.0
NUM_TILES = 3
WHEN = "2026-03-01T12:00:00+00:00"
SETTINGS = {"segmenter": "hematoxylin", "core_px": 256, "encoder": "random:0"}
CONFIG = {"manifest": "m.csv", "out": "run", "encoder": "random:0", "core_px": 256, "workers": 1}
SHAPE = {"mpp": 0.5, "read_mpp": 0.5, "width0": 1000, "height0": 1000}


def make_whole_run(folder, cells_per_tile=40):
    """Write the run; return its RunFolder."""
    torch.manual_seed(0)
    head = storage.join(str(folder), HEAD_FILE)
    save_head(f"{folder}.head", MilHead(DIM, 3, hidden_dim=HIDDEN), info_of(scaling={}))
    content = storage.read_bytes(f"{folder}.head")
    identity = Settings(
        SETTINGS
        | {"store_embeddings": True, "embedding_dim": DIM}
        | {"head": hashlib.sha256(content).hexdigest()}
    )
    run = begin_run(str(folder), "predict", identity, CONFIG)
    storage.publish_bytes(head, content)
    sources = {s: {"uri": f"/data/{s}.svs", "mpp": None, "bytes": 1000} for s in "abcde"}
    publish_sources(f"{run.uri}/slides.json", sources)
    for number, slide_id in enumerate("abce"):
        receipts = WriteShards(run)(list(_tiles(slide_id, number, cells_per_tile)))
        run.log_receipts(receipts)
        if slide_id != "e":
            record = finish_slide(run, slide_id, receipts)
            if record["status"] == "done":
                storage.remove_tree(run.shards_uri)
    _fail(run, "d")
    now = datetime.now(UTC)
    write_lease(run, now, now, LEASE_S, process="0")  # of a driver that died
    write_crop_run(run.uri, {"a": 12, "b": 5})
    index = storage.read_json(index_uri(run.uri))
    publish_document(index_uri(run.uri), index)
    write_summary(run.uri)
    return run


def _tiles(slide_id, seed, num_cells, num_tiles=NUM_TILES):
    """Yield finished tiles of a slide; one tile of `c` failed."""
    rng = np.random.default_rng(seed)
    for tile_id in range(num_tiles):
        row = {"slide_id": slide_id, "tile_id": tile_id, "num_tiles": num_tiles, "uri": "x"} | SHAPE
        if (slide_id, tile_id) == ("c", 1):
            yield row | {"stage": "read", "error_type": "OSError", "error": "a damaged tile"}
            continue
        xy = rng.uniform(20, 980, (num_cells, 2)).astype(np.float32)
        outlines = shapely.to_wkb(shapely.buffer(shapely.points(xy), 6, quad_segs=2))
        columns = {
            "slide_id": pa.repeat(slide_id, num_cells),
            "cell_id": np.arange(num_cells) + tile_id * MAX_CELLS_PER_TILE,
            "x0": xy[:, 0],
            "y0": xy[:, 1],
            "area_um2": rng.uniform(20, 80, num_cells).astype(np.float32),
            "nucleus_type": pa.array(rng.choice(["nucleus", "other"], num_cells).tolist()),
            "type_prob": rng.random(num_cells).astype(np.float32),
            "polygon": pa.array(outlines.tolist(), pa.binary()),
            "seam": np.zeros(num_cells, np.uint8),
            "embedding": vectors(rng.normal(size=(num_cells, DIM)).astype(np.float16)),
            "hidden": vectors(rng.random((num_cells, HIDDEN)).astype(np.float16)),
            "distance": rng.random(num_cells).astype(np.float16),
        }
        yield row | {"cells": pa.table(columns), "seconds_read": 0.5, "seconds_segment": 0.25}


def _fail(run, slide_id):
    row = {"slide_id": slide_id, "tile_id": -1, "num_tiles": 0, "num_cells": 0, "stage": "plan"}
    row |= {"error_type": "FileNotFoundError", "error": f"/data/{slide_id}.svs: no such file"}
    receipts = pa.Table.from_pylist([row], schema=schemas.RECEIPTS)
    run.log_receipts(receipts)
    finish_slide(run, slide_id, receipts)


READINGS = {}


def reading(function):
    """Add a way to read a run to `READINGS`."""
    READINGS[function.__name__] = function
    return function


@reading
def status(uri):
    """Return what `status` shows of slides, without times."""
    state = read_state(uri)
    names = ["slide_id", "status", "num_tiles", "tiles_done", "tiles_failed", "num_cells"]
    # Whether a slide is running or pending, the lease says: see `holder`.
    waiting = pl.col("status").replace("running", "pending")
    slides = state.slides.select([*names, "stage", "error_type", "error"]).with_columns(waiting)
    return slides.to_dicts(), state.failures.to_dicts()


@reading
def slides(uri):
    """Return the records as `run.slides` gives them."""
    return open_run(uri).slides.to_dicts()


@reading
def sources(uri):
    """Return the files of slides, as the run read them."""
    return open_run(uri).sources


@reading
def settings(uri):
    """Return run.json. The settings in config.yaml need only be readable or refused.

    Those that change results are compared with the run's digest by every driver.
    """
    return dict(open_run(uri).info), isinstance(read_config(uri), dict)


@reading
def holder(uri):
    """Return whether a driver may work on the run, once another one could take its lease."""
    lease = Path(uri, LEASE_FILE)
    content = lease.read_bytes()
    try:
        with hold_lease(uri, LEASE_S):
            return read_state(uri).holder.may_work
    finally:
        lease.write_bytes(content)


@reading
def cells(uri):
    """Return CELLS of all slides."""
    run = open_run(uri)
    return [run.cells(slide_id) for slide_id in run.choose()]


@reading
def expression(uri):
    """Return the expression of all cells, and the genes."""
    run = open_run(uri)
    return [run.expression_numpy(None, s).tobytes() for s in run.choose()], run.genes


@reading
def embeddings(uri):
    """Return the embeddings of all cells."""
    run = open_run(uri)
    return [run.embeddings(slide_id).tobytes() for slide_id in run.choose()]


@reading
def failures(uri):
    """Return the failed tiles."""
    return open_run(uri).failures().to_dicts()


@reading
def crops(uri):
    """Return all crops, and the colours of slides."""
    store, files = open_store([uri]), CropFiles()
    tables = [files.read(file, [0], schemas.CROPS.names) for file in store.files]
    return tables, (store.mean, store.std), colours_by_slide(uri), store.digest


@reading
def log(uri):
    """Return the receipts that a resume takes up, with the shards that are there."""
    run = open_run(uri).folder
    return run.receipts().drop_columns(["waited_s"])


@reading
def finish(uri):
    """Return the table that unfinished slide `e` gets."""
    run = open_run(uri).folder
    receipts = run.receipts().filter(pc.equal(run.receipts()["slide_id"], "e"))
    if len(receipts) < NUM_TILES:
        return "some tiles are done again"
    finish_slide(run, "e", receipts)
    again = open_run(uri)
    table = again.cells("e"), again.records["e"]["num_cells"]
    for name in (run.record_uri("e"), run.cells_uri("e"), run.expression_uri("e")):
        Path(name).unlink()
    return table
