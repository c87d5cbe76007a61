"""The receipts log: small files of receipts, which drivers add one after another.

Receipts are ordered by what they say, never by clocks or names of files, since drivers on hosts
with different clocks may have written them.
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.documents import NUM_READERS, warn_once

# `<UTC time>-<random>.parquet`; a copy that another program made has blanks or another ending.
LOG_NAME = re.compile(r"\w[\w.-]*\.parquet", re.ASCII)
# What decides between receipts of a tile: the least of these, then the greatest of those.
FAILED_BY = ("error", "error_type", "stage")
DONE_BY = ("shard", "shard_row", "num_cells")
NEVER_NULL = [field.name for field in schemas.RECEIPTS if not field.nullable]


@dataclass(frozen=True)
class ReceiptsLog:
    """What the files of a log hold.

    Attributes:
        receipts: All receipts, file by file; column `logged` is the UTC time of the file.
        unreadable: URIs of the files that cannot be read.
    """

    receipts: pa.Table
    unreadable: tuple[str, ...]


def read_log_files(folder: str, columns: Sequence[str], run_digest: str | None) -> ReceiptsLog:
    """Read the log. A damaged file gives a warning: its tiles have no receipts.

    Files of other names (an editor's copy, a thumbnail) are none of the log.

    Args:
        folder: The folder of the log.
        columns: Columns of RECEIPTS; those of later releases than the file's are null.
        run_digest: Digest of the run; None: not checked.
    """
    uris = [u for u in storage.list_files(folder) if LOG_NAME.fullmatch(u.rsplit("/", 1)[-1])]

    def read(uri: str) -> pa.Table | None:
        try:
            return read_log_file(uri, columns, run_digest)
        except storage.DamagedFileError as error:
            warn_once(f"{error}; the tiles of its receipts are done again")
        except FileNotFoundError:  # removed since the folder was listed
            pass
        except OSError as error:
            if not storage.is_local(uri):  # the store is out of order, not this file
                raise
            warn_once(f"{uri}: cannot be read ({error.strerror}); its tiles are done again")
        return None

    with ThreadPoolExecutor(NUM_READERS) as readers:
        tables = list(readers.map(read, uris))
    unreadable = tuple(u for u, table in zip(uris, tables, strict=True) if table is None)
    good = [(u, table) for u, table in zip(uris, tables, strict=True) if table is not None]
    empty = _with_columns(schemas.RECEIPTS.empty_table(), columns)
    found = pa.concat_tables([empty, *(table for _, table in good)])
    times = pa.array([logged_at(uri) for uri, _ in good], pa.timestamp("us", "UTC"))
    of_file = np.repeat(np.arange(len(good)), [len(table) for _, table in good])
    logged = times.take(pa.array(of_file, pa.int64()))
    return ReceiptsLog(found.append_column("logged", logged), unreadable)


def read_log_file(uri: str, columns: Sequence[str], run_digest: str | None = None) -> pa.Table:
    """Read some columns of a file of the log, with the types of RECEIPTS.

    Raises:
        DamagedFileError: it is damaged, holds no receipts, or is of another run.
        FileNotFoundError: it does not exist.
    """
    with storage.open_parquet(uri) as file:
        schema = file.schema_arrow
        signed = schema.metadata or {}
        name = signed.get(b"scellst_ray.table", b"RECEIPTS").decode()
        if name != "RECEIPTS":
            raise storage.DamagedFileError(uri, f"holds no receipts, but {name}")
        found = signed.get(b"scellst_ray.run_digest", (run_digest or "").encode()).decode()
        if run_digest is not None and found != run_digest:
            raise storage.DamagedFileError(uri, f"is of run {found}, not of {run_digest}")
        # Earlier releases wrote fewer columns.
        present = [name for name in columns if name in schema.names]
        read = [*dict.fromkeys([*present, *(n for n in NEVER_NULL if n in schema.names)])]
        table = file.read(read, use_threads=False)
        missing = [name for name in NEVER_NULL if name not in schema.names]
        nulls = [name for name in read if name in NEVER_NULL and table[name].null_count]
        if missing or nulls or len(table) != file.metadata.num_rows:
            text = f"columns {missing} are missing" if missing else f"{nulls} have nulls"
            raise storage.DamagedFileError(uri, f"is damaged: {text}")
        return _with_columns(table, columns)


def _with_columns(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Return columns of RECEIPTS, in this order; absent ones are null."""
    fields = [schemas.RECEIPTS.field(name) for name in columns]
    arrays = [
        table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(len(table), f.type)
        for f in fields
    ]
    return pa.table(arrays, schema=pa.schema(fields))


def logged_at(name: str) -> datetime | None:
    """Return the UTC time in the name of a file of the log; None if the name has none."""
    stamp = name.rsplit("/", 1)[-1].partition("-")[0]
    try:
        return datetime.strptime(stamp, "%Y%m%dT%H%M%S%f").replace(tzinfo=UTC)
    except ValueError:
        return None


def best_of_each_tile(receipts: pa.Table) -> pa.Table:
    """Return one receipt of each tile, in the order of the receipts: a success if there is one.

    If the receipts have sources, a tile of another source is another tile.

    Of several successes, or failures, the one that comes first by its own content is taken. So the
    order of the receipts, and of the files they were in, plays no part.
    """
    if not len(receipts):
        return receipts
    # In numpy: Arrow's group_by loads its datasets and its query engine, 10 MB of a status.
    numbers = receipts["slide_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    tile_ids = receipts["tile_id"].to_numpy() + 1  # -1 stands for a whole slide
    keys = numbers.astype(np.int64) * (tile_ids.max() + 1) + tile_ids
    if "source" in receipts.column_names:
        sources = receipts["source"].combine_chunks().fill_null("").dictionary_encode()
        keys = keys * len(sources.dictionary) + sources.indices.to_numpy()
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    if len(first) == len(receipts):
        return receipts
    is_repeated = np.isin(keys, keys[first[counts > 1]])
    rows = np.flatnonzero(is_repeated)
    repeated = receipts.take(pa.array(rows))
    order = sorted(range(len(rows)), key=_rank(repeated, DONE_BY), reverse=True)
    ranked = rows[np.array(sorted(order, key=_rank(repeated, FAILED_BY)))]
    _, best = np.unique(keys[ranked], return_index=True)
    kept = np.concatenate([np.flatnonzero(~is_repeated), ranked[best]])
    return receipts.take(pa.array(np.sort(kept)))


def _rank(receipts: pa.Table, names: Sequence[str]) -> Callable[[int], tuple[object, ...]]:
    """Return the function that ranks a row by some columns; null comes first."""
    known = [receipts[name].to_pylist() for name in names if name in receipts.column_names]
    return lambda row: tuple((column[row] is not None, column[row] or 0) for column in known)
