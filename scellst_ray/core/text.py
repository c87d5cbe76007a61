"""Messages about files of others in one line that a terminal and a log can hold."""

from collections.abc import Iterator
from contextlib import contextmanager

MOST_LETTERS = 1500


def one_line(text: str) -> str:
    """Return text as one printable line of at most MOST_LETTERS.

    Line breaks become spaces, and other characters that cannot be printed `?`.
    """
    spaced = " ".join(text.split())
    line = "".join(c if c.isprintable() else "?" for c in spaced)
    return line if len(line) <= MOST_LETTERS else f"{line[:MOST_LETTERS]} ..."


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Give a ValueError raised inside a message of one line, whatever the file held.

    It serves as a decorator, too.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        if text.isprintable() and len(text) <= MOST_LETTERS:
            raise
        raise ValueError(one_line(text)) from error
