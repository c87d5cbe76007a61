"""Download of one file: it is resumed after a cut, checked, and only then renamed to its name.

Bytes go to a hidden `.part` file next to the target. A second call asks only for the missing bytes
(header Range). With If-Range a server sends a file that has been replaced from its start. A server
without ranges sends the whole file. After size and digests are checked, the file is synced and
renamed. Therefore a file under its final name is whole, even if the process is killed at any time.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import requests
from filelock import FileLock, Timeout
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from scellst_ray.models.weights.digests import Digests, ExpectedFile, describe_mismatch, digests_of

logger = logging.getLogger("scellst_ray")

_BLOCK = 1 << 16  # bytes that a cut may lose: urllib3 keeps no part of a block
_TIMEOUT_S = (10.0, 60.0)  # longest wait for a connection, and for the next bytes
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_PARTIAL, _BEYOND = 206, 416

# Function that is called with the number of bytes so far and, if known, of the whole file.
Report = Callable[[int, int | None], None]


class WrongFileError(ValueError):
    """A whole file was received, and it is not the expected file.

    Attributes:
        found: Size and digests of the received file.
    """

    def __init__(self, message: str, found: Digests) -> None:
        """Make the error; callers can explain it by `found`."""
        super().__init__(message)
        self.found = found


@dataclass(frozen=True)
class Patience:
    """Settings of repeated tries.

    Attributes:
        tries: Number of successive tries without a byte after which a download fails.
        backoff_s: Seconds before the second try; they double for each further try.
    """

    tries: int = 5
    backoff_s: float = 1.0


def zenodo_file(record: str, file_name: str, patience: Patience | None = None) -> ExpectedFile:
    """Return size and MD5 that a Zenodo record states for one of its files.

    Args:
        record: Address, https://zenodo.org/api/records/NUMBER.
        file_name: Name of the file in the record.
        patience: Settings of repeated tries.

    Raises:
        ConnectionError: The record cannot be read.
        ValueError: The record has no such file, or it is no Zenodo record.
    """
    try:
        with _session(patience or Patience()) as session:
            response = session.get(record, timeout=_TIMEOUT_S)
            response.raise_for_status()
            files: list[dict[str, Any]] = response.json()["files"]
            stated = {str(f["key"]): (int(f["size"]), str(f["checksum"])) for f in files}
    except (requests.JSONDecodeError, KeyError, TypeError) as error:
        message = f"{record}: the answer is not a Zenodo record ({error!r}); check the address"
        raise ValueError(message) from error
    except requests.RequestException as error:
        message = f"{record}: cannot be read ({_explain_failure(error)}); check the network"
        raise ConnectionError(message) from error
    if file_name not in stated:
        message = f"{record}: it has no file {file_name}; it has {', '.join(sorted(stated))}"
        raise ValueError(message)
    size, checksum = stated[file_name]
    kind, _, digest = checksum.partition(":")
    return ExpectedFile(size, md5=digest if kind == "md5" else None)


def download(
    url: str,
    target: Path,
    expected: ExpectedFile,
    report: Report = lambda _done, _size: None,
    patience: Patience | None = None,
) -> Digests:
    """Download `url` to `target`; the download continues where an earlier call stopped.

    Args:
        url: Address, http or https.
        target: Path of the file; its folder is created.
        expected: Expected size and digests.
        report: Function that is called while bytes arrive.
        patience: Settings of repeated tries.

    Returns:
        Size and digests of the received file.

    Raises:
        WrongFileError: The received file is not the expected file. It is removed.
        ValueError: The server states another size. Nothing is downloaded.
        ConnectionError: The server refuses or cannot be reached. Received bytes are kept.
        OSError: The disk is full, or another process downloads the same file.
    """
    patience = patience or Patience()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    lock = FileLock(f"{part}.lock", timeout=0)
    try:
        with lock:
            _receive(url, part, expected, report, patience)
            received = digests_of(part)
            difference = describe_mismatch(received, expected)
            if difference:
                _discard(part)
                message = (
                    f"{url}: the received file is not the expected one: {difference}; it was "
                    "removed, check the address"
                )
                raise WrongFileError(message, received)
            _publish(part, target)
    except Timeout as error:
        message = (
            f"{target}: another process is downloading it and holds {lock.lock_file}; wait for it "
            "to end"
        )
        raise OSError(message) from error
    return received


def _receive(
    url: str, part: Path, expected: ExpectedFile, report: Report, patience: Patience
) -> None:
    """Fill `part`; after a cut connection ask for the rest, as long as bytes arrive."""
    tries_left = patience.tries
    with _session(patience) as session:
        while True:
            before = _size(part)
            try:
                if _request_rest(session, url, part, expected, report):
                    return
            except requests.RequestException as error:  # the session has repeated the request
                message = f"{url}: {_explain_failure(error)}; {_suggest_remedy(part)}"
                raise ConnectionError(message) from error
            tries_left = patience.tries if _size(part) > before else tries_left - 1
            if tries_left <= 0:
                message = (
                    f"{url}: the connection was cut {patience.tries} times; {_suggest_remedy(part)}"
                )
                raise ConnectionError(message)
            time.sleep(patience.backoff_s * 2 ** (patience.tries - tries_left))


def _request_rest(
    session: requests.Session, url: str, part: Path, expected: ExpectedFile, report: Report
) -> bool:
    """Ask once for the missing bytes; return whether the file is complete now."""
    validator = _read_validator(part, url)
    start = _size(part) if validator is not None else 0
    # Without compression, ranges and lengths are those of the file.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator:
            headers["If-Range"] = validator
    with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
        first, size = _parse_span(response)
        if response.status_code == _BEYOND or first not in (0, start):
            if size == start:  # the file was already complete
                return True
            _discard(part)
            return False
        response.raise_for_status()
        if None not in (size, expected.size) and size != expected.size:
            message = (
                f"{url}: the server's file has {size:,} bytes, expected {expected.size:,}; check "
                "the address"
            )
            raise ValueError(message)
        size = size if size is not None else expected.size
        _check_disk_space(part, (size or 0) - first)
        _write_note(part, url, response)
        with part.open("r+b" if first else "wb") as handle:
            handle.seek(first)
            try:
                for done in _write_blocks(response, handle, first):
                    report(done, size)
            except requests.RequestException as error:
                reason = _explain_failure(error)
                logger.info("%s: cut after %s bytes (%s)", url, f"{handle.tell():,}", reason)
                return False
            finally:
                handle.truncate()
                os.fsync(handle.fileno())
            return size is None or handle.tell() == size


def _write_blocks(response: requests.Response, handle: IO[bytes], start: int) -> Iterator[int]:
    """Write a response's bytes as they arrive; yield the size of the file so far."""
    yield start
    for block in response.iter_content(_BLOCK):
        handle.write(block)
        yield handle.tell()


