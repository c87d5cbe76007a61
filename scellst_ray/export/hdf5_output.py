"""HDF5 files to write, on disks that may be full.

HDF5 cannot close a file once a write has failed, and the process dies when it ends. So HDF5 writes
through a file that loses all writes after the first failure. The failure is raised when HDF5 has
closed.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py


class LenientFile(io.FileIO):
    """A file to write whose first failure is kept, not raised; later writes are lost.

    Attributes:
        failure: The first failure; None without one.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:  # noqa: ANN401 - any buffer
        """Write all of `data`, or keep the failure; return the length of `data`, bytes."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view) and self.failure is None:
                done += super().write(view[done:]) or 0
        except OSError as error:
            self.failure = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the length of the file, or keep the failure; return the new length, bytes."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return size or 0

    def check(self) -> None:
        """Raise the first failure, if there is one: long work need not go on.

        Raises:
            OSError: a write failed, such as on a full disk. It names the file.
        """
        if self.failure is not None:
            raise OSError(self.failure.errno, self.failure.strerror, self.name)


@contextmanager
def new_hdf5(path: Path) -> Iterator[tuple[h5py.File, LenientFile]]:
    """Open a new HDF5 file to write; yield it and the file below it, whose failures count.

    An existing file is replaced.

    Raises:
        OSError: a write failed. It names the file.
    """
    with LenientFile(str(path), "w+") as target:
        try:
            with h5py.File(target, "w") as file:
                yield file, target
        finally:
            # HDF5's own errors after lost writes do not say what is wrong.
            target.check()
