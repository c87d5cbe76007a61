"""The forms in which texts hold secrets: in URIs, in assignments, and as tokens of a known look.

Every function takes one line and finds spans in it, in time proportional to its length: no pattern
begins at every character of a long word, and every repetition is bounded or follows a literal.
credentials.py hides and refuses what is found here.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote


class Span(NamedTuple):
    """Part of a line that is not shown.

    Attributes:
        start: First character.
        end: Character after the last.
        is_secret: Whether it holds a secret. If not, it is a query that only might.
        mark: Text that stands in its place.
    """

    start: int
    end: int
    is_secret: bool = True
    mark: str = ""


class _Uri(NamedTuple):
    """A URI in a line: its scheme in lower case, and where scheme, body and surroundings lie.

    Attributes:
        end: Where the line or the next URI begins to be something else.
    """

    scheme: str
    start: int
    body: int
    end: int


_SCHEME_MARK = re.compile(r"://|(?<=https):/|(?<=http):/|(?<=ftp):/|(?<=s3):/|(?<=gs):/", re.I)
_SCHEME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+.-")
_LONGEST_SCHEME = 32
# Their addresses have no port, so a number after ':' is a password.
_WITHOUT_PORT = re.compile(r"s3|s3a|s3n|gs|gcs|az|abfs|abfss|wasb|wasbs|adl|oss|cos|obs")
# In Azure's addresses the part before the @ is the container.
_CONTAINER_FIRST = re.compile(r"abfs|abfss|wasb|wasbs")
_CONTAINER = re.compile(r"[$A-Za-z0-9_-]{1,63}")
# What follows `://` is a path in an archive or on this machine, or names a revision after '@'.
_PATH_FIRST = re.compile(
    r"zip|tar|libarchive|file|local|memory|reference|hf|github|filecache|simplecache"
)
_AUTHORITY_END = re.compile(r"[/?#\s'\"<>]")
_HOST_AND_PORT = re.compile(r"(?:\[[^\]]*\]|[^:]*)(?::(\d{0,5}))?")
_ARN = re.compile(r"arn:aws[a-z-]{0,20}:s3[a-z0-9-]{0,30}:")
_WORD_END = re.compile(r"[\s'\"<>]")

# Words of a parameter's name that say that its value gives access.
_SECRET_WORDS = re.compile(
    r"sig|signature|token|secret|password|passwd|passphrase|pwd|pass|pw|auth|authorization|"
    r"jwt|bearer|oauth|credential|credentials|creds|sas|key|apikey|ak|sk|session|sessionid|"
    r"hmac"
)
# Parts of names that are written in one word.
_SECRET_PARTS = re.compile(
    r"signature|secret(?!i|or)|passw(or)?d|passphrase|credential|(api|access|account|private|shared|sas|"
    r"secret|signing|auth|subscription|function|storage)key|sharedaccess|authoriz|oauth|bearer|jwt|"
    r"sastoken|sessionid|token$|^tokens$|^code$|^googleaccess|^xamz|^xgoog"
)
# Names about order and place in which `key` is no secret, and words that end like it.
_HARMLESS_KEY = re.compile(
    r"(sort|partition|primary|object|row|range|order|group|cache|file|mon|don|tur|hoc)key$"
)
_NAME_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_NO_VALUES = re.compile(r"(none|null|true|false|undefined)?")

_PARAMETER = re.compile(r"([?&;#,])([^?&;#,=\s/'\"<>:]{1,200})=([\"']?)([^?&;#,\s'\"<>]*)")
_ASSIGNMENT = re.compile(
    r"(?<![\w./%-])([A-Za-z][\w.-]{1,63})(\\?[\"'])?[ \t]{0,8}([=:])[ \t]{0,8}(\\?[\"'])?"
)
_VALUE_END = re.compile(r"[;,&\s\"'<>}\]]")
# Names that need no context: outside of a URI and of JSON, `key=value` and `sig=none` say nothing.
_STRONG_NAMES = re.compile(
    r"(aws|azure|azurestorage|gcs|google|s3|oss|cos|minio|hf|huggingface|huggingfacehub|client|"
    r"shared|db|my|x|ocpapim)?(accountkey|secretkey|secretaccesskey|accesskeysecret|sharedaccesskey|"
    r"sharedaccesssignature|accesskey|privatekey|apikey|sastoken|accesstoken|authtoken|"
    r"subscriptionkey|privatetoken|bearertoken|securitytoken|sessiontoken|refreshtoken|hubtoken|hftoken|clientsecret|password|"
    r"passwd|passphrase|pwd)"
)
_WEAK_IN_JSON = re.compile(r"key|code|pass|session|sessionid|auth|sas|sk|ak|hmac|sig|signature|pw")

_AUTHORIZATION = re.compile(
    r"(?<![\w-])((?:proxy-)?authorization|x-[a-z-]{1,40}-token)(\\?[\"'])?\s{0,4}[:=]\s{0,4}", re.I
)
_BEARER = re.compile(r"(?<![\w-])bearer\s{1,4}([\w.~+/=-]{8,})", re.I)
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_-])(?:hf_[A-Za-z0-9]{16,}|gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|"
    r"glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|sk-(?:proj-)?[A-Za-z0-9_]{24,}|AIza[\w-]{30,}|ya29\.[\w-]{16,}|"
    r"dckr_pat_[\w-]{16,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|"
    r"eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?)"
)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY")
HIDDEN = "***"


def find_spans(line: str) -> Iterator[Span]:
    """Yield the parts of a line that are not shown, in no order; they may overlap."""
    uris = _find_uris(line)
    hidden = [*_users(line, uris), *_queries(line, uris), *_parameters(line, uris)]
    yield from hidden
    if "=" in line or ":" in line:
        yield from _assignments(line, sorted(hidden))
    yield from _tokens(line)


def _find_uris(line: str) -> list[_Uri]:
    """Return the URIs of a line, from the first; a URI may hold another one."""
    found: list[_Uri] = []
    end = len(line)
    for match in reversed(list(_SCHEME_MARK.finditer(line))):
        start = match.start()
        while start > max(0, match.start() - _LONGEST_SCHEME) and line[start - 1] in _SCHEME_CHARS:
            start -= 1
        found.append(_Uri(line[start : match.start()].lower(), start, match.end(), end))
        # A password may hold '://': after a single ':' it is no URI of its own.
        before = line[max(0, start - 2) : start]
        if not before.endswith(":") or before == "::":
            end = start
    return found[::-1]


def _users(line: str, uris: list[_Uri]) -> Iterator[Span]:
    """Yield user names and passwords, whatever characters a password has."""
    done = 0
    last_at: dict[int, int] = {}
    for uri in uris:
        if uri.body < done:
            continue
        if uri.end not in last_at:
            last_at[uri.end] = line.rfind("@", uri.body, uri.end)
        if last_at[uri.end] < uri.body:
            continue
        end = _end_of_user(line, uri, last_at[uri.end])
        if end is not None:
            done = end
            yield Span(uri.body, end)


def _end_of_user(line: str, uri: _Uri, last: int) -> int | None:
    """Return where the user name and password of a URI end; None if it has none.

    Args:
        line: The line.
        uri: A URI of it.
        last: Place of the last '@' of the URI and what follows it.
    """
    authority = line[uri.body : _end(_AUTHORITY_END, line, uri.body, uri.end)]
    if _PATH_FIRST.fullmatch(uri.scheme):
        authority = authority.partition("::")[0]
    user, at, _ = authority.rpartition("@")
    stop = uri.body + len(authority)
    if uri.scheme == "github" or _ARN.match(authority):
        return None
    if at and ":" not in user:
        is_path = _PATH_FIRST.fullmatch(uri.scheme) or (
            _CONTAINER_FIRST.fullmatch(uri.scheme) and _CONTAINER.fullmatch(user)
        )
        return None if is_path else uri.body + len(user) + 1
    if not at and _is_host(authority, uri.scheme, followed_by=line[stop : stop + 1]):
        return None
    # The password may hold '/', '?', '#', '@' and spaces: better to hide too much than too little.
    # Behind a complete authority a '?' begins a query, which is hidden by itself.
    word_end = _end(_WORD_END, line, uri.body, uri.end)
    query = line.find("?", stop, word_end) if at else -1
    in_word = line.rfind("@", uri.body, word_end if query < 0 else query)
    return (in_word if in_word >= 0 else last) + 1


def _end(pattern: re.Pattern[str], line: str, start: int, end: int | None = None) -> int:
    """Return where a pattern first matches from `start` on, else the end."""
    end = len(line) if end is None else end
    match = pattern.search(line, start, end)
    return match.start() if match else end


def _is_host(authority: str, scheme: str, followed_by: str) -> bool:
    """Whether an authority without '@' is a host, or a host and a port."""
    match = _HOST_AND_PORT.fullmatch(authority)
    if match is None:
        return False
    if not match[1]:
        # `user:/password@host` looks like a host with an empty port; `C:/` is a drive.
        return match[1] is None or len(authority) == len("C:") or followed_by not in set("/?#")
    return not _WITHOUT_PORT.fullmatch(scheme) and int(match[1]) < 2**16


def _queries(line: str, uris: list[_Uri]) -> Iterator[Span]:
    """Yield the queries of URIs, which may be a signature in a form that is not known."""
    done = 0
    for uri in uris:
        if uri.end <= done:
            continue
        mark = line.find("?", max(uri.body, done), uri.end)
        done = uri.end if mark < 0 else _end(_WORD_END, line, mark)
        if mark >= 0:
            yield Span(mark, done, is_secret=False)


def _parameters(line: str, uris: list[_Uri]) -> Iterator[Span]:
    """Yield the parameters with a secret, each with all that follows it in its word.

    After '?' and '&' a parameter needs no URI, since an address may lack its scheme.
    """
    first = uris[0].body if uris else len(line)
    done = 0
    for match in _PARAMETER.finditer(line):
        if match.start() < done or (match[1] in ";#," and match.start() < first):
            continue
        if has_secret_name(match[2]) and _is_value(match[4]):
            # In a line that is a URI, nothing else follows.
            is_alone = bool(uris) and uris[0].start == 0
            done = len(line) if is_alone else _end(_WORD_END, line, match.end())
            yield Span(match.start(), done)


def has_secret_name(name: str) -> bool:
    """Whether the name of a parameter says that its value gives access to something."""
    for _ in range(3):
        if "%" not in name:
            break
        name = unquote(name)
    words = [word.lower() for word in _NAME_WORDS.findall(name)]
    squeezed = "".join(words)
    if _SECRET_PARTS.search(squeezed):
        return True
    return not _HARMLESS_KEY.search(squeezed) and (
        squeezed.endswith("key") or any(map(_SECRET_WORDS.fullmatch, (*words, squeezed)))
    )


def _is_value(text: str) -> bool:
    return _NO_VALUES.fullmatch(text.lower()) is None


def _assignments(line: str, hidden: list[Span]) -> Iterator[Span]:
    """Yield the values of assignments such as AccountKey=..., and of JSON with a secret's name.

    Args:
        line: The line.
        hidden: Parts of URIs that are hidden as a whole, from the first.
    """
    done, parts = 0, iter(hidden)
    part = next(parts, None)
    for match in _ASSIGNMENT.finditer(line):
        while part is not None and part.end <= match.start():
            part = next(parts, None)
        if match.start() < done or (part is not None and part.start <= match.start()):
            continue
        if not _names_secret(match[1], match[3], in_json=bool(match[2])):
            continue
        start, quote = match.end(), match[4]
        end = line.find(quote, start) if quote else _end(_VALUE_END, line, start)
        end = len(line) if end < 0 else end
        if _is_value(line[start:end]):
            done = end
            yield Span(start, end, mark=HIDDEN)


def _names_secret(name: str, sign: str, *, in_json: bool) -> bool:
    squeezed = re.sub(r"[^a-z0-9]", "", name.lower())
    if _STRONG_NAMES.fullmatch(squeezed):
        return True
    if sign == "=" and squeezed in ("secret", "token"):
        return True
    return in_json and has_secret_name(name) and not _WEAK_IN_JSON.fullmatch(squeezed)


def _tokens(line: str) -> Iterator[Span]:
    """Yield what is known by its look: headers, tokens of known services, private keys."""
    for match in _AUTHORIZATION.finditer(line):
        yield Span(match.end(), len(line), mark=HIDDEN)
        break
    for match in _BEARER.finditer(line):
        if re.search(r"\d|[A-Z].*[A-Z]", match[1]):
            yield Span(*match.span(1), mark=HIDDEN)
    for match in _TOKEN.finditer(line):
        yield Span(*match.span(), mark=HIDDEN)
    match_key = _PRIVATE_KEY.search(line)
    if match_key:
        yield Span(match_key.start(), len(line), mark=HIDDEN)
