"""Fixtures of the tests of cluster/."""

import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="session")
def pins():
    """Return {canonical name: version} of constraints.txt."""
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)
