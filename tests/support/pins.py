"""The versions that constraints.txt names for a Python."""

from packaging.requirements import Requirement

from tests.support.paths import ROOT

PYTHONS = ("3.11", "3.12", "3.13")
LINES = [
    line
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def pins_for(python):
    """Return {canonical name: version} for a Python such as '3.12'.

    Raises:
        ValueError: a name has two versions.
    """
    pins = {}
    for pin in map(Requirement, LINES):
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            if pin.name in pins:
                message = f"{pin.name} has two versions on Python {python}"
                raise ValueError(message)
            pins[pin.name] = str(pin.specifier).removeprefix("==")
    return pins
