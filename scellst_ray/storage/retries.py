"""Calls to object storage: the errors that pass by themselves, and the time of retries.

Each storage library has its own errors and wraps those of the libraries below it. Two things say
whether another try may help: the class of the error, and the HTTP status. Both are looked for along
the chain of causes. Errors are raised without credentials, and without causes that would show them.
"""

import errno
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from scellst_ray.storage.credentials import redact

logger = logging.getLogger("scellst_ray")

T = TypeVar("T")

# With the waits below, calls survive an outage of half a minute.
TRIES = 6
# Wait before the second try. It doubles for each further one, and is shortened by up to a half.
FIRST_WAIT_S = 1.5
RETRIED_STATUSES = {408, 425, 429}  # and all from 500 up
RETRIED_ERRNOS = {
    getattr(errno, name)
    for name in ("EBUSY", "EAGAIN", "EREMOTEIO", "EPIPE", "EHOSTUNREACH", "ENETUNREACH", "ENETDOWN")
    if hasattr(errno, name)  # only Linux has EREMOTEIO, which s3fs takes for internal errors
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Connection errors of aiohttp, botocore, Azure, Google and requests. They are given by name, since
# not all of these libraries are installed.
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
# Base class of each library's errors that are no OSError. Only a loaded library can raise.
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
    """Return whether another try may help: after a cut connection, a timeout, a server error."""
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
    """Return the first HTTP status along a chain of causes; None if there is none."""
    for link in links:
        response = getattr(link, "response", None)
        if isinstance(response, dict):  # an error of botocore
            values = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
        else:
            values = [vars(link).get(name) for name in ("status", "status_code", "code")]
        for value in values:
            if str(value).isdecimal():
                return int(value)
    return None


def call_with_retries(call: Callable[[], T], name: str) -> T:
    """Call a function until it works, as long as the error may pass, with growing waits.

    Args:
        call: The function. It must be safe to repeat.
        name: Name of the object for messages, without credentials (see `redact`).

    Raises:
        FileNotFoundError: the object does not exist.
        PermissionError: the object may not be read.
        ConnectionError: the last try failed too.
        OSError: another error of the store, or an unchanged error of the local disk.
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
            logger.warning("%s: %s; will try again in %.1f s", name, _text(error), wait_s)
        time.sleep(wait_s)


def _raised_by_stores() -> tuple[type[Exception], ...]:
    kinds = [getattr(sys.modules.get(module), name, None) for module, name in ROOTS]
    return (OSError, *(kind for kind in kinds if kind is not None))


def _plain(error: Exception, name: str) -> Exception:
    """Return an error as one of Python's built-in errors, without credentials."""
    if isinstance(error, OSError) and (error.errno in DISK_FULL or error.filename is not None):
        return error  # an error of a local file
    links = list(_causes(error))
    status = _status(links)
    if is_transient(error):
        message = (
            f"{name}: still failing after {TRIES} tries ({_text(error)}); check the store and the "
            "network, then run the same command again"
        )
        return ConnectionError(message)
    if status in (401, 403) or isinstance(error, PermissionError):
        message = f"{name}: access refused ({_text(error)}); check the credentials on every node"
        return PermissionError(message)
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{name}: no such file")
    return OSError(f"{name}: cannot be read ({_text(error)})")


def _text(error: BaseException) -> str:
    """Return the first cause of an error as one line."""
    *_, first = _causes(error)
    return redact(f"{type(first).__name__}: {first}".replace("\n", " ")).removesuffix(": ")
