"""The wheel: what it holds and what it needs. What works without torch and Ray."""

import json
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser

import pytest
from packaging.requirements import Requirement

from scellst_ray.commands.table import COMMANDS
from scellst_ray.core.version import __version__
from tests.support.absent import PACKAGES
from tests.support.paths import ROOT

RUN = ROOT / "tests" / "archives" / "v1" / "run"
# Commands that make runs, train or compute with networks. All others read.
NEED_RUN = {
    *("extract", "predict", "plan", "retry", "pretrain", "train", "crossvalidate", "simulate"),
    *("evaluate encoder", "demo", "doctor"),
}
# Hides packages from the process, as if they were not installed.
HIDE = f"""
import sys
from importlib.machinery import PathFinder

found_by = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: (
    None if name.partition(".")[0] in {PACKAGES!r} else found_by(name, *rest)
)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel without network from a copy of what git would give."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "scellst_ray", source / "scellst_ray", ignore=no_caches)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return HeaderParser().parsestr(wheel.read(name).decode())


def python(code, cwd, *arguments):
    """Run code in a fresh interpreter where torch, Ray and what goes with them are absent."""
    command = [sys.executable, "-c", HIDE + code, *arguments]
    found = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found


def test_the_wheel_holds_every_file_of_the_package(wheel):
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "scellst_ray").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == files
    assert {"scellst_ray/FORMAT.md", "scellst_ray/py.typed"} <= held


def test_metadata(metadata, wheel):
    assert (metadata["Name"], metadata["Version"]) == ("scellst-ray", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Author"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# scellst_ray")
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    assert {f"Programming Language :: Python :: {v}" for v in ("3.11", "3.12", "3.13")} <= set(
        classifiers
    )
    urls = metadata.get_all("Project-URL")
    assert urls
    assert all("https://" in url and "example" not in url for url in urls)
    names = {name.split("/", 1)[1] for name in wheel.namelist() if ".dist-info/" in name}
    assert {"entry_points.txt", "licenses/LICENSE"} <= names


def test_torch_and_ray_come_with_the_extra_run_alone(metadata):
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist")]

    def installed(extra):
        at = {"extra": extra, "python_version": "3.13"}
        return {r.name for r in needed if r.marker is None or r.marker.evaluate(at)}

    assert set(metadata.get_all("Provides-Extra")) >= {"run", "read", "dev", "s3", "timm"}
    assert installed("read") == installed("")
    assert installed("") & set(PACKAGES) == set()
    assert installed("run") - installed("") == {"ray", "tensorboardX", "torch", "torchvision"}
    # The development tools bring neither, so that tests run without them.
    assert installed("dev") & set(PACKAGES) == set()


def test_a_run_is_read_and_exported_without_torch_and_ray(tmp_path):
    code = """
import json
import scellst_ray
from scellst_ray.commands.cli import main
run = scellst_ray.open_run(sys.argv[1])
values = run.expression_numpy(None, 'unseen')
print(json.dumps([run.cells('unseen').num_rows, values[:3].tolist()]))
assert main(['export', '--run', sys.argv[1], '--out', 'a.h5ad']) == 0
assert main(['status', sys.argv[1]]) == 0
"""
    found = python(code, tmp_path, str(RUN))
    num_cells, values = json.loads(found.stdout.splitlines()[0])
    expected = json.loads((RUN.parent / "expected.json").read_text())
    assert num_cells == expected["num_cells"]
    assert values == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in expected["expression"]]
    assert (tmp_path / "a.h5ad").is_file()


def test_every_command_works_or_names_the_extra(tmp_path):
    """In an empty folder, a command that reads ends in a line about a file that is missing."""
    code = """
import contextlib, io, json, shlex
from scellst_ray.commands.cli import main
from scellst_ray.commands.table import COMMANDS
lines = {}
for name, command in COMMANDS.items():
    words = shlex.split(command.example)[1:]
    err, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        status = main(words)
    lines[name] = [status, [x for x in err.getvalue().splitlines() if x.startswith('error: ')]]
print(json.dumps(lines))
"""
    (tmp_path / "predict.yaml").write_text("manifest: cohort.csv\nhead: runs/head\n")
    found = json.loads(python(code, tmp_path).stdout)
    assert set(found) == set(COMMANDS)
    hint = "not installed: pip install 'scellst-ray[run]'"
    assert {name for name, (_, lines) in found.items() if hint in " ".join(lines)} == NEED_RUN
    for name in NEED_RUN:
        status, (line,) = found[name]
        assert status == 1
        assert line.startswith(f"error: {name}: ")
    for name in set(COMMANDS) - NEED_RUN:
        assert "installed" not in " ".join(found[name][1]), found[name]
