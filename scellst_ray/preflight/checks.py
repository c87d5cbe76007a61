"""What is checked before anything expensive begins, so that all that is wrong is told at once.

Two kinds of problems. One of a slide (not there, no resolution) never stops a cohort: the slide
becomes a failed record, as it would without this. One of the run as a whole (output that cannot be
written, weights that a node lacks, nodes with different versions) stops it before work starts.

The slides are asked for, not opened: the driver must not read what may crash its process, and a
look into ten thousand headers takes longer than finding out slide by slide. So what a header says
(its resolution, whether it is whole) is left to the planning of each slide, and to `doctor`.

preflight/nodes.py says what is asked of nodes, and pipelines/ask_nodes.py asks them.
"""

import logging
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scellst_ray import storage
from scellst_ray.core.geometry import check_mpp
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.storage.credentials import redact
from scellst_ray.storage.retries import call_with_retries

# Slides asked for at a time: on object storage each takes a round trip.
NUM_ASKERS = 32
# All together, at most: a store that is down takes half a minute to say so, each time.
ASK_S = 300.0
# Of a problem that many slides have, this many are named.
NAMED_SLIDES = 20
# Formats that never tell their resolution.
PLAIN = (".jpg", ".jpeg", ".png", ".bmp")
# Slides that every node is asked to find.
SHOWN_SLIDES = 3


@dataclass(frozen=True)
class Problem:
    """Something wrong: where, what, and the remedy, in one line.

    Attributes:
        text: The line.
        stops: Whether it stops the run.
        node_id: The node that had better not work because of it, or None.
    """

    text: str
    stops: bool = True
    node_id: str | None = None


@dataclass(frozen=True)
class FoundSlides:
    """What became of asking for all slides.

    Attributes:
        reasons: What is wrong with single slides, by slide_id; nothing that stops the run.
        num_bytes: Of each slide that is there, by slide_id; 0 if its store does not tell.
        local: Files of slides that are there, on a disk or mount.
        largest_remote: Bytes of the largest slide on object storage.
        num_unasked: Slides that there was no time to ask for.
    """

    reasons: dict[str, str]
    num_bytes: dict[str, int]
    local: list[str]
    largest_remote: int
    num_unasked: int = 0

    @property
    def problems(self) -> list[Problem]:
        """The problems of slides."""
        texts = [f"slide {slide_id}: {reason}" for slide_id, reason in self.reasons.items()]
        if self.num_unasked:
            texts.append(
                f"{self.num_unasked:,} slides were not asked for: others took {ASK_S:g} s; is "
                "their store up?"
            )
        return [Problem(text, stops=False) for text in texts]


def find_slides(slides: Sequence[SlideRow], *, imported: bool = False) -> FoundSlides:
    """Ask for every slide of a manifest, many at a time; nothing is opened.

    Args:
        slides: The manifest.
        imported: Whether each needs the file of its segmentation.
    """
    until = time.monotonic() + ASK_S

    def ask(slide: SlideRow) -> tuple[int | None, str | None]:
        if time.monotonic() > until:
            return None, None
        return _asked(slide, imported=imported)

    with ThreadPoolExecutor(NUM_ASKERS) as askers:
        found = list(askers.map(ask, slides))
    pairs = [(slide, *told) for slide, told in zip(slides, found, strict=True)]
    there = [(slide, num_bytes) for slide, num_bytes, _ in pairs if num_bytes is not None]
    return FoundSlides(
        {slide.slide_id: reason for slide, _, reason in pairs if reason is not None},
        {slide.slide_id: num_bytes for slide, num_bytes in there},
        [slide.uri for slide, _ in there if storage.is_local(slide.uri)],
        max((n for slide, n in there if not storage.is_local(slide.uri)), default=0),
        found.count((None, None)),
    )


def _asked(slide: SlideRow, *, imported: bool) -> tuple[int | None, str | None]:
    """Return the bytes of a slide that is there, and all that is wrong with it."""
    reasons = [] if slide.mpp_error is None else [slide.mpp_error]
    num_bytes = None
    uris = [slide.uri]
    if imported and "segmentation" not in slide.columns:
        reasons.append("the manifest names no file in column segmentation; name one")
    elif imported:
        uris.append(slide.columns["segmentation"])
    for uri in uris:
        try:
            size = size_of(uri)
        except OSError as error:
            reasons.append(f"{error}; mend the manifest, or put the file there")
        else:
            num_bytes = size if uri == slide.uri else num_bytes
    if slide.mpp is None and not reasons and slide.uri.lower().endswith(PLAIN):
        try:
            check_mpp(None, redact(slide.uri))
        except ValueError as error:
            reasons.append(str(error))
    return num_bytes, "; ".join(reasons) or None


def size_of(uri: str) -> int:
    """Return the bytes of a file that is there and may be read: on object storage, one request.

    0 for a folder, and where the store does not tell.

    Raises:
        OSError: it is not there, is empty, or cannot be read.
    """
    fs, path = storage.resolve(uri)
    if not storage.is_local(uri):
        told = call_with_retries(lambda: fs.info(path), redact(uri)).get("size")
        if told is None:
            return 0
        num_bytes = int(told)
    elif not Path(path).exists():
        message = f"{uri}: no such file"
        raise FileNotFoundError(message)
    elif not os.access(path, os.R_OK):
        message = f"{uri}: may not be read by user {os.getuid()} of {socket.gethostname()}"
        raise PermissionError(message)
    elif Path(path).is_dir():  # some formats are folders
        return 0
    else:
        num_bytes = Path(path).stat().st_size
    if not num_bytes:
        message = f"{redact(uri)}: the file is empty"
        raise OSError(message)
    return num_bytes


def format_problems(problems: Sequence[Problem]) -> list[str]:
    """Return a line for each problem, those that stop the run first, most of many left out."""
    stopping = [problem.text for problem in problems if problem.stops]
    others = [problem.text for problem in problems if not problem.stops]
    more = len(others) - NAMED_SLIDES
    rest = [f"... and {more:,} more"] if more > 0 else []
    return [*stopping, *others[:NAMED_SLIDES], *rest]


def stop_or_warn(problems: list[Problem], logger: logging.Logger) -> None:
    """Raise if a problem stops the run, and log them otherwise: all in one message.

    Raises:
        ValueError: a line for each problem.
    """
    lines = "\n".join(f"- {line}" for line in format_problems(problems))
    num = sum(problem.stops for problem in problems)
    if num:
        message = f"{num} problem(s) must be mended before this run can start:\n{lines}"
        if num < len(problems):
            message += "\n(slides that cannot be reached would not stop it)"
        raise ValueError(message)
    if problems:
        text = "%d slide(s) or node(s) with problems; the run goes on without them:\n%s"
        logger.warning(text, len(problems), lines)
