"""Credentials in URIs: found, refused, and left out of messages."""

import re
from collections.abc import Mapping

# Queries that open an object to whoever has them: how S3, Google and Azure sign, and common words.
SECRET_QUERY = re.compile(
    r"[?&](x-amz-|x-goog-|awsaccesskeyid|googleaccessid|sig=|signature|key=|api[_-]?key|"
    r"access[_-]?key|account[_-]?key|secret|(\w*[_-])?token|sas|password|credential)",
    re.IGNORECASE,
)


# In Azure's addresses what stands before the @ is the container.
CONTAINER_FIRST = ("abfs", "abfss", "wasb", "wasbs")


def redacted(text: str) -> str:
    """Return a URI, or a text with URIs in it, without user names, passwords and queries.

    A query may be a signature that opens the object to anyone.
    """
    text = re.sub(r"([A-Za-z0-9+.-]+://)([^/\s?#]*@)", _without_user, text)
    # What comes before the query may hold spaces and quotes, as object names do.
    return re.sub(r"(://[^?\n]*)\?[^\s'\"<>]*", r"\1", text)


def _without_user(match: re.Match[str]) -> str:
    scheme, user = match[1], match[2]
    kept = scheme[:-3] in CONTAINER_FIRST and ":" not in user
    return scheme + user if kept else scheme


def secret_in(text: str) -> str | None:
    """Return why a URI may not be given, fit to print; None if it holds no secret.

    What is given is stored beside the results, for others to read: so it may hold no user name,
    with or without a password, and no signature.
    """
    user = re.search(r"([A-Za-z0-9+.-]+://)([^/\s?#]*@)", text)
    query = "://" in text and SECRET_QUERY.search(text)
    if not query and (user is None or _without_user(user).endswith("@")):
        return None
    return (
        f"{redacted(text)} was given with credentials, which would be stored with the results; "
        "take them out, and set them on every node by the store's own means: a role or service "
        "account, or the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_CONNECTION_STRING)"
    )


def refuse_credentials(config: Mapping[str, object]) -> None:
    """Refuse a configuration with a secret in any of its texts or lists of texts.

    Raises:
        ValueError: there is one.
    """
    for key, value in config.items():
        texts = value if isinstance(value, list | tuple) else [value]
        reasons = [secret_in(text) for text in texts if isinstance(text, str)]
        for reason in filter(None, reasons):
            message = f"{key}: {reason}"
            raise ValueError(message)
