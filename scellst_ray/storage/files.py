"""Files and URIs: one way to read, list and publish, local or through fsspec.

Nothing is ever visible half-written: a file is written in full to a local temporary name, then
renamed (local) or uploaded, large ones in parts that become an object at the end (object storage).

A request that an object store fails to answer is sent again: a few times at once by the store's own
library, which tells parts of a file from each other, then by `remote.retried`, which outlasts an
outage. All that is done here can be done twice: an upload that came through but whose answer was
lost puts the same bytes under the same name again.
"""

import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from scellst_ray.storage import node_cache
from scellst_ray.storage.credentials import redacted
from scellst_ray.storage.retries import retried

T = TypeVar("T")

# What a file is called until it is whole: see _publish_here.
TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{16}")
COMPRESSION = "zstd"
# Dictionaries pay for names only; on float16 vectors they cost twice the reading time.
DICTIONARY = ["slide_id", "nucleus_type", "spot_id"]
# Have no folders: to make one would cost a request and, on S3, may make the bucket.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
# Bytes of a part of an upload, where the store's library lets them be chosen (by default 50 MiB,
# ten at once): what is sent again when one fails, and a tenth of what is held in memory.
PART_BYTES = 16 * 2**20
MOST_PARTS = 10_000  # that S3 takes
LOCAL = LocalFileSystem()
# Up to here it takes longer to hand columns to threads than to read them.
FEW_ROWS = 16_384
CHOOSE_PARTS = {"s3", "s3a", "gs", "gcs"}


