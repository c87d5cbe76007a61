"""Damaged files: the error that names them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa


class DamagedFileError(ValueError):
    """A file is not what was written: cut, changed, or another file.

    Attributes:
        uri: The file.
        problem: What is wrong with it.
        remedy: What to do; empty: not known here.
    """

    def __init__(self, uri: str, problem: str, remedy: str = "") -> None:
        """Say what is wrong with a file, and what to do."""
        super().__init__(f"{uri}: {problem}{f'; {remedy}' if remedy else ''}")
        self.uri, self.problem, self.remedy = uri, problem, remedy

    def __reduce__(self) -> tuple[type["DamagedFileError"], tuple[str, str, str]]:
        """Travel between processes."""
        return DamagedFileError, (self.uri, self.problem, self.remedy)


@contextmanager
def naming_damage(uri: str) -> Iterator[None]:
    """Raise what pyarrow says of an unreadable file as DamagedFileError, which names the file.

    Errors of disks and stores, which have a number or a class of their own, stay what they are.
    """
    try:
        yield
    except MemoryError as error:
        error.add_note(f"(while reading {uri})")
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        text = " ".join(str(error).split())
        raise DamagedFileError(uri, f"is damaged: {text}") from error
