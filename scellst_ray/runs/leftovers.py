"""Leftovers: files that crashes leave in a run folder and nothing will ever read."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from scellst_ray import storage
from scellst_ray.runs.folder import (
    ATTEMPTS,
    DATA_FOLDERS,
    FINISHED,
    IMPORTED,
    SHARDS,
)
from scellst_ray.runs.lease import LeaseError, hold_lease
from scellst_ray.runs.reading import Run, open_run
from scellst_ray.runs.receipts_log import best_of_each_tile, read_log_files
from scellst_ray.runs.state import read_holder

FINISHED_SHARDS = "shards of finished slides"
ORPHANS = "shards that no receipt names"
FINISHED_IMPORTED = "imported nuclei of finished slides"
TEMPORARY = "temporary files"
NOTES = "notes of attempts"
KINDS = (FINISHED_SHARDS, ORPHANS, FINISHED_IMPORTED, TEMPORARY, NOTES)
SHARD_NAME = re.compile(r"[\w-]+\.parquet", re.ASCII)
# Files removed between two looks at the lease.
BATCH = 1000


@dataclass(frozen=True)
class Leftover:
    """A file that nothing will read.

    Attributes:
        path: Path within the run's filesystem.
        kind: One of KINDS.
        num_bytes: Size.
    """

    path: str
    kind: str
    num_bytes: int


def sweep(run_uri: str, *, dry_run: bool = False) -> list[Leftover]:
    """Find the files that nothing will read, and remove them.

    Args:
        run_uri: The run folder.
        dry_run: Find the files without removing them.

    Raises:
        FileNotFoundError: the folder holds no run.
        LeaseError: a driver works on the run. Its shards that are not logged yet would look like
            leftovers.
    """
    run_uri = storage.absolute(run_uri)
    run = open_run(run_uri)  # first, so that a lease makes no folder of a mistyped name
    if dry_run:
        holder = read_holder(run_uri)
        if holder.state == "alive" and holder.lease is not None:
            pid, host = holder.lease["pid"], holder.lease["host"]
            message = (
                f"{run_uri}: process {pid} on {host} works on this run; wait until that driver "
                "ends, or stop it"
            )
            raise LeaseError(message)
        return list(leftovers(run))
    with hold_lease(run_uri) as lease:
        # Read the run again, now that no driver can change it.
        removed = list(leftovers(open_run(run_uri)))
        for start in range(0, len(removed), BATCH):
            lease.check()
            paths = [_within(run_uri, each.path) for each in removed[start : start + BATCH]]
            storage.remove_files([storage.join(run_uri, path) for path in paths])
        _remove_empty_folders(run_uri)
    return removed


def leftovers(run: Run) -> Iterator[Leftover]:
    """Yield the files that nothing will read, of a run on which no driver works."""
    finished = {s for s, record in run.records.items() if record["status"] in FINISHED}
    columns = ("slide_id", "tile_id", "shard", "error")
    log = read_log_files(run.folder.receipts_uri, columns, run.folder.digest)
    uris = storage.list_files(run.folder.shards_uri)
    shards = pa.array([uri.rsplit("/", 1)[-1] for uri in uris], pa.string())
    receipts = log.receipts.filter(pc.is_in(log.receipts["shard"], shards))
    receipts = best_of_each_tile(receipts.filter(pc.is_null(receipts["error"])))
    is_of_finished = pc.is_in(receipts["slide_id"], pa.array(list(finished), pa.string()))
    named = set(receipts["shard"].unique().to_pylist())
    needed = set(receipts.filter(pc.invert(is_of_finished))["shard"].unique().to_pylist())
    for path, num_bytes in storage.sizes(run.uri).items():
        *folders, name = parts = _within(run.uri, path).split("/")
        kind = None
        if parts[0] == ATTEMPTS:
            kind = NOTES
        elif storage.TEMPORARY_NAME.fullmatch(name) and (not folders or folders[0] in DATA_FOLDERS):
            kind = TEMPORARY
        elif name.startswith("."):
            kind = None
        elif folders == [SHARDS] and SHARD_NAME.fullmatch(name) and name not in needed:
            kind = FINISHED_SHARDS if name in named else ORPHANS
            # A file of the log that cannot be read may name it: someone may mend that file.
            kind = None if kind == ORPHANS and log.unreadable else kind
        elif len(folders) == 2 and folders[0] == IMPORTED and folders[1] in finished:
            kind = FINISHED_IMPORTED
        if kind is not None:
            yield Leftover(path, kind, num_bytes)


def _root(uri: str) -> str:
    return storage.resolve(uri)[1].rstrip("/")


def _within(run_uri: str, path: str) -> str:
    """Return the part of a path of the filesystem that lies within the run folder."""
    return path.removeprefix(f"{_root(run_uri)}/")


def _remove_empty_folders(run_uri: str) -> None:
    """Remove the folders of slides and sessions that are empty now."""
    if not storage.is_local(run_uri):
        return
    root = Path(_root(run_uri))
    for folder in _folders(root / ATTEMPTS, root / IMPORTED):
        if not any(folder.iterdir()):
            folder.rmdir()


def _folders(*roots: Path) -> Iterable[Path]:
    """Return all folders below these, the deepest first."""
    folders = [path for root in roots for path in root.rglob("*") if path.is_dir()]
    return sorted(folders, key=lambda folder: -len(folder.parts))
