"""What a healthy run leaves on a terminal: its bars once, and the closing line."""

import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.e2e]

WIDTH, HEIGHT = 120, 50
CODES = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[\?\d+[hl]|\x1b\[[\d;]+m")


def run_on_terminal(command, folder):
    """Run a command on a terminal of its own; return exit code and the bytes it wrote there."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=environment | {"TERM": "xterm-256color"},
    )
    os.close(theirs)
    written = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        while True:
            try:
                part = terminal.read(65536)
            except OSError:  # Linux: all others have closed it
                break
            if not part:
                break
            written += part
    return process.wait(60), written.decode()


def shown_lines(text):
    """Return the lines that a terminal shows after it has received `text`, without empty ones."""
    lines, row, column = [""], 0, 0
    for part in re.split(f"({CODES.pattern})".replace(r"(\d*)([A-Za-z])", r"\d*[A-Za-z]"), text):
        code = CODES.fullmatch(part)
        if code and code[2] == "A":
            row = max(0, row - int(code[1] or 1))
        elif code and code[2] == "K":
            lines[row] = ""
        elif not code:
            for letter in part:
                if letter == "\n":
                    row += 1
                    lines += [""] * (row + 1 - len(lines))
                elif letter == "\r":
                    column = 0
                else:
                    lines[row] = (
                        lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
                    )
                    column += 1
    return [line.rstrip() for line in lines if line.strip()]


def test_the_terminal_that_tests_use():
    assert shown_lines("a\r\nbc\r\x1b[2Kd\x1b[1m!\x1b[0m\r\n\r\n") == ["a", "d!"]
    assert shown_lines("bar 0\r\nnote\r\x1b[2K\x1b[1A\x1b[2Kbar 1\r\nx\x1b[?25h") == ["bar 1", "x"]


def test_a_healthy_run_shows_its_bars_once(synthetic_slide, tmp_path):
    (tmp_path / "manifest.csv").write_text(f"slide_id,uri\na,{synthetic_slide.slide}\n")
    command = [sys.executable, "-m", "scellst_ray.commands.cli", "extract"]
    flags = ["--manifest=manifest.csv", "--out=run", "--encoder=none"]
    code, text = run_on_terminal(command + flags, tmp_path)
    assert code == 0, text
    slides, tiles, closing = shown_lines(text)
    assert re.fullmatch(r" *slides ━+ 1/1 [\d:]+ [\d:]+", slides)
    assert re.fullmatch(r" *tiles ━+ (\d+)/\1 [\d:]+ [\d:]+ \d+ cells, \d+ cells/s", tiles)
    assert re.fullmatch(
        r"1 slides: 1 done, 0 empty, 0 partial, 0 failed; \d+ cells in run", closing
    )
    assert "Token" not in text
    assert "core_worker" not in text


def test_warnings_stand_above_the_bars(tmp_path):
    code = """
import logging, time
from scellst_ray.commands.progress import shown_progress
from scellst_ray.core.logs import log_to_stderr
from scellst_ray.core.quiet_stderr import QuietStderr
from scellst_ray.pipelines.progress import Progress

log_to_stderr()
with QuietStderr(), shown_progress() as report:
    for number in range(3):
        report(Progress(num_slides=3, records=dict.fromkeys(range(number + 1))))
        time.sleep(0.2)
        logging.getLogger("scellst_ray").warning("warning %d", number)
print("closing")
"""
    status, text = run_on_terminal([sys.executable, "-c", code], tmp_path)
    assert status == 0, text
    *warnings, slides, tiles, closing = shown_lines(text)
    assert [line[-9:] for line in warnings] == ["warning 0", "warning 1", "warning 2"]
    assert "3/3" in slides
    assert tiles.strip().startswith("tiles")
    assert closing == "closing"
