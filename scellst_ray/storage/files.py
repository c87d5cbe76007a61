"""Files and URIs: one way to read, list and publish, local or through fsspec.

No file is ever visible half-written. It is written in full to a local temporary name, then renamed
(local disk) or uploaded (object storage). Large uploads go in parts that become an object at the
end.

A request that an object store fails to answer is sent again. The store's own library repeats it a
few times at once, and knows the parts of a file. After that `retries.call_with_retries` repeats it,
which outlasts an outage. Every call can be repeated safely: an upload whose answer was lost puts
the same bytes under the same name again.
"""

import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from scellst_ray.storage import node_cache
from scellst_ray.storage.credentials import redact
from scellst_ray.storage.retries import call_with_retries

T = TypeVar("T")

# Name of a file until it is whole, see _publish_here.
TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{16}")
# Stores without folders: making one would cost a request and, on S3, may make the bucket.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
# Bytes of a part of an upload, if the store's library lets us choose (its default is 50 MiB). A
# part is sent again when it fails; ten parts are in memory at once.
PART_BYTES = 16 * 2**20
MOST_PARTS = 10_000  # the limit of S3
LOCAL = LocalFileSystem()
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
    """Return the bytes of a local file; None if it is absent, or remote (a request per slide)."""
    path = Path(resolve(uri)[1])
    return path.stat().st_size if is_local(uri) and path.is_file() else None


def is_local(uri: str) -> bool:
    """Return whether a URI names the local filesystem."""
    return isinstance(resolve(uri)[0], LocalFileSystem)


def call_for(uri: str, call: Callable[[], T]) -> T:
    """Call a function; for a remote URI call it again while the error may pass, without caches.

    Raises:
        OSError: as `retries.call_with_retries` does.
    """
    fs, path = resolve(uri)
    if isinstance(fs, LocalFileSystem):
        return call()

    def ask() -> T:
        fs.invalidate_cache(path)  # other processes write to the store too
        return call()

    return call_with_retries(ask, redact(uri))


def exists(uri: str) -> bool:
    """Return whether a file or folder exists.

    Raises:
        OSError: the store does not answer. fsspec itself would then say that it does not exist.
    """
    fs, path = resolve(uri)
    if isinstance(fs, LocalFileSystem):
        return bool(fs.exists(path))
    try:
        call_for(uri, partial(fs.info, path))
    except FileNotFoundError:
        return False
    return True


def list_files(uri: str) -> list[str]:
    """List the files directly below a folder as URIs, sorted; empty if there is no folder.

    Temporary names (with a leading dot) are left out: they are unpublished. Folders are left out.
    """
    return _list(uri, ("file", "link"))


def list_all(uri: str) -> list[str]:
    """List files and folders directly below a folder, as `list_files` lists files."""
    return _list(uri, ("file", "link", "directory"))


def _list(uri: str, kinds: Collection[str]) -> list[str]:
    fs, path = resolve(uri)
    try:
        entries = call_for(uri, partial(fs.ls, path, detail=True))
    except FileNotFoundError:
        return []
    # A file, or an object that stands for an empty folder, lists itself.
    named = {str(entry["name"]).rstrip("/"): entry["type"] for entry in entries}
    paths = {name for name, kind in named.items() if kind in kinds} - {path.rstrip("/")}
    names = sorted(path.rsplit("/", 1)[-1] for path in paths)
    return [join(uri, name) for name in names if not name.startswith(".")]


def sizes(uri: str) -> dict[str, int]:
    """Return the bytes of a file, or of every file below a folder, by path, sorted.

    Paths are those within the filesystem. Unpublished files are included.
    """
    fs, path = resolve(uri)

    def ask() -> dict[str, dict[str, Any]]:
        fs.invalidate_cache()  # folders below may be cached too
        return dict(fs.find(path, detail=True))

    files = call_for(uri, ask)
    return {name: int(files[name].get("size") or 0) for name in sorted(files)}


def publish(uri: str, write: Callable[[Path], None]) -> None:
    """Publish one file: `write` fills a local temporary file, which then appears under `uri`.

    Args:
        uri: URI of the file; an existing file is replaced.
        write: Called with the path of the temporary file.
    """
    fs, path = resolve(uri)
    if isinstance(fs, LocalFileSystem):
        _publish_here(Path(path), write)
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "upload"
        write(temporary)
        call_for(uri, partial(_upload, fs, temporary, path))


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
        # Google needs multiples of 256 KiB.
        least = math.ceil(file.stat().st_size / MOST_PARTS / 2**18) * 2**18
        options["chunksize"] = max(PART_BYTES, least)
    fs.put_file(str(file), path, **options)


def publish_json(uri: str, value: Any) -> None:  # noqa: ANN401 - any value of JSON
    """Publish a JSON document."""
    text = json.dumps(value, indent=2, sort_keys=True, default=str) + "\n"
    publish_text(uri, text)


def publish_text(uri: str, text: str) -> None:
    """Publish a text file in UTF-8."""
    publish_bytes(uri, text.encode())


def publish_bytes(uri: str, content: bytes) -> None:
    """Publish a file with this content."""

    def write(path: Path) -> None:
        path.write_bytes(content)

    publish(uri, write)


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """Read a whole file, or its bytes from `start` up to but not including `end`.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the file cannot be read.
    """
    fs, path = resolve(uri)
    return call_for(uri, lambda: bytes(fs.cat_file(path, start=start, end=end)))


def read_text(uri: str) -> str:
    """Read a whole text file in UTF-8."""
    return read_bytes(uri).decode()


def read_json(uri: str) -> Any:  # noqa: ANN401 - any JSON document
    """Read a JSON document."""
    return json.loads(read_bytes(uri))


def remove_tree(uri: str) -> None:
    """Remove a file, or a folder and all files below it, if it exists."""
    fs, path = resolve(uri)
    # Another process, or a request whose answer was lost, may have removed it.
    with suppress(FileNotFoundError):
        if not isinstance(fs, LocalFileSystem):
            if exists(uri):
                call_for(uri, partial(fs.rm, path, recursive=True))
        elif Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


def remove_files(uris: Collection[str]) -> None:
    """Remove files of one filesystem, many with one request; absent files are no error."""
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

    call_for(first, remove)


def local_copy(uri: str) -> Path:
    """Return a local path with the content of `uri`, downloading it once per node if remote.

    The copy stays until this process ends. For files that are closed again use `node_cache.hold`.

    Raises:
        FileNotFoundError: there is nothing under `uri`.
        OSError: the file cannot be fetched, see `node_cache.hold`.
    """
    return node_cache.pin(uri)
