"""Credentials in texts: find them, refuse them, and leave them out of messages."""

import re
from collections.abc import Mapping
from urllib.parse import unquote

from scellst_ray.storage.secret_forms import HIDDEN, find_spans, has_secret_name

# Rounds of percent-decoding: a URI may hold another one, encoded.
_ROUNDS = 3
_LONGEST_SHOWN = 300
# A text without any of these holds no secret.
_MAY_HOLD = re.compile(r"[=:?@%]|_|-----BEGIN|eyJ|ya29|AIza|glpat|bearer|xox|sk-|pypi-", re.I)


def redact(text: str) -> str:
    """Return a URI, or a text with URIs in it, without user names, passwords, queries and tokens.

    A query may be a signature that gives anyone access to the object. The time is proportional to
    the length of the text.
    """
    if not _MAY_HOLD.search(text):
        return text
    shown = _hide(text)
    holding = _holding_form(shown)
    return shown if holding is None else _hide(holding)


def _holding_form(text: str) -> str | None:
    """Return the text, percent-decoded until a secret is seen in it; None if none is."""
    for _ in range(_ROUNDS):
        if _has_secret(text):
            return text
        decoded = unquote(text) if "%" in text else text
        if decoded == text:
            return None
        text = decoded
    return None


def _hide(text: str) -> str:
    lines = text.split("\n")
    for number, line in enumerate(lines):
        hidden = _hide_in_line(line)
        lines[number] = hidden
        if "-----BEGIN" in line and hidden.endswith(HIDDEN):
            # The lines of a private key.
            return "\n".join(lines[: number + 1])
    return "\n".join(lines)


def _hide_in_line(line: str) -> str:
    spans = sorted(find_spans(line))
    parts, done = [], 0
    for span in spans:
        if span.end <= done:
            continue
        parts.append(line[done : span.start] if span.start >= done else "")
        parts.append(span.mark if span.start >= done else "")
        done = span.end
    return "".join([*parts, line[done:]])


def _has_secret(text: str) -> bool:
    return any(span.is_secret for line in text.split("\n") for span in find_spans(line))


def secret_in(text: str) -> str | None:
    """Return the reason why a text is refused, without its secret; None if it holds no secret.

    URIs are stored with the results, where other people read them. So a URI may hold no user name
    (with or without a password) and no signature, and no text may hold a key or a token. The time
    is proportional to the length of the text.
    """
    if not _MAY_HOLD.search(text):
        return None
    if _holding_form(text) is None:
        return None
    return _explain(redact(text))


def _explain(shown: str) -> str:
    if len(shown) > _LONGEST_SHOWN:
        shown = shown[:_LONGEST_SHOWN] + "..."
    return (
        f"{shown} was given with credentials, which would be stored with the results; "
        "remove them, and set them on every node as the store expects: a role or service "
        "account, or the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_CONNECTION_STRING)"
    )


def refuse_credentials(config: Mapping[str, object]) -> None:
    """Refuse a configuration with a secret in any of its texts, lists and tables.

    Raises:
        ValueError: the configuration holds a secret.
    """
    for key, value in config.items():
        reason = _secret_within(value)
        if reason:
            message = f"{key}: {reason}"
            raise ValueError(message)


def _secret_within(value: object) -> str | None:
    """Return the reason why a value of a configuration is refused; None if it holds no secret."""
    if isinstance(value, str):
        return secret_in(value)
    if isinstance(value, Mapping):
        for name, part in value.items():
            if isinstance(part, str) and part and has_secret_name(str(name)):
                return _explain(f"{redact(str(name))}: {HIDDEN}")
        return _secret_within([*value, *value.values()])
    if isinstance(value, list | tuple | set | frozenset):
        return next(filter(None, map(_secret_within, value)), None)
    return None
