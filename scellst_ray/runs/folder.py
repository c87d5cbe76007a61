"""The run folder: what a run is, what has been done in it, and what is still pending.

Done means a record, not a file. Workers publish shards and hand back receipts, one per tile; the
driver logs the receipts; when a slide's tiles are all in, the slide is compacted and its record
published last. Whatever a crash leaves beside that is never read.
"""

import uuid
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.identity import Identity, stored_identity
from scellst_ray.runs.records import RunInfo, SlideRecord, SlideSource
from scellst_ray.storage.credentials import refuse_credentials

FINISHED = ("done", "empty")
# Small files read at a time: on object storage each takes a round trip.
NUM_READERS = 16


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

    @property
    def shards_uri(self) -> str:
        """The folder of all shards."""
        return storage.join(self.uri, "shards")

    def shard_uri(self, name: str) -> str:
        """Return where a shard is."""
        return storage.join(self.shards_uri, name)

    def imported_uri(self, slide_id: str) -> str:
        """Return the folder of a slide's imported nuclei, while it is not finished."""
        return storage.join(self.uri, "imported", slide_id)

    def record_uri(self, slide_id: str) -> str:
        """Return where a slide's record is."""
        return storage.join(self.uri, "records", f"{slide_id}.json")

    def records(self) -> dict[str, SlideRecord]:
        """Read all slide records, by slide_id."""
        uris = storage.list_files(storage.join(self.uri, "records"))
        with ThreadPoolExecutor(NUM_READERS) as readers:
            records: list[SlideRecord] = list(readers.map(storage.read_json, uris))
        return {record["slide_id"]: record for record in records}

    def log_receipts(self, receipts: pa.Table) -> None:
        """Add receipts to the log; they survive the driver from here on."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        name = f"{stamp}-{uuid.uuid4().hex[:8]}.parquet"
        table = schemas.conform(receipts, schemas.RECEIPTS, "RECEIPTS", self.digest)
        storage.publish_table(storage.join(self.uri, "receipts", name), table)

    def receipts(self, besides: Collection[str] = ()) -> pa.Table:
        """Read the receipts log: the last receipt of each tile, errors included.

        Args:
            besides: Not of these slides.
        """
        uris = storage.list_files(storage.join(self.uri, "receipts"))
        unwanted = pa.array(list(besides), pa.string())

        def read(uri: str) -> pa.Table:
            table = storage.read_table(uri)
            if "waited_s" not in table.column_names:  # of an earlier release
                table = table.append_column("waited_s", pa.nulls(len(table), pa.float32()))
            return table.filter(pc.invert(pc.is_in(table["slide_id"], unwanted)))

        with ThreadPoolExecutor(NUM_READERS) as readers:
            tables = list(readers.map(read, uris))
        return last_of_each_tile(pa.concat_tables(tables or [schemas.RECEIPTS.empty_table()]))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Keep the configuration of the command that works on this folder, for people.

        Raises:
            ValueError: it holds credentials.
        """
        refuse_credentials(config)
        settings = yaml.safe_dump(dict(config), sort_keys=False)
        storage.publish_text(storage.join(self.uri, "config.yaml"), settings)


def last_of_each_tile(receipts: pa.Table) -> pa.Table:
    """Return the last receipt of each tile, in the order of the receipts."""
    numbered = receipts.append_column("order", pa.array(np.arange(len(receipts))))
    last = numbered.group_by(["slide_id", "tile_id"]).aggregate([("order", "max")])["order_max"]
    if len(last) == len(receipts):
        return receipts
    return receipts.take(np.sort(last.to_numpy()))


def split_by_slide(receipts: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Yield each run of receipts of one slide."""
    if not len(receipts):
        return
    runs = pc.run_end_encode(receipts["slide_id"].combine_chunks())
    start = 0
    for slide_id, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
        yield slide_id, receipts.slice(start, end - start)
        start = end


def begin_run(
    uri: str, job: str, identity: Identity, config: Mapping[str, Any] | None = None
) -> RunFolder:
    """Create a run folder, or open one that was made by the same job with the same identity.

    Args:
        uri: The folder; created if absent.
        job: Which command.
        identity: Every setting that changes results; the run's digest is its hash.
        config: The resolved configuration, kept beside the output for people; None: a driver that
            may yet be refused writes it later.

    Raises:
        ValueError: the folder holds another run (the message says what differs) or other files.
    """
    # Absolute, so that it means the same in every process.
    uri = storage.absolute(uri)
    wanted, digest = stored_identity(job, identity)
    run_uri = storage.join(uri, "run.json")
    if storage.exists(run_uri):
        found = storage.read_json(run_uri)
        if found.get("digest") != digest:
            raise ValueError(_other_run(uri, found.get("identity", {}), wanted))
    else:
        if storage.list_files(uri):
            message = f"{uri}: holds files that are no run of scellst_ray; give an empty folder"
            raise ValueError(message)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        info: RunInfo = {
            "digest": digest,
            "identity": wanted,
            "created": created,
            "format_version": schemas.FORMAT_VERSION,
        }
        storage.publish_json(run_uri, info)
    run = RunFolder(uri, digest)
    if config is not None:
        run.write_config(config)
    return run


def _other_run(uri: str, found: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """Say what differs between the run in a folder and the one asked for."""
    keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    differences = ", ".join(f"{k}: {found.get(k)!r} there, {wanted.get(k)!r} now" for k in keys)
    return f"{uri}: holds another run ({differences}); give another --out, or the same settings"


def check_manifest_unchanged(run: RunFolder, slides: Mapping[str, SlideSource]) -> None:
    """Refuse a manifest whose rows differ from what this run has already read under their names.

    Args:
        run: The run.
        slides: uri and mpp by slide_id, as the manifest has them now; the union is kept.

    Raises:
        ValueError: a slide_id now names another file or resolution.
    """
    uri = storage.join(run.uri, "slides.json")
    known: dict[str, SlideSource] = storage.read_json(uri) if storage.exists(uri) else {}
    changed = [s for s, row in slides.items() if s in known and known[s] != row]
    # A slide that failed may be mended in the manifest: it is done anew.
    records = run.records() if changed else {}
    changed = [s for s in changed if s not in records or records[s]["status"] != "failed"]
    if changed:
        slide_id = changed[0]
        message = (
            f"{run.uri}: slide {slide_id!r} was read as {known[slide_id]} and is now "
            f"{slides[slide_id]} ({len(changed)} such slides); give another --out, or the "
            "manifest as it was"
        )
        raise ValueError(message)
    now = known | dict(slides)
    if now != known:
        storage.publish_json(uri, now)


FOLDER = "attempts"
