"""Size and digests of files of weights, and the errors that damaged files raise."""

import hashlib
import struct
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_BLOCK = 1 << 20
# Errors that torch raises on a cut or damaged file. Its old format raises nearly any error.
DAMAGE: tuple[type[Exception], ...] = (RuntimeError, OSError, EOFError, LookupError, ValueError)
DAMAGE += (TypeError, AttributeError, AssertionError, struct.error, zipfile.BadZipFile)
# A damaged length of a text asks for gigabytes.
DAMAGE += (MemoryError,)


@dataclass(frozen=True)
class ExpectedFile:
    """The expected size and digests of a file; None: not checked.

    Attributes:
        size: Size in bytes.
        sha256: SHA-256 in hex, or its first digits.
        md5: MD5 in hex.
    """

    size: int | None = None
    sha256: str | None = None
    md5: str | None = None


@dataclass(frozen=True)
class Digests:
    """Size (in bytes) and digests (hex) of a file."""

    size: int
    sha256: str
    md5: str


def digests_of(path: Path) -> Digests:
    """Return size, SHA-256 and MD5 of a file; the file is read once."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            sha256.update(block)
            md5.update(block)
    return Digests(path.stat().st_size, sha256.hexdigest(), md5.hexdigest())


def file_digest(path: Path) -> str:
    """Return 'sha256:...' of a file, the identifier of weights in a run.

    A process reads a file once, and again if its size, time or inode has changed.
    """
    stat = path.stat()
    return _digest_of(path, (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


@lru_cache(maxsize=64)
def _digest_of(path: Path, state: tuple[int, ...]) -> str:
    """Return the digest of a file in this state (size, times and inode)."""
    del state
    with path.open("rb") as handle:
        return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()}"


def is_earlier_digest(earlier: object, now: object) -> bool:
    """Return whether an earlier release knew these weights by a digest that holds the name alone.

    Args:
        earlier: Digest of weights in a run or head, 'timm:ARCH.TAG'.
        now: Digest of weights that were loaded now, 'timm:ARCH.TAG:sha256:HEX'.
    """
    is_named = isinstance(earlier, str) and earlier.startswith("timm:")
    return is_named and isinstance(now, str) and now.startswith(f"{earlier}:sha256:")


def describe_mismatch(actual: Digests, expected: ExpectedFile) -> str | None:
    """Return how a file differs from the expected file; None if it does not differ."""
    if expected.size is not None and actual.size != expected.size:
        return f"it has {actual.size:,} bytes, expected {expected.size:,}"
    if expected.md5 is not None and actual.md5 != expected.md5.lower():
        return f"its MD5 is {actual.md5}, expected {expected.md5}"
    if expected.sha256 is not None and not actual.sha256.startswith(expected.sha256.lower()):
        return f"its SHA-256 is {actual.sha256}, expected {expected.sha256}"
    return None
