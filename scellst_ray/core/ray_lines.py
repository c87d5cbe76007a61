"""Filter of standard error: hold back the lines that Ray's own code writes.

Ray writes some of them in every healthy run, and its log files keep them. They are shown if the
process ends with a traceback or dies. To show what a dying process wrote last, the filter is a
process of its own; it is run as a script and imports only the standard library.
"""

import re
import sys
from collections import deque
from collections.abc import Iterable
from typing import BinaryIO

# A line of Ray's C++ code below "fatal" ([time, level, process, thread]), as text or JSON, perhaps
# after the name of its process; and one that Ray Train writes for every checkpoint.
_RAY = re.compile(
    r"(\(.*\bpid=[^)]*\) )?"
    r"(\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [TDIWE] \d+ \d+\] "
    r'|\{"asctime":"[^"]*","levelname":"[TDIWE]",'
    r"|Reporting training result \d+: TrainingReport\()"
)
# Number of lines that are kept for a process that dies.
NUM_HELD = 20
# Written last by a process that has no need of the lines that were held back.
END = b"\0end\n"


def is_of_ray(line: str) -> bool:
    """Return whether Ray's own code wrote a line, and it tells of no crash."""
    return _RAY.match(line) is not None


def pass_on(source: Iterable[bytes], sink: BinaryIO) -> None:
    """Write all lines of `source` to `sink` but those of Ray; these at the end, unless END came.

    Args:
        source: Lines with their ends.
        sink: Unbuffered, such as a terminal.
    """
    held: deque[bytes] = deque(maxlen=NUM_HELD)
    has_ended = False
    for line in source:
        if line == END:
            has_ended = True
        elif is_of_ray(line.decode(errors="replace")):
            held.append(line)
        else:
            sink.write(line)
    if not has_ended:
        for line in held:
            sink.write(line)


if __name__ == "__main__":
    with (
        open(0, "rb", closefd=False) as lines,
        open(1, "wb", buffering=0, closefd=False) as terminal,
    ):
        pass_on(lines, terminal)
    sys.exit(0)
