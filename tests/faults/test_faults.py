"""Whatever is killed, cut off, filled up or failing: the tables are those of an undisturbed run."""

import pytest

from tests.faults import hosts
from tests.faults.scenarios import SCENARIOS, outcomes, undisturbed_run

pytestmark = [pytest.mark.ray, pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    reason = hosts.why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cohort")
    undisturbed_run(folder)
    return folder


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_fault_changes_a_table(cohort, scenario):
    for outcome in outcomes(scenario, cohort, times=1):
        assert outcome.differences == [], outcome.fault
        assert outcome.num_faults > 0, outcome.fault
