"""Files and URIs: one way to read, list and publish, local or through fsspec.

Nothing is ever visible half-written: a file is written in full to a local temporary name, then
renamed (local) or uploaded in one go (object storage).
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from scellst_ray import node_cache

COMPRESSION = "zstd"
# Dictionaries pay for names only; on float16 vectors they cost twice the reading time.
DICTIONARY = ["slide_id", "nucleus_type", "spot_id"]


def resolve(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the filesystem and the path within it; a relative local path becomes absolute."""
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


def exists(uri: str) -> bool:
    """Tell whether a file or folder is there."""
    fs, path = resolve(uri)
    return bool(fs.exists(path))


def list_files(uri: str) -> list[str]:
    """List the files directly below a folder as URIs, sorted; empty if there is no folder.

    Temporary names (a leading dot) are left out: they are unpublished.
    """
    fs, path = resolve(uri)
    fs.invalidate_cache()
    if not fs.isdir(path):
        return []
    names = [
        str(entry["name"]).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=True)
    ]
    return [join(uri, name) for name in sorted(names) if not name.startswith(".")]


def publish(uri: str, write: Callable[[Path], None]) -> None:
    """Publish one file: `write` fills a local temporary file, which then appears under `uri`.

    Args:
        uri: Where the file shall appear; an existing file is replaced.
        write: Called with the path of the temporary file.
    """
    fs, path = resolve(uri)
    if isinstance(fs, LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "upload"
        write(temporary)
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        fs.put_file(str(temporary), path)


def _umask() -> int:
    """Return the process's umask (readable only by setting it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


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


def read_json(uri: str) -> Any:  # noqa: ANN401 - whatever the document holds
    """Read a JSON document."""
    with fsspec.open(uri, "r", encoding="utf-8") as handle:
        return json.load(handle)


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file; the file's own schema metadata is kept."""
    fs, path = resolve(uri)
    return pq.read_table(path, columns=columns, filesystem=fs, partitioning=None)


def read_schema(uri: str) -> pa.Schema:
    """Read the Arrow schema of a Parquet file, metadata included."""
    fs, path = resolve(uri)
    return pq.read_schema(path, filesystem=fs)


def remove_tree(uri: str) -> None:
    """Remove a folder and all below it, if it is there."""
    fs, path = resolve(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def local_copy(uri: str) -> Path:
    """Return a local path with the content of `uri`, downloading it once per node if remote.

    It stays until this process ends: right for a few files, such as weights. What is opened and
    closed again, such as a slide, is better held for that long: see `node_cache.hold`.

    Raises:
        FileNotFoundError: there is nothing under `uri`.
        OSError: it cannot be fetched: see `node_cache.hold`.
    """
    return node_cache.pinned(uri)
