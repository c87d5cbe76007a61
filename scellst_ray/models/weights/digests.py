"""Files of weights: size and digests, whether they are what they should be, and damage."""

import hashlib
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 1 << 20
# What torch raises on a cut or damaged file; its old format raises nearly anything.
DAMAGE: tuple[type[Exception], ...] = (RuntimeError, OSError, EOFError, LookupError, ValueError)
DAMAGE += (TypeError, AttributeError, AssertionError, struct.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class Expected:
    """What a file must be to appear under its name; None: not checked.

    Attributes:
        size: Bytes.
        sha256: SHA-256 in hex, or its first digits.
        md5: MD5 in hex.
    """

    size: int | None = None
    sha256: str | None = None
    md5: str | None = None


@dataclass(frozen=True)
class Digests:
    """Size and digests (hex) of a file."""

    size: int
    sha256: str
    md5: str


def digests_of(path: Path) -> Digests:
    """Return size, SHA-256 and MD5 of a file, read once."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            sha256.update(block)
            md5.update(block)
    return Digests(path.stat().st_size, sha256.hexdigest(), md5.hexdigest())


def file_digest(path: Path) -> str:
    """Return 'sha256:...' of a file: what identifies weights in a run."""
    with path.open("rb") as handle:
        return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()}"


def mismatch(found: Digests, expected: Expected) -> str | None:
    """Return how a file differs from what it must be, or None."""
    if expected.size is not None and found.size != expected.size:
        return f"it has {found.size:,} bytes, expected {expected.size:,}"
    if expected.md5 is not None and found.md5 != expected.md5.lower():
        return f"its MD5 is {found.md5}, expected {expected.md5}"
    if expected.sha256 is not None and not found.sha256.startswith(expected.sha256.lower()):
        return f"its SHA-256 is {found.sha256}, expected {expected.sha256}"
    return None
