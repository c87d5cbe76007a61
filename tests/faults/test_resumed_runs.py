"""A slide is replaced, a file damaged or a driver killed while a run works or between two commands.

`benchmarks/silent_faults.py` does so many times.
"""

import pytest

from tests.faults.altered_runs import ALTERATIONS
from tests.faults.resumed_runs import LOCAL_WAYS, Cohort, half_done, killed, replaced, resumed

pytestmark = [pytest.mark.ray, pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, local_ray):
    del local_ray
    return Cohort(tmp_path_factory.mktemp("cohort"))


@pytest.mark.parametrize("way", LOCAL_WAYS)
def test_a_replaced_slide_is_never_mixed(cohort, way):
    outcomes = [replaced(cohort, way, number) for number in range(2)]
    assert [(outcome.result, outcome.text) for outcome in outcomes] == [("equal", "")] * 2


def test_a_damaged_file_costs_at_most_its_own_work(cohort):
    template = half_done(cohort)
    for kind in ("shard", "receipts log", "record"):
        for alteration in ("one bit flipped", "cut", "another file's content"):
            assert alteration in ALTERATIONS
            outcome = resumed(cohort, template, kind, alteration, 0)
            assert outcome.result == "equal", outcome


@pytest.mark.parametrize("replace", [False, True])
def test_a_killed_driver(cohort, replace):
    outcome = killed(cohort, 0, replace=replace)
    assert (outcome.result, outcome.text) == ("equal", "")
