"""Leave out the tests that need torch or Ray where these are not installed.

Such a test is known by its marker, `ray` or `whole`, or by its imports: those of its file, or those
that it or a fixture makes as it runs. A line at the start says so. With everything installed
nothing here has an effect, and `make test` names in TESTS_NEED what must be installed.
"""

from importlib.util import find_spec
from itertools import compress

import pytest

# What the extras `run` and `timm` install.
PACKAGES = ("ray", "tensorboardX", "timm", "torch", "torchvision")


def is_installed(package):
    """Whether a package can be imported; a folder that happens to have its name is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


ABSENT = frozenset(package for package in PACKAGES if not is_installed(package))


def absent_in(error, absent=ABSENT):
    """Return the absent package that an error, or one that it came from, is about; None if none."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and package in absent:
            return package
        error = error.__cause__ or error.__context__
    return None


class LeaveOut:
    """Plugin of pytest: what fails because a package is absent is left out."""

    def __init__(self, absent=ABSENT):
        self.absent = absent
        self.num_files = 0

    def pytest_report_header(self):
        names = ", ".join(sorted(self.absent))
        return f"left out: tests that import {names}, which are not installed"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        marks = [bool(i.get_closest_marker("ray") or i.get_closest_marker("whole")) for i in items]
        left_out = list(compress(items, marks))
        items[:] = [item for item, marked in zip(items, marks, strict=True) if not marked]
        config.hook.pytest_deselected(items=left_out)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self):
        report = yield
        call = getattr(report, "call", None)
        if report.failed and call and call.excinfo and self.is_absent(call):
            report.outcome, report.longrepr, report.result = "passed", None, []
            self.num_files += 1
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed and self.is_absent(call):
            report.outcome = "skipped"
            reason = f"needs {absent_in(call.excinfo.value, self.absent)}"
            report.longrepr = (str(item.path), item.location[1], reason)
        return report

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.line(f"left out: {self.num_files} files whole; in others see SKIPPED")

    def is_absent(self, call):
        return call.excinfo is not None and absent_in(call.excinfo.value, self.absent) is not None


def leave_out(config, needed):
    """Register the plugin where a package is absent.

    Args:
        config: Of pytest.
        needed: Packages that must be there.

    Raises:
        pytest.UsageError: one of these is absent.
    """
    missing = ABSENT & set(needed)
    if missing:
        message = f"not installed: {', '.join(sorted(missing))}, which TESTS_NEED names"
        raise pytest.UsageError(message)
    if ABSENT:
        config.pluginmanager.register(LeaveOut())
