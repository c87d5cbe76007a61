"""Real spots that several tests read."""

import functools

import pytest

from scellst_ray.spots.st_array import read_st_array
from tests.support.paths import SHARED

HER2ST = SHARED / "data" / "st_her2st"


@pytest.fixture(scope="session")
def her2st():
    """Return a function from a section of her2st to its spots, each read once."""
    if not HER2ST.exists():
        pytest.skip("real ST arrays ../shared/data/st_her2st are absent")

    @functools.cache
    def read(section):
        paths = [str(HER2ST / f"{section}{end}") for end in (".tsv.gz", "_selection.tsv")]
        return read_st_array(*paths, mpp=0.687)

    return read
