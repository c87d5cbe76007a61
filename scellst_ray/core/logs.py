"""Log lines that say which slide and tile they are about, as text or as JSON.

`log_context` says so for every line logged inside it, by whatever code; a call that knows better
names them itself, with `extra=log_fields(...)`. Text lines end with them. With $SCELLST_RAY_LOG set
to json a
line is a JSON object, for collectors of logs.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextvars import ContextVar, Token
from datetime import UTC, datetime
from typing import Any

VARIABLE = "SCELLST_RAY_LOG"
TEXT = "%(asctime)s %(levelname)s %(message)s"
NAMES = ("slide_id", "tile_id", "stage")
Told = tuple[str | None, int | None, str | None]
_context: ContextVar[Told] = ContextVar("log_context", default=(None, None, None))


class log_context:  # noqa: N801 - used like a function; a generator takes four times as long
    """Name slide, tile (-1: none in particular) and stage in every line logged inside a `with`.

    What is None stays as it is outside.
    """

    __slots__ = ("token", "told")

    def __init__(
        self, slide_id: str | None, tile_id: int | None = None, stage: str | None = None
    ) -> None:
        """Prepare to name these."""
        self.told: Told = (slide_id, tile_id, stage)

    def __enter__(self) -> None:
        """Begin to name them."""
        old = _context.get()
        slide_id, tile_id, stage = self.told
        told = (slide_id or old[0], old[1] if tile_id is None else tile_id, stage or old[2])
        self.token: Token[Told] = _context.set(told)

    def __exit__(self, *_: object) -> None:
        """Name again what is named outside."""
        _context.reset(self.token)


def log_fields(
    slide_id: str | None, tile_id: int | None = None, stage: str | None = None
) -> dict[str, Any]:
    """Return the `extra` of a log call about a slide, a tile, a stage."""
    told = (slide_id, None if tile_id == -1 else tile_id, stage)
    return {name: value for name, value in zip(NAMES, told, strict=True) if value is not None}


def named_tiles(keys: Sequence[tuple[str, int]], stage: str | None = None) -> dict[str, Any]:
    """Return the `extra` of a log call about one or several tiles, by slide_id and tile_id."""
    if len(keys) == 1:
        return log_fields(*keys[0], stage)
    return log_fields(None, None, stage) | {"tiles": [list(key) for key in keys]}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a line is about."""
    own = {name: vars(record)[name] for name in (*NAMES, "tiles") if name in vars(record)}
    return log_fields(*_context.get()) | own


class TextLines(logging.Formatter):
    """Lines for people; those about a slide end with its name, unless they have it already."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line, message = super().format(record), record.getMessage()
        told = fields_of(record)
        names = [n for n in ("slide_id", "tile_id") if n in told and str(told[n]) not in message]
        if not names:
            return line
        words = [f"{name.removesuffix('_id')} {told[name]}" for name in NAMES if name in told]
        head, end, traceback = line.partition("\n")
        return f"{head} [{', '.join(words)}]{end}{traceback}"


class JsonLines(logging.Formatter):
    """One JSON object a line."""

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


def formatter() -> logging.Formatter:
    """Return the formatter that the environment asks for.

    Raises:
        ValueError: it asks for another format than text and json.
    """
    wanted = os.environ.get(VARIABLE, "text")
    if wanted not in ("text", "json"):
        message = f"{VARIABLE} is {wanted!r}; set it to text or json"
        raise ValueError(message)
    return JsonLines() if wanted == "json" else TextLines(TEXT)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Have lines written to stderr, unless whoever started this process has set up logging.

    Args:
        level: From which level on.
    """
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(formatter())
        root.addHandler(handler)
        root.setLevel(level)
    logging.getLogger("scellst_ray").setLevel(level)
