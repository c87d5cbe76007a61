"""Parquet files: the one place that knows how tables are written, and how readers check them.

Three things tell whether a file is what was written:

1. Each page (a part of a column) has a checksum, which every reader here verifies.
2. The footer has none in Parquet. Yet it says where pages lie. So its SHA-256 stands directly
   before it, behind SEAL, in bytes that belong to no column. Parquet readers skip such bytes.
3. A `TableStamp` of the whole file, kept elsewhere, tells one whole file from another.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from scellst_ray.storage.damage import DamagedFileError, naming_damage
from scellst_ray.storage.files import call_for, is_local, publish, resolve

T = TypeVar("T")
COMPRESSION = "zstd"
# Columns with dictionaries: names. On float16 vectors dictionaries double the reading time.
DICTIONARY = ["slide_id", "nucleus_type", "spot_id"]
# Up to this number of rows, threads take longer than they save.
FEW_ROWS = 16_384
SEAL = b"scell\x00s1"
SEAL_BYTES = len(SEAL) + 32
MAGIC = b"PAR1"
# Bytes read from the end of a file at first: mostly the whole footer.
TAIL_BYTES = 1 << 16
BLOCK_BYTES = 1 << 22


class StoredStamp(TypedDict):
    """`TableStamp` as a record holds it; keys as its attributes."""

    sha256: str
    footer_sha256: str
    bytes: int
    rows: int


@dataclass(frozen=True)
class TableStamp:
    """What a Parquet file is.

    Attributes:
        sha256: SHA-256 of the file.
        footer_sha256: SHA-256 of its footer, which readers of some columns check.
        bytes: Its size.
        rows: Its number of rows.
    """

    sha256: str
    footer_sha256: str
    bytes: int
    rows: int

    @classmethod
    def from_json(cls, stored: StoredStamp) -> "TableStamp":
        """Return the stamp that a record holds; keys of later releases are passed over."""
        return cls(stored["sha256"], stored["footer_sha256"], stored["bytes"], stored["rows"])

    def as_json(self) -> StoredStamp:
        """Return the fields as a record holds them."""
        return {
            "sha256": self.sha256,
            "footer_sha256": self.footer_sha256,
            "bytes": self.bytes,
            "rows": self.rows,
        }


class _Footer:
    """The footer of a file, from its first byte to the end of the file."""

    def __init__(self, file: BinaryIO, size: int, uri: str) -> None:
        """Read the footer of an open file of `size` bytes."""
        first = max(0, size - TAIL_BYTES)
        tail = _read_from(file, first)
        num_bytes = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != MAGIC or not 12 <= num_bytes <= size - 4:
            what = "empty" if not size else "no whole Parquet file"
            raise DamagedFileError(uri, f"is damaged: it is {what} ({size:,} bytes)")
        if num_bytes + SEAL_BYTES > len(tail) and first:
            tail = _read_from(file, max(0, size - num_bytes - SEAL_BYTES))
        self.content = tail[-num_bytes:]
        seal = tail[-num_bytes - SEAL_BYTES : -num_bytes]
        digest = hashlib.sha256(self.content)
        self.sha256 = digest.hexdigest()
        self.is_sealed = seal.startswith(SEAL)
        if self.is_sealed and seal[len(SEAL) :] != digest.digest():
            raise DamagedFileError(uri, "is damaged: its footer is not what was written")
        self.num_file_bytes = size

    def metadata(self) -> pq.FileMetaData:
        return pq.read_metadata(pa.BufferReader(MAGIC + self.content))

    def check(self, stamp: TableStamp | None, uri: str) -> None:
        """Refuse a file that is whole, and yet not the one that was stamped."""
        if stamp is None:
            return
        if self.num_file_bytes != stamp.bytes:
            problem = f"it has {self.num_file_bytes:,} bytes, and had {stamp.bytes:,}"
        elif self.sha256 != stamp.footer_sha256:
            problem = "it is another file of the same size"
        else:
            return
        raise DamagedFileError(uri, f"is not the file that was written: {problem}")


def _read_from(file: BinaryIO, start: int) -> bytes:
    file.seek(start)
    return file.read()


def publish_table(uri: str, table: pa.Table) -> None:
    """Publish an Arrow table as one Parquet file."""
    publish(uri, lambda path: write_parquet(path, table.schema, lambda w: w.write_table(table)))


def publish_stamped(
    uri: str, schema: pa.Schema, write: Callable[[pq.ParquetWriter], None], **options: object
) -> TableStamp:
    """Publish a Parquet file; return its stamp, taken before the file has its name.

    Arguments are those of `write_parquet`.
    """
    stamps = []

    def write_file(path: Path) -> None:
        write_parquet(path, schema, write, **options)
        stamps.append(stamp_of(path))

    publish(uri, write_file)
    return stamps[-1]


def write_parquet(
    path: Path, schema: pa.Schema, write: Callable[[pq.ParquetWriter], None], **options: object
) -> None:
    """Write a local Parquet file.

    Args:
        path: The file.
        schema: Its schema.
        write: Writes the rows.
        options: Options of `pq.ParquetWriter` that differ from ours.
    """
    ours: Mapping[str, Any] = {
        "compression": COMPRESSION,
        "use_dictionary": [name for name in DICTIONARY if name in schema.names],
        "write_page_checksum": True,
    }
    with pq.ParquetWriter(path, schema, **{**ours, **options}) as writer:
        write(writer)
    with path.open("rb+") as file:
        size = path.stat().st_size
        footer = _Footer(file, size, str(path)).content
        file.seek(size - len(footer))
        file.write(SEAL + hashlib.sha256(footer).digest() + footer)


def stamp_of(path: Path) -> TableStamp:
    """Return the stamp of a local Parquet file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        footer = _Footer(file, size, str(path))
    return TableStamp(digest, footer.sha256, size, footer.metadata().num_rows)


