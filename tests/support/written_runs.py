"""Runs of slides with random cells, written by the real writers (compaction, save_head)."""

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import shapely

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs import compaction
from scellst_ray.runs.folder import begin_run
from tests.support.run_folders import Settings

GENES = ["EPCAM", "CD3E", "ERBB2", "COL1A1", "KRT8"]
TILE = 1 << 20


def vectors(values):
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def shard_table(slide_id, tile_ids, cells_per_tile, rng, *, embedding, hidden):
    ids = np.concatenate([t * TILE + np.arange(cells_per_tile) for t in tile_ids])
    xy = rng.uniform(0, 1000, (len(ids), 2)).astype(np.float32)
    columns = {
        "slide_id": pa.repeat(slide_id, len(ids)),
        "cell_id": pa.array(ids),
        "x0": xy[:, 0],
        "y0": xy[:, 1],
        "area_um2": rng.uniform(20, 90, len(ids)).astype(np.float32),
        "nucleus_type": rng.choice(["epithelial", "immune"], len(ids)).tolist(),
        "type_prob": pa.nulls(len(ids), pa.float32()),
        "polygon": shapely.to_wkb(shapely.box(*xy.T, *(xy.T + 5))).tolist(),
        "seam": np.zeros(len(ids), np.uint8),
    }
    if embedding:
        columns["embedding"] = vectors(rng.normal(size=(len(ids), 2048)).astype(np.float16))
    if hidden:
        factor = rng.uniform(0, 3, (len(ids), 256 * hidden)).astype(np.float16)
        columns["hidden"] = vectors(factor)
    return pa.table(columns)


def receipts(slide_id, tiles):
    rows = [
        {"slide_id": slide_id, "num_tiles": max(0, len(tiles)), "num_cells": 0, "mpp": 0.5}
        | {"read_mpp": 0.5, "width0": 1000, "height0": 800, "seconds_read": 0.25}
        | tile
        for tile in tiles
    ]
    columns = {f.name: pa.array([r.get(f.name) for r in rows], f.type) for f in schemas.RECEIPTS}
    return pa.table(columns, schema=schemas.RECEIPTS)


def add_slide(folder, slide_id, num_tiles=6, cells_per_tile=5, bad=(), **vectors_kept):
    """Write a slide's shards, two tiles each, and finish it; return its whole table."""
    rng = np.random.default_rng(len(slide_id))
    failure = {"stage": "read", "error_type": "OpenSlideError", "error": "cut off"}
    tiles = [{"tile_id": t} | failure for t in bad]
    parts = []
    good = [t for t in range(num_tiles) if t not in bad]
    for start in range(0, len(good), 2):
        ids = good[start : start + 2]
        table = shard_table(slide_id, ids, cells_per_tile, rng, **vectors_kept)
        storage.publish_table(folder.shard_uri(f"{slide_id}-{start}.parquet"), table)
        for row, tile in enumerate(ids):
            place = {"shard": f"{slide_id}-{start}.parquet", "shard_row": row * cells_per_tile}
            tiles.append({"tile_id": tile, "num_cells": cells_per_tile} | place)
        parts.append(table)
    compaction.finish_slide(folder, slide_id, receipts(slide_id, tiles))
    return pa.concat_tables(parts) if parts else None


def make_run(uri, head=None, *, embedding=False):
    identity = {"store_embeddings": embedding}
    folder = begin_run(uri, "predict" if head else "extract", Settings(identity), {})
    if head is not None:
        from scellst_ray.models.mil.head import save_head

        info = {"genes": GENES, "scaling": {}, "embedding_dim": 8, "encoder_digest": "e"}
        save_head(f"{uri}/head.safetensors", head, info | {"training_slides": [], "metrics": {}})
    return folder


@pytest.fixture
def head():
    """A network of torch; tests with it are left out where torch is not installed."""
    import torch

    from scellst_ray.models.mil.head import MilHead

    torch.manual_seed(0)
    return MilHead(8, len(GENES))


@pytest.fixture(params=["{tmp}/run", "memory://reading/run"])
def predicted(request, tmp_path, monkeypatch, head):
    """A run with several row groups a slide, local and on a remote filesystem."""
    monkeypatch.setattr(compaction, "ROW_GROUP", 7)
    uri = request.param.format(tmp=tmp_path)
    folder = make_run(uri, head)
    table = add_slide(folder, "a", embedding=False, hidden=True)
    yield uri, table
    fs, path = fsspec.core.url_to_fs(uri)
    fs.rm(path, recursive=True)


def torch_expression(head, table, genes):
    import torch

    hidden = np.stack(table["hidden"].to_numpy())
    with torch.no_grad():
        values = head.from_hidden(torch.from_numpy(hidden)).numpy()
    return values[:, [GENES.index(gene) for gene in genes]]
