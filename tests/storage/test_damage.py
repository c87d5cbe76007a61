import errno
import pickle

import pyarrow as pa
import pytest

from scellst_ray.storage import DamagedFileError, naming_damage


def test_it_says_file_problem_and_remedy():
    error = DamagedFileError("run/a", "is cut", "remove it")
    assert str(error) == "run/a: is cut; remove it"
    assert (error.uri, error.problem) == ("run/a", "is cut")


def test_it_travels_between_processes():
    error = pickle.loads(pickle.dumps(DamagedFileError("run/a", "is cut", "remove it")))
    assert (str(error), error.uri) == ("run/a: is cut; remove it", "run/a")


@pytest.mark.parametrize(
    "error", [pa.ArrowInvalid("bad"), pa.ArrowKeyError("no"), OSError("bad\nthrift")]
)
def test_what_pyarrow_says_is_damage(error):
    with pytest.raises(DamagedFileError, match="run/a: is damaged: "), naming_damage("run/a"):
        raise error


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "no"), OSError(errno.EIO, "disk"), TimeoutError("store")],
)
def test_what_a_disk_or_a_store_says_is_not(error):
    with pytest.raises(type(error)) as found, naming_damage("run/a"):
        raise error
    assert found.value is error


def test_a_lack_of_memory_names_the_file():
    with pytest.raises(MemoryError) as found, naming_damage("run/a"):
        raise MemoryError
    assert found.value.__notes__ == ["(while reading run/a)"]