def _parse_span(response: requests.Response) -> tuple[int, int | None]:
    """Return the place of a response's first byte, and the size of the file if it is stated."""
    if response.status_code in (_PARTIAL, _BEYOND):
        content_range = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", content_range)
        if not match:
            return -1, None
        return int(match[1] or -1), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length else None


def _check_disk_space(part: Path, missing: int) -> None:
    """Raise OSError if the missing bytes do not fit on the disk."""
    free = shutil.disk_usage(part.parent).free
    if missing > free:
        message = (
            f"{part.parent}: {missing:,} bytes are missing and {free:,} are free; free disk space, "
            "or set SCELLST_RAY_CACHE_DIR to a folder on a larger disk"
        )
        raise OSError(message)


def _write_note(part: Path, url: str, response: requests.Response) -> None:
    """Record the address and the validator of the file in `part`, before its first byte.

    A validator (ETag or Last-Modified) lets the server detect that its file has been replaced.
    """
    etag = response.headers.get("ETag", "")
    # Only a strong ETag promises the same bytes (RFC 9110, 13.1.5).
    strong = etag if etag and not etag.startswith("W/") else ""
    validator = strong or response.headers.get("Last-Modified", "")
    _note_path(part).write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")


def _read_validator(part: Path, url: str) -> str | None:
    """Return the value of If-Range; None if the download must start again.

    The value is '' if the server stated no validator. Then the rest is requested all the same, and
    the digests decide.
    """
    if not (part.is_file() and _note_path(part).is_file()):
        return None
    try:
        note = json.loads(_note_path(part).read_text(encoding="utf-8"))
    except json.JSONDecodeError:  # the process ended while it wrote the note
        return None
    return str(note["validator"]) if note["url"] == url else None


def _note_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note_path(part).unlink(missing_ok=True)


def _publish(part: Path, target: Path) -> None:
    """Rename the file and sync the folder, so that both survive a loss of power."""
    part.replace(target)
    _discard(part)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _session(patience: Patience) -> requests.Session:
    """Return a session that repeats requests that fail before the first byte."""
    retry = Retry(
        total=patience.tries,
        backoff_factor=patience.backoff_s,
        status_forcelist=_TRANSIENT,
        raise_on_status=False,  # the status of the last answer goes into the message
    )
    session = requests.Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def _suggest_remedy(part: Path) -> str:
    """Return the advice to a user after a failure."""
    if not _size(part):
        return "check the address and the network, then run the same command again"
    return f"{_size(part):,} bytes are kept, and the same command continues from them"


def _explain_failure(error: Exception) -> str:
    """Return the reason of a failed request."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}".strip()
    cause = error.args[0] if error.args else error
    return str(getattr(cause, "reason", cause)) or type(error).__name__
