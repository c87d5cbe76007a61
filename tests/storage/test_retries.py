"""Errors of the storage libraries: which are tried again, and which messages they get."""

import errno
import sys
import types

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from scellst_ray.storage import retries
from scellst_ray.storage.credentials import redact
from scellst_ray.storage.retries import call_with_retries, is_transient

SIGNED = "https://me:pa@ss@host:8/a%20b.svs?sig=secret&x=secret"


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Return the list of waits; nothing really sleeps."""
    slept = []
    monkeypatch.setattr(retries.time, "sleep", slept.append)
    return slept


def of_s3(code, status):
    """Return the error that s3fs raises for an answer of S3."""
    exceptions = pytest.importorskip("botocore.exceptions", reason="needs the extra s3")
    response = {
        "Error": {"Code": code, "Message": f"{code} of {SIGNED}"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    translate = pytest.importorskip("s3fs.errors", reason="needs the extra s3").translate_boto_error
    return translate(exceptions.ClientError(response, "GetObject"))


def of_http(status):
    """Return the error that aiohttp raises for a status."""
    info = aiohttp.RequestInfo(URL(SIGNED), "GET", None)
    return aiohttp.ClientResponseError(info, (), status=status, message="no")


def of_fsspec(cause):
    """Return the error that fsspec raises after any error while it asks a web server."""
    error = FileNotFoundError(SIGNED)
    error.__cause__ = cause
    return error


def of_others(module, root, name, **attributes):
    """Return an error of a library that need not be installed: a class below its root class."""
    kind = type(name, (type(root, (Exception,), {}),), {})
    loaded = types.ModuleType(module)
    setattr(loaded, root, kind.__mro__[1])
    error = kind(f"of {SIGNED}")
    vars(error).update(attributes)
    return module, loaded, error


PASSING = [
    ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError(),
    BrokenPipeError(errno.EPIPE, "pipe"),
    OSError(errno.EBUSY, "slow down"),
    aiohttp.ClientPayloadError("cut"),
    aiohttp.ServerDisconnectedError(),
    of_http(503),
    of_http(429),
    of_fsspec(of_http(500)),
    of_fsspec(aiohttp.ServerDisconnectedError()),
]
LASTING = [
    (of_http(401), PermissionError),
    (of_http(404), FileNotFoundError),
    (of_http(400), OSError),
    (of_fsspec(None), FileNotFoundError),
    (of_fsspec(of_http(403)), PermissionError),
    (PermissionError("no"), PermissionError),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_passing_errors_are_tried_again_and_longer_each_time(error, waits):
    outcomes = [error] * 3

    def call():
        if outcomes:
            raise outcomes.pop()
        return "done"

    assert call_with_retries(call, "s3://b/a.svs") == "done"
    assert [0.5 <= wait / 1.5 / 2**i <= 1 for i, wait in enumerate(waits)] == [True] * 3
    outcomes.extend([error] * 99)
    with pytest.raises(ConnectionError, match=r"^s3://b/a.svs: still failing after 6 tries \(\w+"):
        call_with_retries(call, "s3://b/a.svs")
    assert len(outcomes) == 93


@pytest.mark.parametrize(("error", "kind"), LASTING, ids=repr)
def test_lasting_errors_are_not(error, kind, waits):
    def call():
        raise error

    with pytest.raises(OSError, match=r"^s3://b/a.svs: ") as raised:
        call_with_retries(call, "s3://b/a.svs")
    assert type(raised.value) is kind
    assert "secret" not in str(raised.value)
    assert raised.value.__suppress_context__
    assert waits == []


S3_ANSWERS = [
    ("SlowDown", 503, ConnectionError),
    ("503", 503, ConnectionError),
    ("InternalError", 500, ConnectionError),
    ("BadGateway", 502, ConnectionError),
    ("RequestTimeout", 400, ConnectionError),
    ("AccessDenied", 403, PermissionError),
    ("ExpiredToken", 400, PermissionError),
    ("NoSuchKey", 404, FileNotFoundError),
    ("InvalidRange", 416, OSError),
]


@pytest.mark.parametrize(("code", "status", "kind"), S3_ANSWERS)
def test_answers_of_s3(code, status, kind, waits):
    error = of_s3(code, status)

    def call():
        raise error

    with pytest.raises(OSError, match=r"^s3://b/a.svs: ") as raised:
        call_with_retries(call, "s3://b/a.svs")
    assert type(raised.value) is kind
    assert len(waits) == (5 if kind is ConnectionError else 0)
    assert "secret" not in str(raised.value)


def test_errors_before_s3_answers():
    exceptions = pytest.importorskip("botocore.exceptions", reason="needs the extra s3")
    url = "https://host"
    assert is_transient(exceptions.EndpointConnectionError(endpoint_url=url))
    assert is_transient(exceptions.ConnectTimeoutError(endpoint_url=url))
    assert is_transient(exceptions.ReadTimeoutError(endpoint_url=url))
    assert not is_transient(exceptions.NoCredentialsError())

    def call():
        raise exceptions.NoCredentialsError

    with pytest.raises(OSError, match="NoCredentialsError: Unable to locate credentials"):
        call_with_retries(call, "s3://b/a.svs")


@pytest.mark.parametrize(
    ("library", "transient"),
    [
        (of_others("gcsfs.retry", "HttpError", "HttpError", code=503), True),
        (of_others("gcsfs.retry", "HttpError", "HttpError", code="429"), True),
        (of_others("gcsfs.retry", "HttpError", "HttpError", code=400), False),
        (of_others("gcsfs.retry", "HttpError", "HttpError", code=None), False),
        (of_others("azure.core.exceptions", "AzureError", "ServiceResponseError"), True),
        (of_others("azure.core.exceptions", "AzureError", "Http", status_code=500), True),
        (of_others("azure.core.exceptions", "AzureError", "Http", status_code=409), False),
        (of_others("google.auth.exceptions", "GoogleAuthError", "TransportError"), True),
        (of_others("google.auth.exceptions", "GoogleAuthError", "RefreshError"), False),
    ],
    ids=str,
)
def test_errors_of_libraries_known_by_name(library, transient, monkeypatch):
    module, loaded, error = library
    monkeypatch.setitem(sys.modules, module, loaded)
    assert is_transient(error) is transient

    def call():
        raise error

    with pytest.raises(ConnectionError if transient else OSError) as raised:
        call_with_retries(call, "gs://b/a.svs")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), PermissionError(1, "no", "/x")])
def test_errors_of_local_files_pass_as_they_are(error, waits):
    def call():
        raise error

    with pytest.raises(OSError, match=r"full|no") as raised:
        call_with_retries(call, "s3://b/a.svs")
    assert raised.value is error
    assert waits == []


def test_programming_errors_pass():
    with pytest.raises(ZeroDivisionError):
        call_with_retries(lambda: 1 // 0, "x")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/a?b@c.svs", "/data/a?b@c.svs"),
        ("s3://bucket/a b@c.svs", "s3://bucket/a b@c.svs"),
        ("s3://key:secret@bucket/a.svs", "s3://bucket/a.svs"),
        (SIGNED, "https://host:8/a%20b.svs"),
        ("https://token@host/a.svs", "https://host/a.svs"),
        ("https://me:it's@host/a b's.svs?sig=1", "https://host/a b's.svs"),
        ("abfss://slides@store.dfs.core.windows.net/a", "abfss://slides@store.dfs.core.windows.net/a"),
        ("abfs://name:secret@store/a", "abfs://store/a"),
        ("zip://a.svs::https://me:secret@h/x.zip?sig=1", "zip://a.svs::https://h/x.zip"),
        (f"GET url='{SIGNED}', status=5", "GET url='https://host:8/a%20b.svs', status=5"),
        (f"<{SIGNED}> why?", "<https://host:8/a%20b.svs> why?"),
    ],
)  # fmt: skip
def test_credentials_are_left_out(text, shown):
    assert redact(text) == shown


WORD = st.text("abcXYZ019-_.~%+=&:@", min_size=1)


@given(WORD, WORD, WORD, st.sampled_from(["s3", "https", "gs", "az"]))
def test_no_secret_survives(user, password, query, scheme):
    secrets = [f"SECRET{word}" for word in (user, password, query)]
    text = f"{scheme}://{secrets[0]}:{secrets[1]}@host/a/b.svs?{secrets[2]}"
    assert redact(text) == f"{scheme}://host/a/b.svs"
    assert redact(f"no '{text}' here, nor {text} there").count("SECRET") == 0
