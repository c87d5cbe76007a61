"""The run folder: names of its files, its identity, the slides it knows and its receipts log.

Done means that a record exists, not that a table exists.

1. Workers publish shards (cells of some tiles) and hand back receipts, one per tile.
2. The driver logs the receipts.
3. When all tiles of a slide are in the log, the slide's tables are written.
4. Its record is published last. What a crash leaves without a record is never read.
"""

import logging
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.documents import publish_document, read_document, read_records
from scellst_ray.runs.identity import Identity, is_earlier_form, stored_identity
from scellst_ray.runs.receipts_log import best_of_each_tile, read_log_files
from scellst_ray.runs.records import RunInfo, SlideRecord
from scellst_ray.storage.credentials import redact, refuse_credentials

# Sub folders, with what they hold.
CELLS = "cells"  # CELLS of each slide
EXPRESSION = "expression"  # EXPRESSION of each slide
PROFILES = "profiles"  # PROFILES of each slide
SCORES = "scores"  # SCORES of each slide, see scores.py
THUMBNAILS = "thumbnails"  # a picture of each slide, see thumbnails.py
CROPS = "crops"  # sets of CROPS, see crop_files.py
FAILURES = "failures"  # FAILURES of each slide
RECORDS = "records"  # the record of each slide
RECEIPTS = "receipts"  # the receipts log
SHARDS = "shards"  # cells of slides that are not finished
IMPORTED = "imported"  # imported nuclei of slides that are not finished
ATTEMPTS = "attempts"  # notes of workers on tiles they have begun
# Sub folders whose bytes the summary counts, in its order. Notes of attempts are no data.
DATA_FOLDERS = (
    *(CELLS, EXPRESSION, PROFILES, SCORES, THUMBNAILS, CROPS, FAILURES, RECORDS, RECEIPTS),
    *(SHARDS, IMPORTED),
)
# Files directly in the folder; the head's name is that of models/mil/stored_head.py.
RUN_FILE, CONFIG_FILE, SLIDES_FILE = "run.json", "config.yaml", "slides.json"
LEASE_FILE = "lease.json"
SUMMARY_FILE, SUMMARY_PAGE = "summary.json", "SUMMARY.md"

FINISHED = ("done", "empty")
logger = logging.getLogger(__name__)
SOURCES_REMEDY = (
    "put a copy of it back, or remove it if no slide was replaced since: the next command writes it"
)


