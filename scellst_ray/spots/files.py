"""Read small files whole: plain or gzipped bytes within a bound, and JSON objects."""

import json
import reprlib
import zlib
from typing import Any

import fsspec

# A gzipped file may unpack to this many bytes, or to this many times its own size if that is more.
# Tables of counts shrink to a 4th to a 30th.
UNPACKED_BYTES, UNPACKED_RATIO = 128 * 2**20, 40
MAX_REASON = 200
LARGEST = 1e300
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxlist, SHORT.maxstring, SHORT.maxother = 2, 10, 60, 60


def read_bytes(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    """Return the content of a file, decompressed if its name ends in .gz.

    Raises:
        ValueError: The file is missing or cut off, or it unpacks to more than UNPACKED_BYTES and
            UNPACKED_RATIO allow.
    """
    try:
        with fs.open(path, "rb", compression="infer") as file:
            if not path.endswith(".gz"):
                return bytes(file.read())
            limit = max(UNPACKED_BYTES, UNPACKED_RATIO * int(fs.size(path) or 0))
            content = bytes(file.read(limit + 1))
    except FileNotFoundError as error:
        message = f"{path}: no such file. Check the manifest's `spots` and `spot_positions`."
        raise ValueError(message) from error
    except (EOFError, OSError, zlib.error) as error:
        message = f"{path}: cannot be read ({reason_of(error)}). It may be cut off: copy it again."
        raise ValueError(message) from error
    if len(content) > limit:
        message = (
            f"{path}: unpacks to more than {limit} bytes, far more than tables of its size do. "
            "Copy it again, or unpack it yourself if it is sound."
        )
        raise ValueError(message)
    return content


def read_json_object(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: The file cannot be read or holds no JSON object.
    """
    try:
        found = json.loads(read_bytes(fs, path))
    except (ValueError, RecursionError) as error:
        message = f"{path}: not a JSON object ({reason_of(error)}). Copy it again."
        raise ValueError(message) from error
    if not isinstance(found, dict):
        message = f"{path}: not a JSON object but a {type(found).__name__}. Copy it again."
        raise ValueError(message)
    return found


def positive_number(values: dict[str, Any], name: str) -> float | None:
    """Return a number of a JSON object; None if it is absent or not a positive finite number."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value < LARGEST else None


def reason_of(error: object) -> str:
    """Return the text of an error or a name as one short line of printable text."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."


def shown(value: object) -> str:
    """Return a value of a file as text for a message: in one line, and short."""
    text = SHORT.repr(value)
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."


def full_uri(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """Return a path with its protocol, or unchanged if it is local."""
    return path if "file" in fs.protocol else str(fs.unstrip_protocol(path))
