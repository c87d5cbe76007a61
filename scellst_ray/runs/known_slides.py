"""The slides that a run knows, in slides.json, against those that a command is given.

A finished slide stays finished whatever becomes of its file. A command is refused only if it says
that a finished slide is another one. A slide that is not finished may change in any way: receipts
carry what they are of (runs/receipt_sources.py), so it is then done from the start.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scellst_ray import storage
from scellst_ray.runs.documents import NUM_READERS, publish_sources, read_sources
from scellst_ray.runs.folder import FINISHED, SLIDES_FILE, SOURCES_REMEDY, RunFolder
from scellst_ray.runs.records import SlideRecord, SlideSource
from scellst_ray.storage import node_cache
from scellst_ray.storage.credentials import redact
from scellst_ray.storage.fingerprint import changed_of, look

NAMED_SLIDES = 10
KINDS: tuple[Literal["uri", "segmentation"], ...] = ("uri", "segmentation")
logger = logging.getLogger(__name__)


@dataclass
class Comparison:
    """Findings about the slides of a command.

    Attributes:
        entries: What slides.json says from now on, by slide_id.
        problems: Why a finished slide is another one now, by slide_id.
        replaced: slide_ids of finished slides whose file holds another content now.
        unlisted: slide_ids of finished slides that slides.json lacks.
        trusted: slide_ids that are what they were in all earlier commands. Receipts without a
            source, which earlier releases wrote, count for these alone.
    """

    entries: dict[str, SlideSource] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    trusted: set[str] = field(default_factory=set)


def accept_slides(
    run: RunFolder,
    slides: Mapping[str, SlideSource],
    records: Mapping[str, SlideRecord],
    moved: Sequence[str] = (),
) -> set[str]:
    """Compare slides with those that the run knows, and note them in slides.json.

    Args:
        run: The run. Its lease is held.
        slides: Sources by slide_id, as the manifest has them now.
        records: Records of the run by slide_id.
        moved: Texts OLD=NEW: files or folders that were moved.

    Returns:
        slide_ids whose receipts may count without a source.

    Raises:
        DamagedFileError: slides.json cannot be read.
        ValueError: a finished slide is another one now; nothing was written.
    """
    uri = storage.join(run.uri, SLIDES_FILE)
    known = read_sources(uri, SlideSource, SOURCES_REMEDY)
    found = _compare(known, slides, records, moved)
    if found.problems:
        raise ValueError(_refusal(run, found.problems))
    if found.replaced:
        logger.warning(
            "%d finished slide(s) stay as they are, but their file holds another content now: "
            "%s. To do one from the start, remove its record (such as %s) and run the same "
            "command again",
            len(found.replaced),
            _first_of(found.replaced),
            run.record_uri(found.replaced[0]),
        )
    if found.unlisted:
        logger.warning(
            "%s: lacked %d finished slide(s): %s. Their entries are made from the manifest",
            uri,
            len(found.unlisted),
            _first_of(found.unlisted),
        )
    now = known | found.entries
    if now != known:
        publish_sources(uri, now)
    return found.trusted


def _compare(
    known: Mapping[str, SlideSource],
    slides: Mapping[str, SlideSource],
    records: Mapping[str, SlideRecord],
    moved: Sequence[str],
) -> Comparison:
    found = Comparison()
    finished = []
    for slide_id, now in slides.items():
        before, record = known.get(slide_id), records.get(slide_id)
        if record is not None and record["status"] in FINISHED:
            if before is None:
                found.unlisted.append(slide_id)
            slide = _FinishedSlide(slide_id, before or now, now, record, moved, before is not None)
            finished.append(slide)
        elif before is None:
            found.entries[slide_id] = now
        else:
            found.entries[slide_id] = _note_change(before, now)
            if not found.entries[slide_id].get("changed"):
                found.trusted.add(slide_id)
    # Threads, since a disk or a store is asked for each slide that may have changed.
    with ThreadPoolExecutor(NUM_READERS) as askers:
        outcomes = list(askers.map(lambda slide: (slide.problem(), slide.is_replaced()), finished))
    for slide, (problem, is_replaced) in zip(finished, outcomes, strict=True):
        found.entries[slide.slide_id] = slide.entry()
        if problem is not None:
            found.problems[slide.slide_id] = problem
        elif is_replaced:
            found.replaced.append(slide.slide_id)
    return found


def _first_of(slide_ids: Sequence[str]) -> str:
    more = " ..." if len(slide_ids) > NAMED_SLIDES else ""
    return ", ".join(slide_ids[:NAMED_SLIDES]) + more


def _note_change(before: SlideSource, now: SlideSource) -> SlideSource:
    """Return the entry of an unfinished slide; once it has changed, it says so for good.

    A driver may die after it wrote the new entry, so the change must not be found there alone.
    """
    old = {key: value for key, value in before.items() if key not in _NAMES}
    new = {key: value for key, value in now.items() if key not in _NAMES}
    return {**now, "changed": True} if before.get("changed") or old != new else now


# Keys of an entry that say nothing of the slide itself.
_NAMES = ("named", "segmentation_named", "changed")


@dataclass(frozen=True)
class _FinishedSlide:
    """A finished slide, as it was read and as the manifest has it now.

    If slides.json lacks it, `before` is what the manifest has now, and the record alone says more.
    """

    slide_id: str
    before: SlideSource
    now: SlideSource
    record: SlideRecord
    moved: Sequence[str]
    is_listed: bool

    def entry(self) -> SlideSource:
        """Return the entry for slides.json: what was read, where it is now."""
        places: SlideSource = {**self.before, "uri": self.now["uri"]}
        for key in ("named", "segmentation_named", "segmentation"):
            if key in self.now:
                places[key] = self.now[key]
        return places

    def problem(self) -> str | None:
        """Return why the slide is another one now; None if it is the same."""
        if not self.is_listed:
            return self._problem_by_record()
        mpp, own = self.now["mpp"], self.record.get("mpp")
        if mpp != self.before["mpp"] and (mpp is None or mpp != own):
            values = [f"mpp {value or 'of its file'}" for value in (self.before["mpp"], mpp)]
            return f"was read with {values[0]}, and the manifest has {values[1]} now"
        if self.before.get("colours") != self.now.get("colours"):
            return "was normalised by other colours than those that its crops have now"
        for kind in KINDS:
            if self.before.get(kind) != self.now.get(kind) and not self._is_moved(kind):
                values = [redact(str(entry.get(kind))) for entry in (self.before, self.now)]
                what = "nuclei were imported" if kind == "segmentation" else "was read"
                return f"{what} from {values[0]}, and the manifest names {values[1]} now"
        return None

    def _problem_by_record(self) -> str | None:
        """Return why the slide is not the one of its record; None if nothing says so."""
        mpp, own = self.now["mpp"], self.record.get("mpp")
        if None not in (mpp, own) and mpp != own:
            return f"was read with mpp {own}, and the manifest has mpp {mpp} now"
        for kind in KINDS:
            uri, source = self.now.get(kind), self._source(kind)
            file = None if uri is None or source is None else node_cache.fingerprint(uri)
            if file is not None and source is not None and not file.has_content_of(source):
                return (
                    f"was read from another {kind} than {redact(str(uri))} is now "
                    f"({SLIDES_FILE} lacks it)"
                )
        return None

    def is_replaced(self) -> bool:
        """Return whether a local file of the slide holds another content than was read."""
        return any(self._is_replaced(kind) for kind in KINDS)

    def _is_replaced(self, kind: Literal["uri", "segmentation"]) -> bool:
        uri = self.now.get(kind)
        if uri is None or not storage.is_local(uri):
            return False
        source = self._source(kind)
        try:
            changed = changed_of(look(Path(storage.resolve(uri)[1])))
        except OSError:
            return False  # archived
        if source is None:
            sizes = [_size(entry, kind) for entry in (self.before, self.now)]
            return None not in sizes and sizes[0] != sizes[1]
        if source.split("-")[1] == changed:
            return False
        file = node_cache.fingerprint(uri)
        return file is not None and not file.has_content_of(source)

    def _is_moved(self, kind: Literal["uri", "segmentation"]) -> bool:
        """Return whether another name is of the same file."""
        before, now = self.before.get(kind), self.now.get(kind)
        if before is None or now is None:
            return False
        if any(moved_uri(text, before) == now for text in self.moved):
            return True
        named = [_name(entry, kind) for entry in (self.before, self.now)]
        may_be_gone = named[0] is not None and named[0] == named[1]
        source, file = self._source(kind), node_cache.fingerprint(now)
        if file is None:
            return may_be_gone
        if source is None:
            sizes = [_size(entry, kind) for entry in (self.before, self.now)]
            return may_be_gone and sizes[0] == sizes[1]
        return file.has_content_of(source)

    def _source(self, kind: Literal["uri", "segmentation"]) -> str | None:
        """Return the fingerprint in the record; None in those of earlier releases."""
        if kind == "uri":
            return self.record.get("source")
        report = self.record.get("imported")
        return None if report is None else report.get("fingerprint")


def _size(entry: SlideSource, kind: Literal["uri", "segmentation"]) -> int | None:
    return entry.get("bytes") if kind == "uri" else entry.get("segmentation_bytes")


def _name(entry: SlideSource, kind: Literal["uri", "segmentation"]) -> str | None:
    return entry.get("named") if kind == "uri" else entry.get("segmentation_named")


def moved_uri(text: str, uri: str) -> str | None:
    """Return where a file is after a move.

    Args:
        text: OLD=NEW, a file or folder each. A name may hold further '='.
        uri: The file before.

    Returns:
        The file after the move; None if the move is not of this file.
    """
    for old, new in _splits(text):
        if uri == old or uri.startswith(f"{old}/"):
            return new + uri[len(old) :]
    return None


def check_moved(moved: Sequence[str]) -> None:
    """Refuse what is not OLD=NEW.

    Raises:
        ValueError: a text lacks a part.
    """
    for text in moved:
        if not list(_splits(text)):
            message = f"moved: {text!r} is not OLD=NEW, the file or folder before and now"
            raise ValueError(message)


def _splits(text: str) -> Iterator[tuple[str, str]]:
    for at, character in enumerate(text):
        old, new = text[:at].strip(), text[at + 1 :].strip()
        if character == "=" and old and new:
            yield storage.absolute(old), storage.absolute(new)


def _refusal(run: RunFolder, problems: Mapping[str, str]) -> str:
    slide_id, problem = next(iter(problems.items()))
    return (
        f"{run.uri}: slide {slide_id!r} is finished: it {problem} ({len(problems)} such slides). "
        "Give another --out, or the manifest as it was; --moved OLD=NEW if files were only moved; "
        f"or do such slides from the start by removing their records, such as "
        f"{run.record_uri(slide_id)}"
    )
