"""JSON documents of a run folder: the one place that reads and checks them.

A crash, a disk, an editor or a synchronising tool may leave a document empty, cut, or of another
shape. Then reading raises DamagedFileError, which names the file. A document that this release
publishes holds a checksum of itself. So a changed digit is noticed too.
"""

import hashlib
import json
import logging
import re
import types
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import cache, partial
from typing import (
    Any,
    Literal,
    NotRequired,
    TypedDict,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from scellst_ray import storage
from scellst_ray.runs.records import LeaseInfo

T = TypeVar("T")
CHECKSUM = "checksum"
# Key of an entry of slides.json: digest of the slide_ids of all entries.
ALL_SLIDES = "all_slides"
RECORD_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*\.json", re.ASCII)
# Half of a character beyond 16 bits, as JSON writes it.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# `renewed` is for people.
LEASE_KEYS = sorted(LeaseInfo.__required_keys__ - {"renewed"})
# Numbers that fill 64 bits without a sign: priorities of crops.
UNSIGNED = ("cutoff",)
# Documents read at a time: on object storage each one takes a round trip.
NUM_READERS = 16
logger = logging.getLogger(__name__)


class HasSlide(TypedDict):
    """What every record has.

    Attributes:
        slide_id: The slide.
        status: Outcome of the slide.
    """

    slide_id: str
    status: str


def publish_document(uri: str, document: Mapping[str, Any]) -> None:
    """Publish a JSON document with a checksum of itself."""
    content = json.loads(json.dumps(dict(document), default=str))
    storage.publish_json(uri, content | {CHECKSUM: _checksum(content)})


def read_document(
    uri: str, kind: type[T], remedy: str = "", needed: Collection[str] | None = None
) -> T:
    """Read a JSON document.

    Args:
        uri: The document.
        kind: TypedDict of its keys. Unknown keys are kept.
        remedy: What to do if the document is damaged.
        needed: Keys without which the reader can do nothing; None: all that `kind` requires.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is no such document.
        OSError: the file cannot be read.
    """
    return parse_document(storage.read_bytes(uri), kind, uri, remedy, needed)


def parse_document(
    content: bytes,
    kind: type[T],
    uri: str,
    remedy: str = "",
    needed: Collection[str] | None = None,
) -> T:
    """Return the document that bytes hold; arguments and errors are those of `read_document`."""
    problem: str | None
    try:
        found = json.loads(content)
    except RecursionError:
        problem = "its JSON is nested without end"
    except ValueError as error:
        problem = f"it is no JSON: {error}" if content.strip() else "it is empty"
    else:
        problem = mismatch(found, kind, needed=needed) or _no_text_in(content, found)
        # A slide of this name has an object here.
        if problem is None and not isinstance(found.get(CHECKSUM, {}), dict):
            checksum = found.pop(CHECKSUM)
            if checksum != _checksum(found):
                problem = "it was changed after it was written: its checksum is another one"
    if problem is not None:
        raise storage.DamagedFileError(uri, f"is damaged: {problem}", remedy)
    return cast("T", found)


def _no_text_in(content: bytes, found: object) -> str | None:
    """Return why a document cannot be written again; None if it can."""
    if _SURROGATE.search(content):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "a text of it has half of a character"
    return None


def _checksum(content: Mapping[str, Any]) -> str:
    return _digest({key: value for key, value in content.items() if key != CHECKSUM})


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def mismatch(
    value: object, kind: object, place: str = "it", needed: Collection[str] | None = None
) -> str | None:
    """Return why a value of JSON is not of a type, or None: builtins, unions, TypedDicts, ...

    Args:
        value: The value.
        kind: The type, as an annotation.
        place: Name of the value in the answer.
        needed: Keys that a TypedDict must have; None: all that it requires.
    """
    origin, args = get_origin(kind), get_args(kind)
    problem: str | None = None
    if is_typeddict(kind):
        problem = _mismatch_of_keys(value, cast("type", kind), place, needed)
    elif origin in (Union, types.UnionType):
        problems = [mismatch(value, arg, place) for arg in args]
        problem = None if None in problems else problems[0]
    elif origin is NotRequired:
        problem = mismatch(value, args[0], place)
    elif origin is Literal:
        is_one = isinstance(value, str) and value in args
        problem = None if is_one else _expected(place, f"one of {', '.join(args)}", value)
    elif kind not in (Any, object):
        problem = _mismatch_of_parts(value, cast("type", origin or kind), args, place)
    return problem


def _mismatch_of_parts(
    value: object, expected: type, args: tuple[object, ...], place: str
) -> str | None:
    """Return why a value, or a part of it, is not of a builtin type such as list[int]."""
    allowed = (int, float) if expected is float else expected
    if not isinstance(value, allowed) or (isinstance(value, bool) and expected is not bool):
        return _expected(place, expected.__name__, value)
    if isinstance(value, int) and not -(2**63) <= value < 2 ** (64 if place in UNSIGNED else 63):
        return _expected(place, "a number of 64 bits", value)
    parts: list[tuple[object, object, str]] = []
    if isinstance(value, list) and args:
        parts = [(each, args[0], f"{place}[{i}]") for i, each in enumerate(value)]
    elif isinstance(value, dict) and args:
        parts = [(each, args[1], f"{place}.{key}") for key, each in value.items()]
    return next((text for part in parts if (text := mismatch(*part)) is not None), None)


def _mismatch_of_keys(
    value: object, kind: type, place: str, needed: Collection[str] | None
) -> str | None:
    if not isinstance(value, dict):
        return _expected(place, "an object", value)
    hints, required = _keys(kind)
    for key in required if needed is None else needed:
        if key not in value:
            return f"{place} has no {key}"
    known = ((value[key], hint, key) for key, hint in hints.items() if key in value)
    return next((text for part in known if (text := mismatch(*part)) is not None), None)


@cache
def _keys(kind: type) -> tuple[dict[str, Any], list[str]]:
    required: frozenset[str] = kind.__required_keys__  # type: ignore[attr-defined]
    return get_type_hints(kind), sorted(required)


def _expected(place: str, expected: object, value: object) -> str:
    text = repr(value)
    return f"{place} is {text[:60]}{'...' if len(text) > 60 else ''}, expected {expected}"


def read_records(folder: str, kind: type[T], what: str) -> dict[str, T]:
    """Read the records in a folder, by slide_id; files that are none are passed over.

    A file of another name (an editor's copy, a thumbnail) is no record. One that is damaged gives
    a warning, and its slide has no record.

    Args:
        folder: The folder.
        kind: TypedDict of a record.
        what: What becomes of a slide whose record is damaged, for the warning.
    """
    uris = [u for u in storage.list_files(folder) if RECORD_NAME.fullmatch(u.rsplit("/", 1)[-1])]
    with ThreadPoolExecutor(NUM_READERS) as readers:
        found = list(readers.map(partial(_read_record, kind=kind, what=what), uris))
    return {slide_id: record for slide_id, record in found if record is not None}


def _read_record(uri: str, kind: type[T], what: str) -> tuple[str, T | None]:
    """Return the slide_id in a record's name, and the record; None if it is damaged or gone."""
    slide_id = uri.rsplit("/", 1)[-1].removesuffix(".json")
    try:
        return slide_id, checked_record(uri, kind)
    except storage.DamagedFileError as error:
        warn_once(f"{error}; {what}")
    except FileNotFoundError:  # removed since the folder was listed
        pass
    except OSError as error:
        if not storage.is_local(uri):  # the store may be out of order, and all records with it
            raise
        warn_once(f"{uri}: cannot be read ({error.strerror}); {what}")
    return slide_id, None


def checked_record(uri: str, kind: type[T]) -> T:
    """Read a record, of the slide that its name says.

    Raises:
        DamagedFileError: it is no such record.
        OSError: the file cannot be read.
    """
    record = read_document(uri, kind, needed=("slide_id", "status"))
    found = cast("HasSlide", record)["slide_id"]
    if f"{found}.json" != uri.rsplit("/", 1)[-1]:
        raise storage.DamagedFileError(uri, f"is the record of slide {found!r}")
    return record


def parse_lease(content: bytes, uri: str) -> LeaseInfo:
    """Return the content of `lease.json`.

    Raises:
        DamagedFileError: it is empty, cut, or no lease.
    """
    found = parse_document(content, LeaseInfo, uri, needed=LEASE_KEYS)
    for name in ("acquired", "renewed", "expires"):
        try:
            time = datetime.fromisoformat(str({**found}.get(name, found["acquired"])))
        except ValueError:
            time = None
        if time is None or time.tzinfo is None:
            raise storage.DamagedFileError(uri, f"is damaged: {name} is no time with a zone")
    return found


def publish_sources(uri: str, sources: Mapping[str, Mapping[str, Any]]) -> None:
    """Publish `slides.json`: the sources of slides by slide_id.

    Each entry has a checksum of itself and a digest of all slide_ids.
    """
    of_all = {ALL_SLIDES: _digest(sorted(sources))}
    entries = {
        slide_id: {**source, **of_all, CHECKSUM: _checksum({"slide_id": slide_id, **source})}
        for slide_id, source in sources.items()
    }
    storage.publish_json(uri, entries)


def read_sources(uri: str, kind: type[T], remedy: str) -> dict[str, T]:
    """Read `slides.json`: the sources of slides, by slide_id; empty if there is no such file.

    Raises:
        DamagedFileError: it is no such document, or an entry was changed, added or removed.
        OSError: the file cannot be read.
    """
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        return {}
    found: dict[str, dict[str, Any]] = parse_document(content, dict[str, kind], uri, remedy)  # type: ignore[valid-type]
    of_all = _digest(sorted(found))
    problem = None
    for slide_id, source in found.items():
        listed = source.pop(ALL_SLIDES, None)  # both are absent from earlier releases
        checksum = source.pop(CHECKSUM, None)
        is_signed = checksum is not None or listed is not None
        if is_signed and checksum != _checksum({"slide_id": slide_id, **source}):
            problem = f"the entry of slide {slide_id!r} was changed after it was written"
        elif listed not in (None, of_all):
            problem = problem or "an entry was added or removed after it was written"
    if problem is not None:
        raise storage.DamagedFileError(uri, f"is damaged: {problem}", remedy)
    return cast("dict[str, T]", found)


@cache
def _warned() -> set[str]:
    return set()


def warn_once(text: str) -> None:
    """Log a warning, once in this process: several steps of a command read the same file."""
    if text not in _warned():
        _warned().add(text)
        logger.warning(text)
