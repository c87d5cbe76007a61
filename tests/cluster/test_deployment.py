"""Check that jobs/, cluster/, Makefile, constraints.txt and .ci/run agree."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scellst_ray.commands import cli
from scellst_ray.commands.table import COMMANDS
from scellst_ray.core.version import __version__
from tests.support.commands import capture_settings
from tests.support.paths import ROOT
from tests.support.pins import LINES, PYTHONS, pins_for

JOBS = (
    *("extract", "pretrain", "train", "crossvalidate", "predict", "export", "demo", "doctor"),
    *("plan", "retry", "genes", "pseudobulk", "annotate"),
)
EXAMPLES = ("extract", "pretrain", "train", "crossvalidate", "predict")


def read_dockerfile():
    """Return [(instruction, arguments)] with continued lines joined."""
    text = (ROOT / "cluster" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


@pytest.fixture
def parse(monkeypatch):
    """Return a function that turns the command line of a job into its configuration."""

    def run(words):
        seen = capture_settings(monkeypatch)
        assert cli.main(words) == 0
        return seen[0]

    return run


def test_image_names_are_one():
    tag = f"{__version__}-ray{pins_for('3.11')['ray']}"
    for path in (ROOT / "cluster").iterdir():
        named = re.findall(r"scellst-ray:(\d\S+)", path.read_text())
        assert set(named) <= {tag}, path.name


def test_dockerfile_runs_as_a_numbered_user_from_a_pinned_base():
    lines = read_dockerfile()
    bases = [rest for name, rest in lines if name == "FROM"]
    assert bases
    assert all(re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base) for base in bases)
    users = [rest for name, rest in lines if name == "USER"]
    # Kubernetes can check runAsNonRoot only for a numeric user.
    assert users
    assert int(users[-1]) > 0
    assert not {name for name, _ in lines} & {"ENTRYPOINT", "CMD", "ADD"}


def test_dockerfile_copies_what_exists_and_is_sent():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    for name, rest in read_dockerfile():
        for source in rest.split()[:-1] if name == "COPY" else ():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignore, source


def test_dockerfile_lists_the_dependencies():
    run = next(rest for name, rest in read_dockerfile() if name == "RUN" and "tomllib" in rest)
    listing = run.split(" > ")[0].replace("python -c", f"{shlex.quote(sys.executable)} -c", 1)
    out = subprocess.run(
        ["sh", "-c", listing],
        cwd=ROOT,
        env={"EXTRAS": "s3 gcs"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [project["dependencies"], extras["run"], extras["s3"], extras["gcs"]]
    assert out.splitlines() == [line for lines in wanted for line in lines]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_range(python):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    pins = pins_for(python)
    for requirement in (Requirement(text) for texts in lists for text in texts):
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} has no pin in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement}: pinned to {pin}"


def test_constraints_hold_versions_only():
    marker = r"( ; python_version (<|>=) \"3\.\d+\")?"
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*" + marker, line) for line in LINES)


def test_the_constraints_are_those_of_the_pythons_that_the_metadata_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert tuple(named) == PYTHONS
    assert project["requires-python"] == f">={PYTHONS[0]}"
    assert pins_for("3.11")["anndata"].startswith("0.12.")
    assert pins_for("3.12") == pins_for("3.13")
    newer = {name: pins_for("3.13")[name] for name in ("anndata", "pandas", "spatialdata")}
    assert {name: version.rpartition(".")[0] for name, version in newer.items()} == {
        "anndata": "0.13",
        "pandas": "3.1",
        "spatialdata": "0.8",
    }


def test_there_is_a_script_for_every_command():
    # A person's, not the cluster's.
    here = {"evaluate segmentation", "evaluate encoder", "evaluate expression", "simulate"}
    here |= {"manifest hest", "models", "models fetch", "status", "gc", "verify"}
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(COMMANDS) - here
    assert set(JOBS) <= set(COMMANDS)


@pytest.mark.parametrize("job", JOBS)
def test_job_script_runs_its_command(job, monkeypatch):
    script = ROOT / "jobs" / f"{job}.py"
    code = compile(script.read_text(), str(script), "exec")
    seen = []
    names = {"__name__": "__main__", "__file__": str(script)}
    monkeypatch.setattr("scellst_ray.commands.cli.main", lambda argv: seen.append(argv) or 3)
    monkeypatch.setattr(sys, "argv", [str(script), "--config", "x.yaml"])
    with pytest.raises(SystemExit) as stopped:
        exec(code, names)
    assert seen == [[job, "--config", "x.yaml"]]
    assert stopped.value.code == 3
    assert f"ray job submit --working-dir . -- python jobs/{job}.py" in names["__doc__"]


# Settings of training are checked by the parts that need torch.
OF_TRAINING = ("pretrain", "train", "crossvalidate")


@pytest.mark.parametrize(
    "job",
    [pytest.param(j, marks=pytest.mark.whole) if j in OF_TRAINING else j for j in EXAMPLES],
)
def test_example_configuration_is_accepted_and_complete(job, parse, tmp_path):
    example = ROOT / "jobs" / f"{job}.example.yaml"
    config = parse([job, "--config", str(example)])
    # A commented line is a key with its default, so uncommenting all of them changes nothing.
    text = re.sub(r"^# (?=[a-z_]+: )", "", example.read_text(), flags=re.MULTILINE)
    assert set(yaml.safe_load(text)) == {field.name for field in dataclasses.fields(config)}
    full = tmp_path / "full.yaml"
    full.write_text(text)
    assert parse([job, "--config", str(full)]) == config


def test_makefile_has_the_targets():
    for target in ("venv", "demo", "test", "lint", "bench", "clean"):
        done = subprocess.run(
            ["make", "--dry-run", "--always-make", target],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        sets_up = "pip install" in done.stdout and "-c constraints.txt" in done.stdout
        assert sets_up or target == "clean"


def test_ci_calls_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert lines[-1] == "exec make test"


def test_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
