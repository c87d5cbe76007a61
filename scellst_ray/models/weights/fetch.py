"""Downloading one file: resumed where it was cut, checked whole, and only then under its name.

Bytes go to a hidden `.part` beside the target. A second call asks only for the rest (Range, with
If-Range so that a file replaced meanwhile is sent anew; a server without ranges sends it all).
Once length and digests are right the file is synced and renamed, so that what stands under the
name is whole, whatever is killed when.
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

from scellst_ray.models.weights.digests import Digests, Expected, digests_of, mismatch

logger = logging.getLogger("scellst_ray")

_BLOCK = 1 << 16  # what a cut may cost: urllib3 keeps no part of a block
_TIMEOUT_S = (10.0, 60.0)  # to connect, between bytes
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_PARTIAL, _BEYOND = 206, 416

# Called with the bytes there are and, once known, those there will be.
Report = Callable[[int, int | None], None]


class WrongFileError(ValueError):
    """A whole file came, and it is another one.

    Attributes:
        found: What came.
    """

    def __init__(self, message: str, found: Digests) -> None:
        """Keep what came for those who want to explain it."""
        super().__init__(message)
        self.found = found


@dataclass(frozen=True)
class Patience:
    """How long to go on.

    Attributes:
        tries: Tries in a row without a byte before giving up.
        backoff_s: Seconds before the second try, doubled for each further one.
    """

    tries: int = 5
    backoff_s: float = 1.0


def zenodo_file(record: str, file_name: str, patience: Patience | None = None) -> Expected:
    """Return size and MD5 that a Zenodo record states for one of its files.

    Args:
        record: https://zenodo.org/api/records/NUMBER.
        file_name: The file's name in the record.
        patience: How long to go on.

    Raises:
        ConnectionError: the record cannot be read.
        ValueError: the record has no such file, or is none of Zenodo's.
    """
    try:
        with _session(patience or Patience()) as session:
            response = session.get(record, timeout=_TIMEOUT_S)
            response.raise_for_status()
            files: list[dict[str, Any]] = response.json()["files"]
            stated = {str(f["key"]): (int(f["size"]), str(f["checksum"])) for f in files}
    except (requests.JSONDecodeError, KeyError, TypeError) as error:
        message = f"{record}: not a record as Zenodo describes them ({error!r})"
        raise ValueError(message) from error
    except requests.RequestException as error:
        message = f"{record}: cannot be read ({_reason(error)})"
        raise ConnectionError(message) from error
    if file_name not in stated:
        message = f"{record}: has no file {file_name}; it has {', '.join(sorted(stated))}"
        raise ValueError(message)
    size, checksum = stated[file_name]
    kind, _, digest = checksum.partition(":")
    return Expected(size, md5=digest if kind == "md5" else None)


def download(
    url: str,
    target: Path,
    expected: Expected,
    report: Report = lambda _done, _size: None,
    patience: Patience | None = None,
) -> Digests:
    """Download `url` to `target`, going on where an earlier call stopped.

    Args:
        url: http or https.
        target: Where the file shall appear; its folder is made.
        expected: What it must be.
        report: Called as bytes come in.
        patience: How long to go on.

    Returns:
        What was received.

    Raises:
        ValueError: what came is not what was expected; it is removed (WrongFileError), or was
            not downloaded at all if its size told.
        ConnectionError: the server refused or cannot be reached; what came so far is kept.
        OSError: the disk is full, or another process downloads the same file.
    """
    patience = patience or Patience()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    lock = FileLock(f"{part}.lock", timeout=0)
    try:
        with lock:
            _receive(url, part, expected, report, patience)
            found = digests_of(part)
            wrong = mismatch(found, expected)
            if wrong:
                _discard(part)
                message = f"{url}: what came is not what it should be: {wrong}; it was removed"
                raise WrongFileError(message, found)
            _publish(part, target)
    except Timeout as error:
        message = f"{target}: another process is downloading it (it holds {lock.lock_file})"
        raise OSError(message) from error
    return found


def _receive(url: str, part: Path, expected: Expected, report: Report, patience: Patience) -> None:
    """Fill `part`, asking again where the connection was cut, as long as that brings bytes."""
    tries_left = patience.tries
    with _session(patience) as session:
        while True:
            before = _size(part)
            try:
                if _one_try(session, url, part, expected, report):
                    return
            except requests.RequestException as error:  # after all its own tries
                message = f"{url}: {_reason(error)}; {_kept(part)}"
                raise ConnectionError(message) from error
            tries_left = patience.tries if _size(part) > before else tries_left - 1
            if tries_left <= 0:
                message = f"{url}: the connection was cut {patience.tries} times; {_kept(part)}"
                raise ConnectionError(message)
            time.sleep(patience.backoff_s * 2 ** (patience.tries - tries_left))


def _one_try(
    session: requests.Session, url: str, part: Path, expected: Expected, report: Report
) -> bool:
    """Ask once for what is missing; tell whether all is there now."""
    validator = _validator(part, url)
    start = _size(part) if validator is not None else 0
    # Not compressed: ranges and lengths are those of the file.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator:
            headers["If-Range"] = validator
    with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
        first, size = _span(response)
        if response.status_code == _BEYOND or first not in (0, start):
            if size == start:  # all of it was there
                return True
            _discard(part)
            return False
        response.raise_for_status()
        if None not in (size, expected.size) and size != expected.size:
            message = f"{url}: the server's file has {size:,} bytes, expected {expected.size:,}"
            raise ValueError(message)
        size = size if size is not None else expected.size
        _check_room(part, (size or 0) - first)
        _note(part, url, response)
        with part.open("r+b" if first else "wb") as handle:
            handle.seek(first)
            try:
                for done in _written(response, handle, first):
                    report(done, size)
            except requests.RequestException as cut:
                logger.info("%s: cut after %s bytes (%s)", url, f"{handle.tell():,}", _reason(cut))
                return False
            finally:
                handle.truncate()
                os.fsync(handle.fileno())
            return size is None or handle.tell() == size


def _written(response: requests.Response, handle: IO[bytes], start: int) -> Iterator[int]:
    """Write a response's bytes as they come; yield how many there are."""
    yield start
    for block in response.iter_content(_BLOCK):
        handle.write(block)
        yield handle.tell()


