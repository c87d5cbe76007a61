"""Run folders made by hand: slides, records, a receipts log of known times, a lease."""

import os
import socket
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import yaml

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.lease import LEASE_S, Lease


class Settings(dict):
    """An identity of any fields, as `begin_run` takes it."""

    def as_json(self):
        return dict(self)


START = datetime(2026, 3, 1, 12, tzinfo=UTC)
DIGEST = "0123456789abcdef"
MISSING = {"stage": "plan", "error_type": "FileNotFoundError", "error": "/data/x.svs: no such file"}


def after(seconds):
    return START + timedelta(seconds=seconds)


def receipt(slide_id, tile_id, num_tiles, num_cells=0, **more):
    """Return one receipt; of a failed tile with stage, error_type and error."""
    row = {"slide_id": slide_id, "tile_id": tile_id, "num_tiles": num_tiles}
    return row | {"num_cells": num_cells} | more


def record(slide_id, status, **more):
    """Return a slide record."""
    values = {"slide_id": slide_id, "status": status, "num_tiles": 4, "num_failed_tiles": 0}
    values |= {"num_cells": 0, "seconds": {}, "scellst_ray": "0.1.0", "tables": []}
    return values | {"finished": after(0).isoformat()} | more


def make_run(folder, sources, records=(), log=(), config=None, job="extract"):
    """Write a run folder.

    Args:
        folder: Where.
        sources: Bytes by slide_id.
        records: Slide records.
        log: Pairs of seconds after START and receipts, a file of the log each.
        config: Content of config.yaml; None: there is none.
        job: Which command made it.
    """
    run = RunFolder(str(folder), DIGEST)
    identity = {"job": job, "store_embeddings": False}
    info = {"digest": DIGEST, "identity": identity, "created": START.isoformat()}
    storage.publish_json(f"{run.uri}/run.json", info | {"format_version": schemas.FORMAT_VERSION})
    slides = {s: {"uri": f"/data/{s}.svs", "mpp": None, "bytes": n} for s, n in sources.items()}
    storage.publish_json(f"{run.uri}/slides.json", slides)
    for content in records:
        storage.publish_json(run.record_uri(content["slide_id"]), content)
    for number, (seconds, rows) in enumerate(log):
        table = pa.Table.from_pylist(rows, schema=schemas.RECEIPTS)
        signed = schemas.conform(table, schemas.RECEIPTS, "RECEIPTS", DIGEST)
        name = f"{after(seconds):%Y%m%dT%H%M%S%f}-{number:08x}.parquet"
        storage.publish_table(f"{run.uri}/receipts/{name}", signed)
    if config is not None:
        storage.publish_text(f"{run.uri}/config.yaml", yaml.safe_dump(config))
    return run


def write_lease(run, acquired, renewed, seconds=LEASE_S, **changes):
    """Write a lease of this process that was renewed at that time."""
    lease = Lease(run.uri, seconds)
    times = {
        "acquired": acquired.isoformat(timespec="milliseconds"),
        "renewed": renewed.isoformat(timespec="milliseconds"),
        "expires": (renewed + timedelta(seconds=seconds)).isoformat(timespec="milliseconds"),
    }
    storage.publish_json(lease.uri, lease._holder | times | {"seconds": seconds} | changes)


def here():
    """Return how this process is named as the holder of a lease."""
    return f"process {os.getpid()} on {socket.gethostname()}"
