"""Log lines that say which slide and tile they are about, as text or as JSON.

`log_context` names slide and tile in every line logged inside it, by any code. A single call names
them with `extra=log_fields(...)`, which has priority. Text lines end with the names. With
$SCELLST_RAY_LOG set to json, each line is a JSON object, for collectors of logs.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextvars import ContextVar, Token
from datetime import UTC, datetime
from typing import Any, TextIO

VARIABLE = "SCELLST_RAY_LOG"
TEXT = "%(asctime)s %(levelname)s %(message)s"
NAMES = ("slide_id", "tile_id", "stage")
# Longest message that people read.
MAX_LETTERS = 1500
# slide_id, tile_id (-1: no tile in particular) and stage; None: not named.
Subject = tuple[str | None, int | None, str | None]
_context: ContextVar[Subject] = ContextVar("log_context", default=(None, None, None))


class log_context:  # noqa: N801 - used like a function; a generator takes four times as long
    """Name slide, tile and stage in every line logged inside a `with`.

    A tile of -1 means no tile in particular. An argument that is None keeps the outer name.
    """

    __slots__ = ("subject", "token")

    def __init__(
        self, slide_id: str | None, tile_id: int | None = None, stage: str | None = None
    ) -> None:
        """Store the names."""
        self.subject: Subject = (slide_id, tile_id, stage)

    def __enter__(self) -> None:
        """Name slide, tile and stage from here on."""
        old = _context.get()
        slide_id, tile_id, stage = self.subject
        subject = (slide_id or old[0], old[1] if tile_id is None else tile_id, stage or old[2])
        self.token: Token[Subject] = _context.set(subject)

    def __exit__(self, *_: object) -> None:
        """Name the outer slide, tile and stage again."""
        _context.reset(self.token)


def log_fields(
    slide_id: str | None, tile_id: int | None = None, stage: str | None = None
) -> dict[str, Any]:
    """Return the `extra` of a log call about a slide, a tile or a stage."""
    values = (slide_id, None if tile_id == -1 else tile_id, stage)
    return {name: value for name, value in zip(NAMES, values, strict=True) if value is not None}


def tile_fields(keys: Sequence[tuple[str, int]], stage: str | None = None) -> dict[str, Any]:
    """Return the `extra` of a log call about one or several tiles, by slide_id and tile_id."""
    if len(keys) == 1:
        return log_fields(*keys[0], stage)
    return log_fields(None, None, stage) | {"tiles": [list(key) for key in keys]}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return slide, tile and stage of a log record, by name."""
    own = {name: vars(record)[name] for name in (*NAMES, "tiles") if name in vars(record)}
    return log_fields(*_context.get()) | own


def one_line(text: str) -> str:
    """Return a message as one line that every terminal shows.

    Messages of other libraries span lines, and repeat what a damaged file holds: control characters
    and halves of surrogate pairs become escapes, and what follows MAX_LETTERS is left out.
    """
    joined = " ".join(text.split())
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)
    return shown if len(shown) <= MAX_LETTERS else f"{shown[:MAX_LETTERS]} ..."


class TextLines(logging.Formatter):
    """Formatter of lines for people. It adds the slide's name unless the message has it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line, message = super().format(record), record.getMessage()
        about = fields_of(record)
        missing = [
            n for n in ("slide_id", "tile_id") if n in about and str(about[n]) not in message
        ]
        if not missing:
            return line
        words = [f"{name.removesuffix('_id')} {about[name]}" for name in NAMES if name in about]
        head, end, traceback = line.partition("\n")
        return f"{head} [{', '.join(words)}]{end}{traceback}"


class JsonLines(logging.Formatter):
    """Formatter of lines for machines: one JSON object each."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        when = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
            **fields_of(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def make_formatter() -> logging.Formatter:
    """Return the formatter that $SCELLST_RAY_LOG names.

    Raises:
        ValueError: the variable is neither text nor json.
    """
    wanted = os.environ.get(VARIABLE, "text")
    if wanted not in ("text", "json"):
        message = f"{VARIABLE} is {wanted!r}; set it to text or json"
        raise ValueError(message)
    return JsonLines() if wanted == "json" else TextLines(TEXT)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Handler that writes to what `sys.stderr` is at the time, so that bars stay below the lines.

    Rich puts a file of its own there while it shows bars; a StreamHandler would write past it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line."""
        self.stream = sys.stderr
        super().emit(record)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Write log lines to stderr, unless the program has already set up logging.

    Args:
        level: Lowest level of the lines that are written.
    """
    root = logging.getLogger()
    if not root.handlers:
        handler = StderrHandler()
        handler.setFormatter(make_formatter())
        root.addHandler(handler)
        root.setLevel(level)
    logging.getLogger("scellst_ray").setLevel(level)


def log_own_lines(level: int = logging.INFO) -> None:
    """Write the lines of this package to stderr in its own format, though others set up logging.

    Args:
        level: Lowest level of the lines that are written.
    """
    logger = logging.getLogger("scellst_ray")
    if not logger.handlers:
        handler = StderrHandler()
        handler.setFormatter(make_formatter())
        logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(level)
