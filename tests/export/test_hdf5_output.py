"""A full disk gives one error that names the file, and the process lives on."""

import errno
import subprocess
import sys

import h5py
import numpy as np
import pytest

from scellst_ray.export.hdf5_output import LenientFile, new_hdf5

# Writing beyond the limit fails as on a full disk. The process ends, which is where HDF5 would die.
PROGRAM = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from scellst_ray.export.hdf5_output import new_hdf5
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    with new_hdf5(Path(sys.argv[1])) as (file, _):
        for i in range(20):
            values = np.random.default_rng(i).random((3000, 10))
            file.create_dataset(f"a{i}", data=values, chunks=(500, 10), compression="gzip")
except OSError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("limit", [0, 900, 8192, 300_000])
def test_a_full_disk_is_one_error(tmp_path, limit):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "x.h5"), str(limit)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"refused: [Errno 27] File too large: '{tmp_path}/x.h5'\n"
    assert not result.stderr


def test_a_written_file_is_whole(tmp_path):
    (tmp_path / "x.h5").write_bytes(b"an older file" * 10_000)
    values = np.arange(60_000, dtype=np.float32).reshape(-1, 6)
    with new_hdf5(tmp_path / "x.h5") as (file, target):
        file.create_dataset("a", data=values, compression="gzip")
        target.check()
    with h5py.File(tmp_path / "x.h5") as file:
        np.testing.assert_array_equal(file["a"], values)


def test_long_work_can_stop_at_the_first_failure(tmp_path):
    with pytest.raises(OSError, match=r"No space left.*x\.h5"):
        fill_until_full(tmp_path / "x.h5")


def fill_until_full(path):
    with new_hdf5(path) as (file, target):
        target.failure = OSError(errno.ENOSPC, "No space left on device")
        file["a"] = np.zeros(10)
        target.check()
        pytest.fail("the failure was passed over")


def test_an_error_of_the_caller_stays(tmp_path):
    with pytest.raises(KeyError, match="mine"), new_hdf5(tmp_path / "x.h5"):
        raise KeyError("mine")  # noqa: EM101


def test_nothing_is_written_after_a_failure(tmp_path):
    with LenientFile(tmp_path / "x", "w+") as target:
        assert target.write(b"abc") == 3
        target.failure = OSError(errno.ENOSPC, "full")
        assert target.write(b"defg") == 4
    assert (tmp_path / "x").read_bytes() == b"abc"
