"""Check the shell scripts and the Dockerfile with their linters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

BIN = Path(sys.executable).parent
SHELLCHECK = (BIN / "shellcheck", "--severity=style", "--shell=bash")
HADOLINT = (BIN / "hadolint", "--failure-threshold=info", "--no-color")
SCRIPTS = (*sorted((ROOT / "cluster").glob("*.sh")), ROOT / ".ci" / "run")


def lint(command, path):
    return subprocess.run([*command, path], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts(script):
    done = lint(SHELLCHECK, script)
    assert (done.returncode, done.stdout) == (0, "")
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text().splitlines()


def test_dockerfile():
    done = lint(HADOLINT, ROOT / "cluster" / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_linters_see_a_fault(tmp_path):
    script = tmp_path / "bad.sh"
    script.write_text('#!/bin/bash\nrm -rf $1/"$2"\n')
    assert "SC2086" in lint(SHELLCHECK, script).stdout
    image = tmp_path / "Dockerfile"
    image.write_text("FROM python\nRUN cd /app && pip install ray\n")
    found = lint(HADOLINT, image)
    assert found.returncode != 0
    assert {"DL3006", "DL3013"} <= set(found.stdout.split())


def test_dockerfile_without_its_reasons_is_found_at_fault(tmp_path):
    """The one ignored rule is ignored on its line only."""
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    image = tmp_path / "Dockerfile"
    image.write_text(text.replace("# hadolint ignore=DL3008\n", ""))
    found = lint(HADOLINT, image).stdout.splitlines()
    assert [line.split()[1] for line in found] == ["DL3008"]
