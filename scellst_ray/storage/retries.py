"""Calls to object storage: which errors pass by themselves, how long to try, names fit to print.

Each storage library has errors of its own and wraps those of the libraries below it. Two things
tell whether another try may help: the kind of error, and the HTTP status, anywhere along the chain
of causes. Messages leave here without credentials, and without the causes that would show them.
"""

import errno
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from scellst_ray.storage.credentials import redacted

logger = logging.getLogger("scellst_ray")

T = TypeVar("T")

# With the waits below: an outage of half a minute is survived.
TRIES = 6
# Before the second try, doubled for each further one; each wait is shortened by up to a half.
FIRST_WAIT_S = 1.5
RETRIED_STATUSES = {408, 425, 429}  # besides 500 and above
RETRIED_ERRNOS = {
    getattr(errno, name)
    for name in ("EBUSY", "EAGAIN", "EREMOTEIO", "EPIPE", "EHOSTUNREACH", "ENETUNREACH", "ENETDOWN")
    if hasattr(errno, name)  # EREMOTEIO, s3fs's word for an internal error, is Linux's alone
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# By name, since a library that is not installed cannot be imported: how aiohttp, botocore, Azure,
# Google and requests call an error of the connection.
RETRIED_KINDS = {
    "ConnectionError",
    "ClientConnectionError",
    "ClientPayloadError",
    "HTTPClientError",
    "ResponseParserError",
    "IncompleteReadError",
    "ServiceRequestError",
    "ServiceResponseError",
    "TransportError",
    "ChecksumError",
    "ChunkedEncodingError",
}
# The root of each library's errors that are no OSError. Only a loaded one can have raised.
ROOTS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("gcsfs.retry", "ChecksumError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)


def is_transient(error: BaseException) -> bool:
    """Tell whether another try may help: a cut connection, a timeout, a throttled or ill server."""
    links = list(_causes(error))
    if any(_is_of_connection(link) for link in links):
        return True
    status = _status(links)
    return status is not None and (status >= 500 or status in RETRIED_STATUSES)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_of_connection(error: BaseException) -> bool:
    if isinstance(error, TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in RETRIED_ERRNOS:
        return True
    return bool(RETRIED_KINDS & {kind.__name__ for kind in type(error).__mro__})


def _status(links: list[BaseException]) -> int | None:
    """Return the first HTTP status along a chain of causes: each library keeps it elsewhere."""
    for link in links:
        response = getattr(link, "response", None)
        if isinstance(response, dict):  # botocore's
            told = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
        else:
            told = [vars(link).get(name) for name in ("status", "status_code", "code")]
        for value in told:
            if str(value).isdecimal():
                return int(value)
    return None


def retried(call: Callable[[], T], name: str) -> T:
    """Call until it works, waiting longer each time, as long as the error may pass.

    Args:
        call: What to do; must be safe to repeat.
        name: What it is about, for messages: fit to print (see `redacted`).

    Raises:
        FileNotFoundError: there is no such object.
        PermissionError: it may not be read.
        ConnectionError: it kept failing.
        OSError: another error of the store, or of the local disk, which is passed on as it is.
    """
    failures = 0
    while True:
        try:
            return call()
        except _raised_by_stores() as error:
            failures += 1
            if failures == TRIES or not is_transient(error):
                raise _plain(error, name) from None
            wait_s = FIRST_WAIT_S * 2 ** (failures - 1) * random.uniform(0.5, 1.0)  # noqa: S311
            logger.warning("%s: %s; again in %.1f s", name, _text(error), wait_s)
        time.sleep(wait_s)


def _raised_by_stores() -> tuple[type[Exception], ...]:
    found = [getattr(sys.modules.get(module), name, None) for module, name in ROOTS]
    return (OSError, *(kind for kind in found if kind is not None))


def _plain(error: Exception, name: str) -> Exception:
    """Return an error as one of Python's own, without credentials."""
    if isinstance(error, OSError) and (error.errno in DISK_FULL or error.filename is not None):
        return error  # of a local file
    links = list(_causes(error))
    status = _status(links)
    if is_transient(error):
        return ConnectionError(f"{name}: still failing after {TRIES} tries ({_text(error)})")
    if status in (401, 403) or isinstance(error, PermissionError):
        message = f"{name}: access refused ({_text(error)}); check the credentials on every node"
        return PermissionError(message)
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{name}: no such file")
    return OSError(f"{name}: cannot be read ({_text(error)})")


def _text(error: BaseException) -> str:
    """Return what went wrong first, in a line."""
    *_, first = _causes(error)
    return redacted(f"{type(first).__name__}: {first}".replace("\n", " ")).removesuffix(": ")
