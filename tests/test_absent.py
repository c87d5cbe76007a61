"""Tests that need an absent package are left out, told, and never hide another failure."""

import subprocess
import sys

import pytest

from tests.support import absent
from tests.support.absent import absent_in, leave_out
from tests.support.paths import ROOT

FILES = {
    "test_whole.py": "import not_here.part\ndef test_a(): assert False\n",
    "test_parts.py": """
import pytest
@pytest.fixture
def needs(): import not_here
def test_needs_it(): import not_here
def test_by_a_fixture(needs): pass
def test_by_another_error():
    try: import not_here
    except ImportError as error: raise ValueError('x') from error
@pytest.mark.whole
def test_marked(): assert False
def test_good(): pass
""",
    "test_bad.py": "def test_fails(): assert False\ndef test_other(): import also_not_here\n",
    "test_unknown.py": "import also_not_here\n",
    "conftest.py": """
from tests.support.absent import LeaveOut
def pytest_configure(config):
    for name in ('ray', 'whole'): config.addinivalue_line('markers', name)
    config.pluginmanager.register(LeaveOut(frozenset({'not_here'})))
""",
}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Return what pytest prints of these files where the package not_here is absent."""
    folder = tmp_path_factory.mktemp("absent")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    words = ["-m", "pytest", "-p", "no:cacheprovider", "-ra", "--continue-on-collection-errors"]
    command = [sys.executable, *words, "-c", "/dev/null", "--rootdir", str(folder), str(folder)]
    variables = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, check=False
    ).stdout


def test_what_needs_it_is_left_out_and_told(shown):
    assert "left out: tests that import not_here, which are not installed" in shown
    assert "left out: 1 files whole" in shown
    assert "1 deselected" in shown
    assert shown.count("needs not_here") == 3
    assert "1 passed, 3 skipped" in shown


def test_other_failures_stay(shown):
    assert "FAILED test_bad.py::test_fails" in shown
    assert "FAILED test_bad.py::test_other" in shown
    assert "ERROR test_unknown.py" in shown
    assert "2 failed" in shown


def test_an_error_is_about_a_package_only_if_it_is_absent():
    error = ModuleNotFoundError("no", name="torch.nn")
    assert absent_in(error, {"torch"}) == "torch"
    assert absent_in(error, {"ray"}) is None
    assert absent_in(ImportError("cannot import", name="torch"), {"torch"}) is None


def test_what_is_needed_must_be_there(monkeypatch):
    monkeypatch.setattr(absent, "ABSENT", frozenset({"ray", "timm"}))
    with pytest.raises(pytest.UsageError, match="not installed: ray, which TESTS_NEED names"):
        leave_out(None, ["ray", "torch"])


@pytest.mark.parametrize(
    ("words", "folder", "extras"),
    [
        ([], ".venv", "dev,run,timm"),
        (["PYTHON=python3.11"], ".venv", "dev,run,timm"),
        (["PYTHON=python3.12"], ".venv-3.12", "dev"),
        (["PYTHON=python3.13"], ".venv-3.13", "dev"),
        (["PYTHON=python3.13", "EXTRAS=dev,run"], ".venv-3.13", "dev,run"),
    ],
)
def test_make_gives_each_python_an_environment_of_its_own(words, folder, extras, tmp_path):
    version = words[0].removeprefix("PYTHON=python") if words else "3.11"
    stand_in = tmp_path / f"python{version}"
    stand_in.write_text(f'#!/bin/sh\ntest -z "$2" || echo {version}\n')
    stand_in.chmod(0o755)
    shown = subprocess.run(
        ["make", "--dry-run", "--always-make", "test", *words],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"-m venv {folder}\n" in shown
    assert f"-e '.[{extras}]'\n" in shown
    assert ("bin/mypy" in shown) == ("run" in extras)