def digest_of(uri: str) -> str:
    """Return the SHA-256 of a file, read in blocks.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the file cannot be read.
    """

    def read() -> str:
        digest = hashlib.sha256()
        with _open(uri, BLOCK_BYTES) as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    return call_for(uri, read)


def _open(uri: str, num_bytes: int = 0) -> Any:  # noqa: ANN401 - fsspec's files have no common type
    """Open a file to read; a remote one without reading ahead more than `num_bytes`.

    pyarrow itself would take a store that does not answer for an absent file. pyarrow asks for
    whole columns at once, so it needs nothing read ahead.
    """
    fs, path = resolve(uri)
    if is_local(uri):
        return Path(path).open("rb")
    if num_bytes:
        return fs.open(path, "rb", cache_type="readahead", block_size=num_bytes)
    return fs.open(path, "rb", cache_type="none")


def read_footer(uri: str, stamp: TableStamp | None = None) -> tuple[pq.FileMetaData, bool]:
    """Return the metadata of a Parquet file, and whether its footer carries a checksum.

    Raises:
        DamagedFileError: the footer is damaged, or the file is not the one of `stamp`.
    """

    def read() -> tuple[pq.FileMetaData, bool]:
        with ExitStack() as stack, naming_damage(uri):
            footer, _ = _enter(stack, uri, stamp)
            return footer.metadata(), footer.is_sealed

    return call_for(uri, read)


def _enter(stack: ExitStack, uri: str, stamp: TableStamp | None) -> tuple[_Footer, Any]:
    """Open a file and check its footer; return this and the file as pyarrow takes it."""
    file = stack.enter_context(_open(uri))
    size = file.seek(0, 2)
    footer = _Footer(file, size, uri)
    footer.check(stamp, uri)
    return footer, resolve(uri)[1] if is_local(uri) else file


@contextmanager
def open_parquet(
    uri: str, stamp: TableStamp | None = None, metadata: pq.FileMetaData | None = None
) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file whose parts are read when they are needed; pages are verified then.

    Args:
        uri: The file.
        stamp: What the file must be; None: not known.
        metadata: Metadata of this file that was checked before; None: read and check it.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the file cannot be read.
        DamagedFileError: the file is damaged, or not that of `stamp`; also while it is read.
    """
    with ExitStack() as stack, naming_damage(uri):

        def open_file() -> pq.ParquetFile:
            source: Any
            if metadata is None:
                footer, source = _enter(stack, uri, stamp)
                found = footer.metadata()
            else:
                found = metadata
                source = resolve(uri)[1] if is_local(uri) else stack.enter_context(_open(uri))
            return pq.ParquetFile(
                source,
                metadata=found,
                pre_buffer=not is_local(uri),
                page_checksum_verification=True,
            )

        with naming_damage(uri):
            file = call_for(uri, open_file)
        yield stack.enter_context(file)


def _read(uri: str, stamp: TableStamp | None, read: Callable[[pq.ParquetFile], T]) -> T:
    """Open a file and read from it, again if the store does not answer."""

    def call() -> T:
        with open_parquet(uri, stamp) as file:
            return read(file)

    return call_for(uri, call)


def read_table(
    uri: str, columns: list[str] | None = None, stamp: TableStamp | None = None
) -> pa.Table:
    """Read one Parquet file; the file's own schema metadata is kept.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedFileError: the file is damaged, or not that of `stamp`.
        ValueError: a column is missing.
    """
    return _read(uri, stamp, partial(_read_columns, columns=columns))


def read_small_table(uri: str, most_rows: int) -> pa.Table | None:
    """Read one Parquet file; return None if it has more than `most_rows` rows."""

    def read(file: pq.ParquetFile) -> pa.Table | None:
        return None if file.metadata.num_rows > most_rows else _read_columns(file, None)

    return _read(uri, None, read)


def _read_columns(file: pq.ParquetFile, columns: list[str] | None) -> pa.Table:
    threads = file.metadata.num_rows > FEW_ROWS
    if columns is not None:
        missing = set(columns) - set(file.schema_arrow.names)
        if missing:
            message = f"columns {sorted(missing)} are missing; it has {file.schema_arrow.names}"
            raise ValueError(message)
    table = file.read(columns, use_threads=threads)
    if len(table) != file.metadata.num_rows:
        message = f"{len(table)} of {file.metadata.num_rows} rows can be read"
        raise pa.ArrowInvalid(message)
    return table if columns is None else table.select(columns)


def read_all(uri: str) -> None:
    """Read all pages of a Parquet file, one row group at a time, to verify their checksums.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedFileError: the file is damaged.
    """

    def read(file: pq.ParquetFile) -> None:
        num_rows = 0
        for group in range(file.num_row_groups):
            num_rows += len(file.read_row_group(group))
        if num_rows != file.metadata.num_rows:
            message = f"{num_rows} of {file.metadata.num_rows} rows can be read"
            raise pa.ArrowInvalid(message)

    _read(uri, None, read)


def read_schema(uri: str) -> pa.Schema:
    """Read the Arrow schema of a Parquet file, metadata included."""
    return _read(uri, None, lambda file: file.schema_arrow)
