"""An absent package is told in one line, with the extra that brings it."""

import re
import sys
import tomllib

import pytest
from fsspec.registry import _registry, get_filesystem_class

from scellst_ray.core.extras import EXTRAS, explain_absent, install_line
from tests.support.paths import ROOT


def error_of(package, monkeypatch):
    """Return the error of importing a package that is absent."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as raised:
        __import__(package)
    return raised.value


@pytest.mark.parametrize("package", EXTRAS)
def test_an_absent_package_is_told_with_its_extra(package, monkeypatch):
    line = explain_absent(error_of(package, monkeypatch))
    assert line == f"{package} is needed and not installed: {install_line(package)}"
    assert f"'scellst-ray[{EXTRAS[package]}]'" in line
    assert "\n" not in line


def test_a_line_of_our_own_that_names_the_extra_is_kept():
    line = f"x.gpkg: GeoPackage needs pyogrio: {install_line('pyogrio')}"
    error = ImportError(line)
    error.__cause__ = ModuleNotFoundError("No module named 'pyogrio'", name="pyogrio")
    assert explain_absent(error) == line
    # Of a package that only an extra of the future brings.
    assert explain_absent(ImportError("pip install 'scellst-ray[new]'")).endswith("[new]'")


def test_a_part_of_a_package_stands_for_it():
    error = ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")
    assert explain_absent(error).startswith("torch is needed")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs")])
def test_what_fsspec_makes_of_it_is_told_alike(scheme, package, monkeypatch):
    error_of(package, monkeypatch)
    monkeypatch.delitem(_registry, scheme, raising=False)
    with pytest.raises(ImportError) as raised:
        get_filesystem_class(scheme)
    assert explain_absent(raised.value).startswith(f"{package} is needed")


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'numpy.core.x'", name="numpy.core.x"),
        ImportError("cannot import name 'x' from 'torch'", name="torch"),
        ModuleNotFoundError("without a name"),
        ValueError("torch"),
    ],
)
def test_other_errors_are_not_explained(error):
    assert explain_absent(error) is None


def test_errors_that_go_round_end():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert explain_absent(first) is None


def test_every_extra_brings_its_packages():
    text = (ROOT / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert package in {re.split(r"[\[<>=]", line)[0] for line in extras[extra]}