def _span(response: requests.Response) -> tuple[int, int | None]:
    """Return where the bytes of a response begin, and the whole file's size if told."""
    if response.status_code in (_PARTIAL, _BEYOND):
        told = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", told)
        if not match:
            return -1, None
        return int(match[1] or -1), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length else None


def _check_room(part: Path, missing: int) -> None:
    """Raise OSError before a download that cannot fit."""
    free = shutil.disk_usage(part.parent).free
    if missing > free:
        message = (
            f"{part.parent}: {missing:,} bytes to come, {free:,} free; make room, or set "
            "SCELLST_RAY_CACHE_DIR to a folder on a larger disk"
        )
        raise OSError(message)


def _note(part: Path, url: str, response: requests.Response) -> None:
    """Write down what `part` is a part of, before its first byte."""
    etag = response.headers.get("ETag", "")
    # Only a strong one promises the same bytes (RFC 9110, 13.1.5).
    strong = etag if etag and not etag.startswith("W/") else ""
    validator = strong or response.headers.get("Last-Modified", "")
    _note_path(part).write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")


def _validator(part: Path, url: str) -> str | None:
    """Return what If-Range shall say ('' if the server gave nothing), None if to start anew.

    Without a validator the rest is asked for all the same: the digests decide.
    """
    if not (part.is_file() and _note_path(part).is_file()):
        return None
    try:
        note = json.loads(_note_path(part).read_text(encoding="utf-8"))
    except json.JSONDecodeError:  # cut while it was written
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
    """Rename, so that the name and the bytes survive a loss of power."""
    part.replace(target)
    _discard(part)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _session(patience: Patience) -> requests.Session:
    """Return a session that repeats what fails before the first byte."""
    retry = Retry(
        total=patience.tries,
        backoff_factor=patience.backoff_s,
        status_forcelist=_TRANSIENT,
        raise_on_status=False,  # the last answer says why
    )
    session = requests.Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def _kept(part: Path) -> str:
    """Say what a person can do after a failure."""
    if not _size(part):
        return "check the address and the network, then run the same command again"
    return f"{_size(part):,} bytes are kept, and the same command goes on from there"


def _reason(error: Exception) -> str:
    """Return why a request failed, in a few words."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server said {error.response.status_code} {error.response.reason}".strip()
    cause = error.args[0] if error.args else error
    return str(getattr(cause, "reason", cause)) or type(error).__name__
