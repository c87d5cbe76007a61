"""An `extract` run of two small slides made by hand, with the spots of both; no image is read."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.folder import RunFolder
from scellst_ray.slides.synthetic.slide import SyntheticConfig, make_tissue, truth_table
from scellst_ray.slides.synthetic.spots import write_space_ranger
from scellst_ray.stages.networks import vectors

DIM = 16
IDENTITY = {"encoder": "random:0", "store_embeddings": True, "segmenter": "hematoxylin"}


def write_small_run(folder, identity=IDENTITY):
    """Write run/, outs of every slide and manifest.csv below `folder`.

    One spot of every slide that has counts loses its cells.

    Returns:
        run, manifest and, by slide_id, bare: the barcode of the spot without cells.
    """
    run = RunFolder(str(folder / "run"), "0123456789abcdef")
    lines, bare = ["slide_id,uri,mpp,spots"], {}
    for number in range(2):
        slide_id = f"s{number}"
        config = SyntheticConfig(seed=number, width_um=640.0, height_um=520.0, num_genes=8)
        tissue = make_tissue(config)
        spots = tissue.spots
        outs = folder / f"{slide_id}_outs"
        write_space_ranger(outs, config, spots, tissue.programme.gene_names)
        lines.append(f"{slide_id},{slide_id}.tiff,{config.mpp},{outs.name}")
        emptied = int(np.argmax(spots.counts_SG.sum(axis=1) * spots.in_tissue))
        bare[slide_id] = str(spots.barcode[emptied])
        centre = (spots.x0[emptied], spots.y0[emptied])
        cells = _cells(slide_id, truth_table(tissue), centre, spots.radius0, number)
        signed = schemas.conform(
            cells, schemas.cells_schema(DIM, with_bbox=False), "CELLS", run.digest
        )
        storage.publish_table(run.cells_uri(slide_id), signed)
        record = {
            "slide_id": slide_id,
            "status": "done",
            "tables": ["CELLS"],
            "mpp": config.mpp,
            "num_cells": len(cells),
        }
        storage.publish_json(run.record_uri(slide_id), record)
    info = {"digest": run.digest, "identity": identity, "format_version": 1}
    storage.publish_json(f"{run.uri}/run.json", info)
    storage.publish_text(f"{run.uri}/config.yaml", "encoder: random:0\nread_mpp: null\n")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return SimpleNamespace(run=run, manifest=folder / "manifest.csv", bare=bare)


def _cells(slide_id, truth, centre, radius0, seed):
    """Return the true nuclei as CELLS, but for those under one spot."""
    x0, y0 = truth["x0"].to_numpy(), truth["y0"].to_numpy()
    there = np.hypot(x0 - centre[0], y0 - centre[1]) > radius0 + 1
    kept = truth.filter(pa.array(there))
    embedding_ND = np.random.default_rng(seed).normal(size=(len(kept), DIM)).astype(np.float16)
    columns = {
        "slide_id": pa.repeat(slide_id, len(kept)),
        # Neither ascending from 0 nor without gaps: rows and ids are not the same thing.
        "cell_id": pa.array(kept["cell_id"].to_numpy() * 3 + 1000),
        "x0": pa.array(x0[there].astype(np.float32)),
        "y0": pa.array(y0[there].astype(np.float32)),
        "area_um2": kept["area_um2"].cast(pa.float32(), safe=False),
        "nucleus_type": kept["nucleus_type"],
        "type_prob": pa.nulls(len(kept), pa.float32()),
        "polygon": kept["polygon"],
        "embedding": vectors(embedding_ND),
    }
    return pa.table(columns)