@dataclass(frozen=True)
class RunFolder:
    """A run on local disk or object storage.

    Attributes:
        uri: The folder.
        digest: Digest of every setting that changes results. A resumed run must have the same one.
    """

    uri: str
    digest: str

    def cells_uri(self, slide_id: str) -> str:
        """Return the URI of a slide's CELLS."""
        return storage.join(self.uri, CELLS, f"{slide_id}.parquet")

    def profiles_uri(self, slide_id: str) -> str:
        """Return the URI of a slide's PROFILES."""
        return storage.join(self.uri, PROFILES, f"{slide_id}.parquet")

    def thumbnail_uri(self, slide_id: str) -> str:
        """Return the URI of a slide's thumbnail."""
        return storage.join(self.uri, THUMBNAILS, f"{slide_id}.jpg")

    def expression_uri(self, slide_id: str) -> str:
        """Return the URI of a slide's EXPRESSION."""
        return storage.join(self.uri, EXPRESSION, f"{slide_id}.parquet")

    def failures_uri(self, slide_id: str) -> str:
        """Return the URI of a slide's FAILURES."""
        return storage.join(self.uri, FAILURES, f"{slide_id}.parquet")

    @property
    def shards_uri(self) -> str:
        """Return the folder of all shards."""
        return storage.join(self.uri, SHARDS)

    def shard_uri(self, name: str) -> str:
        """Return the URI of a shard."""
        return storage.join(self.shards_uri, name)

    def imported_uri(self, slide_id: str) -> str:
        """Return the folder of a slide's imported nuclei. It exists until the slide is finished."""
        return storage.join(self.uri, IMPORTED, slide_id)

    def record_uri(self, slide_id: str) -> str:
        """Return the URI of a slide's record."""
        return storage.join(self.uri, RECORDS, f"{slide_id}.json")

    @property
    def receipts_uri(self) -> str:
        """Return the folder of the receipts log."""
        return storage.join(self.uri, RECEIPTS)

    @property
    def attempts_uri(self) -> str:
        """Return the folder of the notes of attempts."""
        return storage.join(self.uri, ATTEMPTS)

    def records(self) -> dict[str, SlideRecord]:
        """Read all slide records, by slide_id. A damaged one is no record, and gives a warning."""
        folder = storage.join(self.uri, RECORDS)
        return read_records(folder, SlideRecord, "its slide counts as pending")

    def head_digest(self) -> str | None:
        """Return the SHA-256 that `run.json` states for the run's head; None if it states none."""
        info = read_document(storage.join(self.uri, RUN_FILE), RunInfo, needed=())
        return info.get("identity", {}).get("head")

    def log_receipts(self, receipts: pa.Table) -> None:
        """Add receipts to the log. From here on they survive the driver."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        name = f"{stamp}-{uuid.uuid4().hex[:8]}.parquet"
        table = schemas.conform(receipts, schemas.RECEIPTS, "RECEIPTS", self.digest)
        storage.publish_table(storage.join(self.receipts_uri, name), table)

    def receipts(self, without: Collection[str] = ()) -> pa.Table:
        """Read the receipts log: one receipt of each tile, a success if there is one.

        Args:
            without: slide_ids whose receipts are left out.
        """
        return best_of_each_tile(self.all_receipts(without))

    def all_receipts(self, without: Collection[str] = ()) -> pa.Table:
        """Read the receipts log: all receipts, several of a tile that was done several times.

        Args:
            without: slide_ids whose receipts are left out.
        """
        log = read_log_files(self.receipts_uri, schemas.RECEIPTS.names, self.digest or None)
        receipts = log.receipts.drop_columns("logged")
        unwanted = pa.array(list(without), pa.string())
        return receipts.filter(pc.invert(pc.is_in(receipts["slide_id"], unwanted)))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the configuration of the command that works on this folder, for people.

        Raises:
            ValueError: the configuration holds credentials.
        """
        refuse_credentials(config)
        settings = yaml.safe_dump(dict(config), sort_keys=False)
        storage.publish_text(storage.join(self.uri, CONFIG_FILE), settings)


