"""Slides opened as the file that a run knows: another file is refused, and a change is noticed.

A source is a text that begins with the fingerprint of a slide's file, see storage/fingerprint.py.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from scellst_ray.slides.reader import Slide
from scellst_ray.storage.fingerprint import (
    Fingerprint,
    LocalFile,
    fingerprint_of,
    is_unchanged,
    look,
)
from scellst_ray.storage.node_cache import Held, hold


class ChangedFileError(ValueError):
    """A slide's file is another one than the run has read."""


@dataclass(frozen=True)
class SourcedSlide:
    """An open slide and the identity of its file. Close it, or use it in a `with`.

    Attributes:
        slide: The slide.
        fingerprint: Fingerprint of its file.
        files: Its local files when it was opened; none for a copy, which never changes.
        held: The file.
    """

    slide: Slide
    fingerprint: Fingerprint
    files: tuple[LocalFile, ...]
    held: Held

    def check(self) -> None:
        """Make sure that what was read since the slide was opened is of one file.

        Raises:
            ChangedFileError: the file has changed.
        """
        if not is_unchanged(self.files):
            raise ChangedFileError(_explain_change(self.slide.uri))

    def close(self) -> None:
        """Close the slide and release its file."""
        self.slide.close()
        self.held.close()

    def __enter__(self) -> Self:
        """Return this object."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the slide and release its file."""
        self.close()


def open_slide(
    uri: str, mpp: float | None, *, planned: str | None = None, recorded: str | None = None
) -> SourcedSlide:
    """Open a slide.

    Args:
        uri: Local path or fsspec URI.
        mpp: Resolution in um per level-0 px; None takes the file's.
        planned: Source with which the slide was planned in this run; None: not known.
        recorded: Source in the record of a finished slide; a copy of that file will do, too. None:
            not known, as in records of earlier releases.

    Raises:
        ChangedFileError: the file is another one.
        ValueError: the file cannot be read as a slide.
        OSError: the file cannot be read.
    """
    with ExitStack() as stack:
        held = stack.enter_context(hold(uri))
        files = look(held.path) if held.mark is None else ()
        fingerprint = held.mark or fingerprint_of(files)
        _refuse_others(fingerprint, held, planned, recorded)
        slide = Slide(held.path, held.name, mpp)
        stack.pop_all()
        return SourcedSlide(slide, fingerprint, files, held)


def _refuse_others(
    fingerprint: Fingerprint, held: Held, planned: str | None, recorded: str | None
) -> None:
    if planned is not None and not fingerprint.is_that_of(planned):
        raise ChangedFileError(_explain_change(held.name))
    if recorded is not None and not fingerprint.has_content_of(recorded):
        message = (
            f"{held.name}: the file is another one than that in which the run found the slide's "
            "cells; put the file back, or extract the slide into another --out"
        )
        raise ChangedFileError(message)


def _explain_change(name: str) -> str:
    return f"{name}: the file changed while the run was reading it; run the same command again"
