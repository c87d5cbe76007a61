"""Of two drivers that start on one new folder at the same moment, one works."""

import pytest

from tests.faults.double_starts import start_pairs


@pytest.mark.timeout(120)
def test_one_of_two_drivers_works_and_the_folder_is_its_run(tmp_path):
    starts = start_pairs(tmp_path, 12)
    assert [start.faults for start in starts] == [[]] * 12
    assert [start.differ for start in starts] == [True, False] * 6