def split_by_slide(receipts: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Yield each stretch of receipts of one slide, with the slide_id."""
    if not len(receipts):
        return
    stretches = pc.run_end_encode(receipts["slide_id"].combine_chunks())
    start = 0
    slide_ids, ends = stretches.values.to_pylist(), stretches.run_ends.to_pylist()
    for slide_id, end in zip(slide_ids, ends, strict=True):
        yield slide_id, receipts.slice(start, end - start)
        start = end


def begin_run(
    uri: str,
    job: str,
    identity: Identity | Mapping[str, object],
    config: Mapping[str, Any] | None = None,
    libraries: Mapping[str, str] | None = None,
) -> RunFolder:
    """Create a run folder, or open one that was made by the same job with the same identity.

    Args:
        uri: The folder. It is created if it is absent.
        job: The command.
        identity: Every setting that changes results; the run's digest is its hash.
        config: The resolved configuration, kept next to the output for people. None: a driver
            that may still be refused writes it later.
        libraries: Versions of the libraries that decide results, by name; None: not noted.

    Raises:
        ValueError: the folder holds another run (the message says what differs) or other files, or
            its run was begun with other libraries.
    """
    # Absolute, so that it means the same in every process.
    uri = storage.absolute(uri)
    wanted, digest = stored_identity(job, identity)
    found = check_folder(uri, job, identity, libraries)
    if found is not None and found["digest"] != digest:
        digest = found["digest"]
        logger.warning(
            "%s: an earlier release began this run and knew its weights by their name alone, so "
            "nobody can say whether those of now are the same",
            uri,
        )
    if found is None:
        info: RunInfo = {
            "digest": digest,
            "identity": wanted,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "format_version": schemas.FORMAT_VERSION,
        }
        if libraries is not None:
            info["libraries"] = dict(libraries)
        publish_document(storage.join(uri, RUN_FILE), info)
        # On object storage two drivers may hold the lease for a moment: the last to write counts.
        check_folder(uri, job, identity)
    elif libraries is not None and "libraries" not in found:
        logger.warning(
            "%s: begun by an earlier release, which noted neither versions of libraries (%s) nor "
            "the identity of files; both are noted from now on. Work done before counts where a "
            "file has the name and size that it had then, and keeps the rules of that release",
            uri,
            ", ".join(libraries),
        )
        publish_document(storage.join(uri, RUN_FILE), {**found, "libraries": dict(libraries)})
    run = RunFolder(uri, digest)
    if config is not None:
        run.write_config(config)
    return run


def check_folder(
    uri: str,
    job: str,
    identity: Identity | Mapping[str, object],
    libraries: Mapping[str, str] | None = None,
) -> RunInfo | None:
    """Return the content of a folder's run.json; None if the folder holds nothing yet.

    Args:
        uri: The folder. Nothing is written to it.
        job: The command.
        identity: Every setting that changes results.
        libraries: Versions of the libraries that decide results, by name; None: not checked.

    Raises:
        ValueError: the folder holds another run (the message says what differs) or other files, or
            its run was begun with other libraries.
    """
    run_uri = storage.join(uri, RUN_FILE)
    if storage.exists(run_uri):
        found = read_run_info(run_uri)
        wanted, digest = stored_identity(job, identity)
        earlier = found.get("identity", {})
        if found.get("digest") != digest and not is_earlier_form(earlier, wanted):
            raise ValueError(_other_run(uri, earlier, wanted))
        _refuse_other_libraries(uri, found.get("libraries", {}), libraries or {})
        return found
    # A driver that has just taken the lease has written nothing else yet.
    if {name.rsplit("/", 1)[-1] for name in storage.list_all(uri)} - {LEASE_FILE}:
        message = f"{redact(uri)}: holds files that are no run of scellst_ray; give an empty folder"
        raise ValueError(message)
    return None


def _refuse_other_libraries(uri: str, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise ValueError if a library has another version than when the run was begun."""
    differing = [name for name in now if then.get(name, now[name]) != now[name]]
    if differing:
        versions = ", ".join(f"{name} {then[name]}, and here is {now[name]}" for name in differing)
        message = (
            f"{redact(uri)}: this run was begun with {versions}, which may give other pixels. "
            "Install the versions of then, or give another --out"
        )
        raise ValueError(message)


def open_embedded_run(uri: str) -> tuple[RunFolder, RunInfo]:
    """Open a run of `extract` whose cells have embeddings; return it and its run.json.

    Raises:
        ValueError: the folder holds no run, or the run stores no embeddings.
    """
    run_uri = storage.join(uri, RUN_FILE)
    if not storage.exists(run_uri):
        message = f"{redact(uri)}: holds no run of scellst_ray; run `scellst-ray extract` first"
        raise ValueError(message)
    info = read_run_info(run_uri)
    if not info.get("identity", {}).get("store_embeddings"):
        message = f"{redact(uri)}: its cells have no embeddings; extract with store_embeddings"
        raise ValueError(message)
    return RunFolder(uri, info["digest"]), info


def read_config(run_uri: str) -> dict[str, Any]:
    """Return the configuration of the last command on a run; empty if the run has none.

    Raises:
        DamagedFileError: the file is no such configuration.
    """
    uri = storage.join(run_uri, CONFIG_FILE)
    if not storage.exists(uri):
        return {}
    problem = "its YAML is no list of settings"
    try:
        found = yaml.safe_load(storage.read_text(uri)) or {}
        if isinstance(found, dict) and all(isinstance(key, str) for key in found):
            return found
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200]
    remedy = "remove it, and give the command its flags or its own configuration again"
    raise storage.DamagedFileError(uri, f"is damaged: {problem}", remedy)


def read_run_info(uri: str) -> RunInfo:
    """Return the content of a run's run.json.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is no such document.
    """
    remedy = "put a copy of it back, or give another --out"
    return read_document(uri, RunInfo, remedy, needed=["digest"])


def _other_run(uri: str, found: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """Return a message on the differences between the run in a folder and the run requested."""
    keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    differences = ", ".join(
        f"{k}: {found.get(k)!r} in the folder, {wanted.get(k)!r} now" for k in keys
    )
    shown = redact(uri)
    return f"{shown}: holds another run ({differences}); give another --out, or the same settings"
