"""Fixtures of the tests of cluster/."""

import pytest

from tests.support.pins import pins_for


@pytest.fixture(scope="session")
def pins():
    """Return {canonical name: version} for the Python of the image."""
    return pins_for("3.11")
