"""Checks before a run starts, so that all problems are reported at once.

There are two kinds of problems:

- A problem of a slide (the file is missing, the resolution is unknown) never stops a cohort. The
  slide gets a record with status failed, as it would without the checks.
- A problem of the whole run stops it before work starts: the output cannot be written, a node lacks
  weights, nodes have different versions.

Slides are looked up, not opened. A broken slide could crash the driver, and reading ten thousand
headers takes longer than planning slide by slide. So headers are read by the planning of each
slide, and by `doctor`.

preflight/nodes.py checks a node, and pipelines/ask_nodes.py runs it on every node.
"""

import logging
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from scellst_ray import storage
from scellst_ray.core.geometry import check_mpp
from scellst_ray.slides.manifest import PATH_COLUMNS, SlideRow
from scellst_ray.storage.credentials import redact
from scellst_ray.storage.retries import call_with_retries

# Slides looked up at the same time; on object storage each takes a round trip.
NUM_ASKERS = 32
# Time limit in seconds for all slides, since a store that is down needs 30 s to fail, each time.
ASK_S = 300.0
# Number of problems of slides that are listed one by one.
NAMED_SLIDES = 20
# Suffixes of formats that never state their resolution.
PLAIN = (".jpg", ".jpeg", ".png", ".bmp")
# Number of slides that every node is asked to find.
SHOWN_SLIDES = 3


@dataclass(frozen=True)
class Problem:
    """A problem of a slide, a node or the run.

    Attributes:
        text: One line with place, cause and remedy.
        stops: Whether the problem stops the run.
        node_id: Node that should get no work because of the problem, or None.
    """

    text: str
    stops: bool = True
    node_id: str | None = None


@dataclass(frozen=True)
class FoundSlides:
    """Results of looking up all slides.

    Attributes:
        reasons: Problems of single slides by slide_id; none of them stops the run.
        num_bytes: Size of each existing slide by slide_id; 0 if its store does not state the size.
        local: Files of existing slides on a disk or mount.
        largest_remote: Bytes of the largest slide on object storage.
        num_unasked: Number of slides that were not looked up before the time limit.
    """

    reasons: dict[str, str]
    num_bytes: dict[str, int]
    local: list[str]
    largest_remote: int
    num_unasked: int = 0

    @property
    def problems(self) -> list[Problem]:
        """Problems of slides; none of them stops the run."""
        texts = [f"slide {slide_id}: {reason}" for slide_id, reason in self.reasons.items()]
        if self.num_unasked:
            texts.append(
                f"{self.num_unasked:,} slides were not checked, since the checks before them took "
                f"{ASK_S:g} s; check that their store is up"
            )
        return [Problem(text, stops=False) for text in texts]


def find_slides(slides: Sequence[SlideRow], *, imported: bool = False) -> FoundSlides:
    """Look up every slide of a manifest, many at a time; no slide is opened.

    Args:
        slides: Rows of the manifest.
        imported: Whether each slide also needs the file of its segmentation.
    """
    until = time.monotonic() + ASK_S

    def ask(slide: SlideRow) -> tuple[int | None, str | None]:
        if time.monotonic() > until:
            return None, None
        return _look_up(slide, imported=imported)

    askers = ThreadPoolExecutor(NUM_ASKERS)
    try:
        answers = list(askers.map(ask, slides))
    finally:
        # After Ctrl-C nobody waits for a store that does not answer.
        askers.shutdown(wait=False, cancel_futures=True)
    rows = [(slide, *answer) for slide, answer in zip(slides, answers, strict=True)]
    existing = [(slide, num_bytes) for slide, num_bytes, _ in rows if num_bytes is not None]
    return FoundSlides(
        {slide.slide_id: reason for slide, _, reason in rows if reason is not None},
        {slide.slide_id: num_bytes for slide, num_bytes in existing},
        [slide.uri for slide, _ in existing if storage.is_local(slide.uri)],
        max((n for slide, n in existing if not storage.is_local(slide.uri)), default=0),
        answers.count((None, None)),
    )


def _look_up(slide: SlideRow, *, imported: bool) -> tuple[int | None, str | None]:
    """Return (bytes of the slide, or None if it is missing; all its problems, or None)."""
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
            reasons.append(f"{error}; correct the manifest, or put the file there")
        else:
            num_bytes = size if uri == slide.uri else num_bytes
    if slide.mpp is None and not reasons and slide.uri.lower().endswith(PLAIN):
        try:
            check_mpp(None, redact(slide.uri))
        except ValueError as error:
            reasons.append(str(error))
    return num_bytes, "; ".join(reasons) or None


def missing_files(slide: SlideRow) -> list[str]:
    """Return a line for each file that a row names besides its slide and that cannot be found."""
    problems = []
    for column in PATH_COLUMNS:
        if column in slide.columns:
            uri = str(slide.columns[column])
            try:
                if storage.is_local(uri) or PurePosixPath(uri).suffix:
                    size_of(uri)
                elif not storage.list_all(uri):  # a folder on object storage
                    problems.append(f"{column}: {redact(uri)}: no such folder")
            except OSError as error:
                problems.append(f"{column}: {error}; correct the manifest, or put the file there")
    return problems


def size_of(uri: str) -> int:
    """Return the bytes of a readable file; on object storage, this takes one request.

    Returns:
        Bytes; 0 for a folder, and if the store does not state the size.

    Raises:
        OSError: the file is missing or empty, or cannot be read.
    """
    fs, path = storage.resolve(uri)
    if not storage.is_local(uri):
        info = call_with_retries(lambda: fs.info(path), redact(uri))
        if info.get("size") is None or info.get("type") == "directory":
            return 0
        num_bytes = int(info["size"])
    elif not Path(path).exists():
        message = f"{redact(uri)}: no such file"
        raise FileNotFoundError(message)
    elif not os.access(path, os.R_OK):
        message = f"{redact(uri)}: user {os.getuid()} of {socket.gethostname()} may not read it"
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
    """Return one line per problem, those that stop the run first.

    Of the problems that do not stop the run, NAMED_SLIDES are listed and the rest is counted.
    """
    stopping = [problem.text for problem in problems if problem.stops]
    others = [problem.text for problem in problems if not problem.stops]
    more = len(others) - NAMED_SLIDES
    rest = [f"... and {more:,} more"] if more > 0 else []
    return [*stopping, *others[:NAMED_SLIDES], *rest]


def stop_or_warn(problems: list[Problem], logger: logging.Logger) -> None:
    """Raise one error with all problems if any stops the run, else log them in one warning.

    Raises:
        ValueError: a problem stops the run; the message has a line for each problem.
    """
    lines = "\n".join(f"- {line}" for line in format_problems(problems))
    num = sum(problem.stops for problem in problems)
    if num:
        message = f"{num} problem(s) must be solved before this run can start:\n{lines}"
        if num < len(problems):
            message += "\n(problems of single slides would not stop the run)"
        raise ValueError(message)
    if problems:
        text = "%d slide(s) or node(s) have problems; the run goes on without them:\n%s"
        logger.warning(text, len(problems), lines)
