"""The run folder: what a run is, what has been done in it, and what is still pending.

Done means a record, not a file. Workers publish shards and hand back receipts, one per tile; the
driver logs the receipts; when a slide's tiles are all in, the slide is compacted and its record
published last. Whatever a crash leaves beside that is never read.
"""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from scellst_ray import __version__, schemas, storage

FINISHED = ("done", "empty")


@dataclass(frozen=True)
class RunFolder:
    """A run on local disk or object storage.

    Attributes:
        uri: The folder.
        digest: Identifies everything that changes results: a resumed run must have the same.
    """

    uri: str
    digest: str

    def cells_uri(self, slide_id: str) -> str:
        """Return where a slide's CELLS are."""
        return storage.join(self.uri, "cells", f"{slide_id}.parquet")

    def expression_uri(self, slide_id: str) -> str:
        """Return where a slide's EXPRESSION is."""
        return storage.join(self.uri, "expression", f"{slide_id}.parquet")

    def failures_uri(self, slide_id: str) -> str:
        """Return where a slide's FAILURES are."""
        return storage.join(self.uri, "failures", f"{slide_id}.parquet")

    def shards_uri(self, slide_id: str) -> str:
        """Return the folder of a slide's shards."""
        return storage.join(self.uri, "shards", slide_id)

    def record_uri(self, slide_id: str) -> str:
        """Return where a slide's record is."""
        return storage.join(self.uri, "records", f"{slide_id}.json")

    def records(self) -> dict[str, dict[str, Any]]:
        """Read all slide records, by slide_id."""
        uris = storage.list_files(storage.join(self.uri, "records"))
        values = (storage.read_json(uri) for uri in uris)
        return {str(value["slide_id"]): value for value in values}

    def log_receipts(self, receipts: pa.Table) -> None:
        """Add receipts to the log; they survive the driver from here on."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        name = f"{stamp}-{uuid.uuid4().hex[:8]}.parquet"
        table = schemas.conform(receipts, schemas.RECEIPTS, "RECEIPTS", self.digest)
        storage.publish_table(storage.join(self.uri, "receipts", name), table)

    def receipts(self) -> pa.Table:
        """Read the receipts log: the last receipt of each tile, errors included."""
        uris = storage.list_files(storage.join(self.uri, "receipts"))
        tables = [storage.read_table(uri) for uri in uris]
        if not tables:
            return schemas.RECEIPTS.empty_table()
        table = pa.concat_tables(tables)
        table = table.append_column("order", pa.array(range(len(table)), pa.int64()))
        last = table.group_by(["slide_id", "tile_id"]).aggregate([("order", "max")])
        order = pc.take(last["order_max"], pc.sort_indices(last["order_max"]))
        return table.take(order).drop_columns("order")


def open_run(
    uri: str, job: str, identity: Mapping[str, Any], config: Mapping[str, Any]
) -> RunFolder:
    """Create a run folder, or open one that was made by the same job with the same identity.

    Args:
        uri: The folder; created if absent.
        job: Which command.
        identity: Everything that changes results; its hash is the run's digest.
        config: The resolved configuration, kept beside the output for people.

    Raises:
        ValueError: the folder holds another run (the message says what differs) or other files.
    """
    # Absolute, so that it means the same in every process.
    uri = storage.absolute(uri)
    identity = {"job": job, "scellst_ray": __version__, **identity}
    text = json.dumps(identity, sort_keys=True, default=str)
    identity = json.loads(text)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    run_uri = storage.join(uri, "run.json")
    if storage.exists(run_uri):
        found = storage.read_json(run_uri)
        if found.get("digest") != digest:
            raise ValueError(_other_run(uri, found.get("identity", {}), identity))
    else:
        if storage.list_files(uri):
            message = f"{uri}: holds files that are no run of scellst_ray; give an empty folder"
            raise ValueError(message)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        run = {"digest": digest, "identity": identity, "created": created}
        storage.publish_json(run_uri, run | {"format_version": schemas.FORMAT_VERSION})
    settings = yaml.safe_dump(dict(config), sort_keys=False)
    storage.publish_text(storage.join(uri, "config.yaml"), settings)
    return RunFolder(uri, digest)


def _other_run(uri: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Say what differs between the run in a folder and the one asked for."""
    keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    differences = ", ".join(f"{k}: {found.get(k)!r} there, {wanted.get(k)!r} now" for k in keys)
    return f"{uri}: holds another run ({differences}); give another --out, or the same settings"


def check_manifest_unchanged(run: RunFolder, slides: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a manifest whose rows differ from what this run has already read under their names.

    Args:
        run: The run.
        slides: uri and mpp by slide_id, as the manifest has them now; the union is kept.

    Raises:
        ValueError: a slide_id now names another file or resolution.
    """
    uri = storage.join(run.uri, "slides.json")
    known: dict[str, Any] = storage.read_json(uri) if storage.exists(uri) else {}
    changed = [s for s, row in slides.items() if s in known and known[s] != dict(row)]
    # A slide that failed may be mended in the manifest: it is done anew.
    records = run.records() if changed else {}
    changed = [s for s in changed if records.get(s, {}).get("status") != "failed"]
    if changed:
        slide_id = changed[0]
        message = (
            f"{run.uri}: slide {slide_id!r} was read as {known[slide_id]} and is now "
            f"{dict(slides[slide_id])} ({len(changed)} such slides); give another --out, or the "
            "manifest as it was"
        )
        raise ValueError(message)
    storage.publish_json(uri, known | {key: dict(row) for key, row in slides.items()})
