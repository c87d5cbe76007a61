"""Lines that say which slide and tile they are about."""

import io
import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from scellst_ray.core import logs
from scellst_ray.core.logs import (
    MAX_LETTERS,
    JsonLines,
    StderrHandler,
    TextLines,
    log_context,
    log_fields,
    make_formatter,
    one_line,
    tile_fields,
)


@pytest.fixture
def written():
    """Return a function that logs with a formatter and gives the lines."""

    def write(form, log):
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(form)
        logger = logging.getLogger("scellst_ray.test_logs")
        logger.addHandler(handler)
        logger.propagate = False
        try:
            log(logger)
        finally:
            logger.removeHandler(handler)
            logger.propagate = True
        return stream.getvalue().splitlines()

    return write


def in_a_tile(logger):
    with log_context("P1", 12), log_context(None, None, "read"):
        logger.warning("cut, again in %.1f s", 1.5)
    logger.warning("100 %% of %s", "all")


def test_json_names_slide_and_tile(written):
    inside, outside = map(json.loads, written(JsonLines(), in_a_tile))
    assert {name: inside[name] for name in ("level", "logger", "message")} == {
        "level": "WARNING",
        "logger": "scellst_ray.test_logs",
        "message": "cut, again in 1.5 s",
    }
    assert (inside["slide_id"], inside["tile_id"], inside["stage"]) == ("P1", 12, "read")
    assert datetime.fromisoformat(inside["time"]).utcoffset().total_seconds() == 0
    assert not {"slide_id", "tile_id", "stage"} & set(outside)


def test_text_ends_with_them(written):
    form = TextLines("%(levelname)s %(message)s")
    assert written(form, in_a_tile) == [
        "WARNING cut, again in 1.5 s [slide P1, tile 12, stage read]",
        "WARNING 100 % of all",
    ]


def test_text_does_not_say_it_twice(written):
    def log(logger):
        logger.warning("slide P1, tile 12: lost", extra=log_fields("P1", 12))
        logger.warning("slide P1 is partial", extra=log_fields("P1", -1))
        logger.warning("slide P1: slow", extra=log_fields("P1", 12))

    assert written(TextLines("%(message)s"), log) == [
        "slide P1, tile 12: lost",
        "slide P1 is partial",
        "slide P1: slow [slide P1, tile 12]",
    ]


def test_a_call_may_name_other_tiles_than_those_around_it(written):
    def log(logger):
        with log_context("P1", 3):
            logger.error("one", extra=tile_fields([("P2", 7)], "embed"))
            logger.error("two", extra=tile_fields([("P2", 7), ("P3", 8)]))

    one, two = map(json.loads, written(JsonLines(), log))
    assert (one["slide_id"], one["tile_id"], one["stage"]) == ("P2", 7, "embed")
    assert two["tiles"] == [["P2", 7], ["P3", 8]]


def test_tracebacks_stay_in_the_line(written):
    error = ValueError("first\nsecond")

    def log(logger):
        try:
            raise error
        except ValueError:
            with log_context("P1"):
                logger.exception("failed")

    (line,) = written(JsonLines(), log)
    assert json.loads(line)["traceback"].endswith("ValueError: first\nsecond")
    lines = written(TextLines("%(message)s"), log)
    assert lines[0] == "failed [slide P1]"
    assert lines[1].startswith("Traceback")


def test_threads_have_tiles_of_their_own(written):
    def one(logger, number):
        with log_context("P1", number):
            logger.warning("x")

    def log(logger):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: one(logger, number), range(200)))

    tiles = [json.loads(line)["tile_id"] for line in written(JsonLines(), log)]
    assert sorted(tiles) == list(range(200))


def test_an_error_leaves_nothing_behind(written):
    def log(logger):
        with pytest.raises(KeyError), log_context("P1", 3):
            raise KeyError
        logger.warning("after")

    (line,) = written(JsonLines(), log)
    assert "slide_id" not in json.loads(line)


def test_the_environment_chooses(monkeypatch):
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    assert type(make_formatter()) is TextLines
    monkeypatch.setenv(logs.VARIABLE, "json")
    assert type(make_formatter()) is JsonLines
    monkeypatch.setenv(logs.VARIABLE, "xml")
    with pytest.raises(ValueError, match=r"SCELLST_RAY_LOG is 'xml'; set it to text or json"):
        make_formatter()


def test_a_process_of_its_own_logs_to_stderr(monkeypatch):
    monkeypatch.setenv(logs.VARIABLE, "json")
    code = (
        "import logging; from scellst_ray.core.logs import log_to_stderr; log_to_stderr();"
        "log_to_stderr(); logging.getLogger('scellst_ray.x').info('hello')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr)["message"] == "hello"


def test_lines_go_to_what_stderr_is_at_the_time(monkeypatch):
    handler = StderrHandler()
    for text in ("one", "two"):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        handler.emit(logging.makeLogRecord({"msg": text}))
        assert stream.getvalue() == f"{text}\n"


def test_own_lines_are_written_once_where_others_set_up_logging():
    code = (
        "import logging; logging.basicConfig(format='other %(message)s', level=20);"
        "from scellst_ray.core.logs import log_own_lines; log_own_lines(); log_own_lines();"
        "logging.getLogger('scellst_ray.x').info('ours'); logging.getLogger('y').info('theirs')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, theirs = done.stderr.splitlines()
    assert ours.endswith(" INFO ours")
    assert theirs == "other theirs"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.h5: not a file", "a.h5: not a file"),
        ("first\n  second\r\n\nthird\t!", "first second third !"),
        ("\x1b[31mred\x1b[0m \x00", "\\x1b[31mred\\x1b[0m \\x00"),
        ("half a pair \ud800, a mark \u200b\ufeff", "half a pair \\ud800, a mark \\u200b\\ufeff"),
        ("Größe 0,5 µm 細胞", "Größe 0,5 µm 細胞"),
        ("x" * 5000, "x" * MAX_LETTERS + " ..."),
    ],
)
def test_a_message_becomes_one_line_that_terminals_show(text, expected):
    assert one_line(text) == expected
    assert one_line(text).isprintable()
    one_line(text).encode()
