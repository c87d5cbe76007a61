"""What the tests of cluster/ share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pins():
    """Return {canonical name: version} of constraints.txt."""
    text = (Path(__file__).resolve().parents[2] / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)
