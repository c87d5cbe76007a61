"""Filter of standard error: hold back the lines that Ray's own code writes.

Ray writes some of them in every healthy run, and its log files keep them. They are shown if the
process ends with a traceback or dies. To show what a dying process wrote last, the filter is a
process of its own; it is run as a script and imports only the standard library.
"""

import os
import re
import select
import sys
from collections import deque
from collections.abc import Callable

# A line of Ray's C++ code below "fatal" ([time, level, process, thread]), as text or JSON, or of
# gRPC and Abseil in it, perhaps after the name of its process; and one that Ray Train writes for
# every checkpoint.
_RAY = re.compile(
    r"(\(.*\bpid=[^)]*\) )?"
    r"(\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [TDIWE] \d+ \d+\] "
    r'|\{"asctime":"[^"]*","levelname":"[TDIWE]",'
    r"|[IWE]\d{4} \d\d:\d\d:[\d.]+ +\d+ \w+\.cc:\d+\] "
    r"|\[\w+\.cc : \d+\] RAW: (?!.*(\bassert|[Cc]heck|abort|fail|deadlock))"
    r"|WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR"
    r"|Reporting training result \d+: TrainingReport\()"
)
# Number of lines that are kept for a process that dies.
NUM_HELD = 20
# Written last by a process that has no need of the lines that were held back, and by one that has.
END = b"\0end\n"
CRASH = b"\0crash\n"
# Seconds of silence after which a line without its end, such as a question, is shown.
PAUSE_S = 0.1
# Bytes of a line that is not held back, whoever writes it.
LONGEST = 1 << 16
# What a line of Ray's, or a mark, may begin with.
_FIRST = b'[({RIWE\0"'


def is_of_ray(line: str) -> bool:
    """Return whether Ray's own code wrote a line, and it tells of no crash."""
    return _RAY.match(line) is not None


class LineFilter:
    """What is shown of bytes that arrive in parts of any size.

    Attributes:
        show: Called with the bytes to show, in the order in which they came.
    """

    def __init__(self, show: Callable[[bytes], object]) -> None:
        """Begin with no line."""
        self.show = show
        self.begun = b""
        self.is_begun_shown = False
        self.held: deque[bytes] = deque(maxlen=NUM_HELD)

    def feed(self, data: bytes) -> None:
        """Take bytes; show each line that they end, unless it is Ray's."""
        *lines, self.begun = (self.begun + data).split(b"\n")
        for line in lines:
            self._take(line + b"\n")
        if len(self.begun) > LONGEST:
            self._show_begun()

    def pause(self) -> None:
        """Show a line without its end, unless it may become one of Ray's."""
        if self.begun and (self.is_begun_shown or self.begun[0] not in _FIRST):
            self._show_begun()

    def close(self) -> None:
        """Show what is left, and what was held back unless END came after it."""
        if self.begun:
            self._take(self.begun)
        self._show_held()

    def _take(self, line: bytes) -> None:
        # Another thread may have begun a line before the mark.
        for mark, act in ((END, self.held.clear), (CRASH, self._show_held)):
            if line.endswith(mark):
                line = line.removesuffix(mark)
                act()
        is_rest, self.is_begun_shown = self.is_begun_shown, False
        if not is_rest and is_of_ray(line.decode(errors="replace")):
            self.held.append(line)
        elif line:
            self.show(line)

    def _show_begun(self) -> None:
        self.show(self.begun)
        self.begun, self.is_begun_shown = b"", True

    def _show_held(self) -> None:
        for line in self.held:
            self.show(line)
        self.held.clear()


def pass_on(source: int, sink: int) -> None:
    """Filter all bytes of a file descriptor into another, until the first one ends."""
    lines = LineFilter(lambda data: write_all(sink, data))
    while True:
        while not select.select([source], [], [], PAUSE_S if lines.begun else None)[0]:
            lines.pause()
        data = os.read(source, LONGEST)
        if not data:
            break
        lines.feed(data)
    lines.close()


def write_all(sink: int, data: bytes) -> None:
    """Write all bytes, however slowly they are taken; none if nobody takes them any more."""
    while data:
        try:
            data = data[os.write(sink, data) :]
        except BlockingIOError:  # another program has set the terminal so
            select.select([], [sink], [])
        except OSError:
            return


if __name__ == "__main__":
    pass_on(0, 1)
    sys.exit(0)
