"""Credentials in URIs: find them, refuse them, and leave them out of messages."""

import re
from collections.abc import Mapping

# Queries that give access to an object: signatures of S3, Google and Azure, and common words.
SECRET_QUERY = re.compile(
    r"[?&](x-amz-|x-goog-|awsaccesskeyid|googleaccessid|sig=|signature|key=|api[_-]?key|"
    r"access[_-]?key|account[_-]?key|secret|(\w*[_-])?token|sas|password|credential)",
    re.IGNORECASE,
)

# In Azure's addresses the part before the @ is the container.
CONTAINER_FIRST = ("abfs", "abfss", "wasb", "wasbs")


def redact(text: str) -> str:
    """Return a URI, or a text with URIs in it, without user names, passwords and queries.

    A query may be a signature that gives anyone access to the object.
    """
    text = re.sub(r"([A-Za-z0-9+.-]+://)([^/\s?#]*@)", _without_user, text)
    # The part before the query may hold spaces and quotes, as object names do.
    return re.sub(r"(://[^?\n]*)\?[^\s'\"<>]*", r"\1", text)


def _without_user(match: re.Match[str]) -> str:
    scheme, user = match[1], match[2]
    kept = scheme[:-3] in CONTAINER_FIRST and ":" not in user
    return scheme + user if kept else scheme


def secret_in(text: str) -> str | None:
    """Return the reason why a URI is refused, without its secret; None if it holds no secret.

    URIs are stored with the results, where other people read them. So a URI may hold no user name
    (with or without a password) and no signature.
    """
    user = re.search(r"([A-Za-z0-9+.-]+://)([^/\s?#]*@)", text)
    query = "://" in text and SECRET_QUERY.search(text)
    if not query and (user is None or _without_user(user).endswith("@")):
        return None
    return (
        f"{redact(text)} was given with credentials, which would be stored with the results; "
        "remove them, and set them on every node as the store expects: a role or service "
        "account, or the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_CONNECTION_STRING)"
    )


def refuse_credentials(config: Mapping[str, object]) -> None:
    """Refuse a configuration with a secret in any of its texts or lists of texts.

    Raises:
        ValueError: the configuration holds a secret.
    """
    for key, value in config.items():
        texts = value if isinstance(value, list | tuple) else [value]
        reasons = [secret_in(text) for text in texts if isinstance(text, str)]
        for reason in filter(None, reasons):
            message = f"{key}: {reason}"
            raise ValueError(message)