def resolve(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the filesystem and the path within it; a relative local path becomes absolute."""
    if uri.startswith("/") and "::" not in uri:  # as fsspec would, at a twentieth of the time
        return LOCAL, uri.rstrip("/") or "/"
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, str(path)


def join(uri: str, *parts: str) -> str:
    """Join path parts below a URI or local folder."""
    return "/".join([uri.rstrip("/"), *parts])


def absolute(uri: str) -> str:
    """Return a URI, or a local path made absolute: the same in every process and folder."""
    return resolve(uri)[1] if is_local(uri) else uri.rstrip("/")


def content_size(uri: str) -> int | None:
    """Return the bytes of a local file, to notice another file under the same name.

    None where there is no file, and for object storage, where asking takes a request per slide.
    """
    path = Path(resolve(uri)[1])
    return path.stat().st_size if is_local(uri) and path.is_file() else None


def is_local(uri: str) -> bool:
    """Tell whether a URI names the local filesystem."""
    return isinstance(resolve(uri)[0], LocalFileSystem)


def _tried(uri: str, call: Callable[[], T]) -> T:
    """Call; for a remote URI again as long as the error may pass, and with nothing remembered.

    Raises:
        OSError: as `remote.retried` does.
    """
    fs, path = resolve(uri)
    if isinstance(fs, LocalFileSystem):
        return call()

    def ask() -> T:
        fs.invalidate_cache(path)  # others write there too
        return call()

    return retried(ask, redacted(uri))


def exists(uri: str) -> bool:
    """Tell whether a file or folder is there.

    Raises:
        OSError: the store does not say. fsspec's own answer to any error would be that it is not.
    """
    fs, path = resolve(uri)
    if isinstance(fs, LocalFileSystem):
        return bool(fs.exists(path))
    try:
        _tried(uri, partial(fs.info, path))
    except FileNotFoundError:
        return False
    return True


def list_files(uri: str) -> list[str]:
    """List the files directly below a folder as URIs, sorted; empty if there is no folder.

    Temporary names (a leading dot) are left out: they are unpublished.
    """
    fs, path = resolve(uri)
    try:
        entries = _tried(uri, partial(fs.ls, path, detail=True))
    except FileNotFoundError:
        return []
    # Of a file, and of an object that stands for an empty folder, itself is listed.
    paths = {str(entry["name"]).rstrip("/") for entry in entries} - {path.rstrip("/")}
    names = sorted(path.rsplit("/", 1)[-1] for path in paths)
    return [join(uri, name) for name in names if not name.startswith(".")]


def sizes(uri: str) -> dict[str, int]:
    """Return the bytes of a file, or of every file below a folder, by path, sorted.

    Paths are those within the filesystem. Unpublished files are among them; empty if nothing is
    there.
    """
    fs, path = resolve(uri)

    def ask() -> dict[str, dict[str, Any]]:
        fs.invalidate_cache()  # also of what was listed below
        return dict(fs.find(path, detail=True))

    found = _tried(uri, ask)
    return {name: int(found[name].get("size") or 0) for name in sorted(found)}


def publish(uri: str, write: Callable[[Path], None]) -> None:
    """Publish one file: `write` fills a local temporary file, which then appears under `uri`.

    Args:
        uri: Where the file shall appear; an existing file is replaced.
        write: Called with the path of the temporary file.
    """
    fs, path = resolve(uri)
    if isinstance(fs, LocalFileSystem):
        _publish_here(Path(path), write)
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "upload"
        write(temporary)
        _tried(uri, partial(_upload, fs, temporary, path))


def _publish_here(target: Path, write: Callable[[Path], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    with ExitStack() as stack:
        stack.callback(temporary.unlink, missing_ok=True)
        write(temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
        stack.pop_all()


def _upload(fs: fsspec.AbstractFileSystem, file: Path, path: str) -> None:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocols & OBJECT_STORES:
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    options = {}
    if protocols & CHOOSE_PARTS:
        # Google takes multiples of 256 KiB.
        least = math.ceil(file.stat().st_size / MOST_PARTS / 2**18) * 2**18
        options["chunksize"] = max(PART_BYTES, least)
    fs.put_file(str(file), path, **options)


def publish_json(uri: str, value: Any) -> None:  # noqa: ANN401 - whatever JSON can say
    """Publish a JSON document."""
    text = json.dumps(value, indent=2, sort_keys=True, default=str) + "\n"
    publish(uri, lambda path: _write_text(path, text))


def publish_text(uri: str, text: str) -> None:
    """Publish a text file."""
    publish(uri, lambda path: _write_text(path, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def publish_table(uri: str, table: pa.Table) -> None:
    """Publish an Arrow table as one Parquet file."""
    names = [name for name in DICTIONARY if name in table.column_names]
    publish(
        uri, lambda path: pq.write_table(table, path, compression=COMPRESSION, use_dictionary=names)
    )


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """Read a whole file, or the bytes from `start` to before `end` of it.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
    """
    fs, path = resolve(uri)
    return _tried(uri, lambda: bytes(fs.cat_file(path, start=start, end=end)))


def read_text(uri: str) -> str:
    """Read a whole text file in UTF-8."""
    return read_bytes(uri).decode()


def read_json(uri: str) -> Any:  # noqa: ANN401 - whatever the document holds
    """Read a JSON document."""
    return json.loads(read_bytes(uri))


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file; the file's own schema metadata is kept."""
    return _tried(uri, lambda: _read_parquet(uri, partial(_read_columns, columns=columns)))


def read_small_table(uri: str, most_rows: int) -> pa.Table | None:
    """Read one Parquet file, or return None if it has more than so many rows."""

    def read(source: Any) -> pa.Table | None:  # noqa: ANN401 - path or file
        with pq.ParquetFile(source, pre_buffer=not isinstance(source, str)) as file:
            if file.metadata.num_rows > most_rows:
                return None
            return file.read(use_threads=False)

    return _tried(uri, lambda: _read_parquet(uri, read))


def _read_columns(source: Any, columns: list[str] | None) -> pa.Table:  # noqa: ANN401 - path or file
    # `pq.read_table` looks for partitions first, which takes longer than to read a small file.
    with pq.ParquetFile(source, pre_buffer=not isinstance(source, str)) as file:
        threads = file.metadata.num_rows > FEW_ROWS
        if columns is None:
            return file.read(use_threads=threads)
        missing = set(columns) - set(file.schema_arrow.names)
        if missing:
            message = f"column(s) {sorted(missing)} missing; it has {file.schema_arrow.names}"
            raise ValueError(message)
        return file.read(columns, use_threads=threads).select(columns)


def read_schema(uri: str) -> pa.Schema:
    """Read the Arrow schema of a Parquet file, metadata included."""
    return _tried(uri, lambda: _read_parquet(uri, pq.read_schema))


def _read_parquet(uri: str, read: Callable[[Any], T]) -> T:
    if is_local(uri):
        return read(resolve(uri)[1])
    with _opened(uri) as handle:
        return read(handle)


def _opened(uri: str) -> Any:  # noqa: ANN401 - fsspec's files have no common type
    """Return an open remote file for pyarrow.

    Opened here: pyarrow takes a store that does not answer for a file that is not there. It asks
    for whole columns at once, so nothing need be read ahead.
    """
    fs, path = resolve(uri)
    return fs.open(path, "rb", cache_type="none")


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file whose parts are read as they are needed.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
    """
    with ExitStack() as stack:
        if is_local(uri):
            yield stack.enter_context(pq.ParquetFile(resolve(uri)[1]))
            return

        def opened() -> pq.ParquetFile:
            return pq.ParquetFile(stack.enter_context(_opened(uri)), pre_buffer=True)

        yield stack.enter_context(_tried(uri, opened))


def remove_tree(uri: str) -> None:
    """Remove a folder and all below it, if it is there."""
    fs, path = resolve(uri)
    # Gone already: by another, or by a request whose answer was lost.
    with suppress(FileNotFoundError):
        if not isinstance(fs, LocalFileSystem):
            if exists(uri):
                _tried(uri, partial(fs.rm, path, recursive=True))
        elif Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


def remove_files(uris: Collection[str]) -> None:
    """Remove files of one filesystem, many with a request, that may be gone already."""
    if not uris:
        return
    first = next(iter(uris))
    if is_local(first):
        for uri in uris:
            Path(resolve(uri)[1]).unlink(missing_ok=True)
        return
    fs, _ = resolve(first)

    def remove() -> None:
        with suppress(FileNotFoundError):
            fs.rm([resolve(uri)[1] for uri in uris])

    _tried(first, remove)


def local_copy(uri: str) -> Path:
    """Return a local path with the content of `uri`, downloading it once per node if remote.

    It stays until this process ends: right for a few files, such as weights. What is opened and
    closed again, such as a slide, is better held for that long: see `node_cache.hold`.

    Raises:
        FileNotFoundError: there is nothing under `uri`.
        OSError: it cannot be fetched: see `node_cache.hold`.
    """
    return node_cache.pinned(uri)
