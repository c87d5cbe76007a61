"""What deploys the package: jobs/, cluster/, Makefile, constraints.txt and .ci/run agree."""

import dataclasses
import gzip
import os
import re
import shlex
import subprocess
import sys
import tomllib
from copy import deepcopy
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scellst_ray import __version__, cli, commands

ROOT = Path(__file__).resolve().parents[1]
JOBS = ("extract", "pretrain", "train", "crossvalidate", "predict", "export", "demo", "doctor")
EXAMPLES = ("extract", "pretrain", "train", "crossvalidate", "predict")


def read_pins():
    """Return {canonical name: version} of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def read_dockerfile():
    """Return [(instruction, arguments)] with continued lines joined."""
    text = (ROOT / "cluster" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def allows_only_known(schema):
    """Make a CRD schema refuse what Kubernetes would prune: names it does not have."""
    if isinstance(schema, list):
        return [allows_only_known(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: allows_only_known(value) for key, value in schema.items()}
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


@pytest.fixture(scope="module")
def validator(data_dir):
    """Return a validator of ray.io/v1 RayJob that refuses unknown fields."""
    with gzip.open(data_dir / "kuberay_crds" / "ray.io_rayjobs.yaml.gz") as handle:
        crd = yaml.load(handle, yaml.CSafeLoader)
    schema = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")["schema"]
    strict = allows_only_known(schema["openAPIV3Schema"])
    strict["properties"]["metadata"] = {"type": "object"}  # the API server's own, not the CRD's
    return jsonschema.Draft202012Validator(strict)


@pytest.fixture(scope="module")
def rayjob():
    return yaml.safe_load((ROOT / "cluster" / "rayjob-predict.yaml").read_text())


def pod_templates(rayjob):
    """Return the pod templates of a RayJob: submitter, head, workers."""
    cluster = rayjob["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [rayjob["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]


def test_rayjob_is_valid(validator, rayjob):
    problems = [f"{e.json_path}: {e.message}" for e in validator.iter_errors(rayjob)]
    assert problems == []


def misspell_top(job):
    job["spec"]["shutdownAfterJobFinish"] = True


def misspell_in_pod(job):
    pod = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    pod["containers"][0]["resource"] = pod["containers"][0].pop("resources")


def misspell_security(job):
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    pod["securityContext"]["runAsNonroot"] = True


def wrong_type(job):
    job["spec"]["backoffLimit"] = "2"


def number_as_start_param(job):
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


@pytest.mark.parametrize(
    "spoil",
    [misspell_top, misspell_in_pod, misspell_security, wrong_type, number_as_start_param],
)
def test_validator_sees_what_kubernetes_would_drop_or_refuse(validator, rayjob, spoil):
    spoiled = deepcopy(rayjob)
    spoil(spoiled)
    # One mistake, seen once or, below a YAML alias, wherever it is used.
    assert len({error.message for error in validator.iter_errors(spoiled)}) == 1


def test_ray_version_is_one(rayjob):
    ray_version = read_pins()["ray"]
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == ray_version
    tag = f"{__version__}-ray{ray_version}"
    containers = [c for t in pod_templates(rayjob) for c in t["spec"]["containers"]]
    assert {c["image"].rsplit(":", 1)[1] for c in containers} == {tag}
    for name in ("Dockerfile", "README.md"):
        named = re.findall(r"scellst-ray:(\S+)", (ROOT / "cluster" / name).read_text())
        assert set(named) == {tag}


def test_pods_are_bounded_and_not_root(rayjob):
    for template in pod_templates(rayjob):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            limits = container["resources"]["limits"]
            assert container["resources"]["requests"]["memory"] == limits["memory"]
            assert "cpu" in limits


def test_rayjob_cleans_up_and_retries(rayjob):
    spec = rayjob["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] > 0
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.fixture
def parse(monkeypatch):
    """Return a function: command line of a job in, the configuration it would run with out."""

    def run(words):
        seen = []
        jobs = {name: (kind, lambda c: seen.append(c) or 0) for name, (kind, _) in known.items()}
        monkeypatch.setattr(commands, "jobs", lambda: jobs)
        assert cli.main(words) == 0
        return seen[0]

    known = commands.jobs()
    return run


def test_entrypoint_is_a_job_with_its_flags(rayjob, parse):
    python, script, *words = shlex.split(rayjob["spec"]["entrypoint"])
    assert python == "python"
    workdir = next(path for name, path in read_dockerfile() if name == "WORKDIR")
    assert (ROOT / Path(script).relative_to(workdir)).is_file()
    config = parse([Path(script).stem, *words])
    uris = (config.manifest, config.head, config.encoder, config.out)
    assert all(uri.startswith("s3://BUCKET/") for uri in uris)
    # With 'auto' the hardware of a retry's head would decide whether it may go on with the run.
    assert config.precision != "auto"


def test_dockerfile_runs_as_a_numbered_user_from_a_pinned_base():
    lines = read_dockerfile()
    bases = [rest for name, rest in lines if name == "FROM"]
    assert bases
    assert all(re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base) for base in bases)
    users = [rest for name, rest in lines if name == "USER"]
    # Kubernetes can only check runAsNonRoot of a number.
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
    assert out.splitlines() == project["dependencies"] + extras["s3"] + extras["gcs"]


def test_every_requirement_is_pinned_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    pins = read_pins()
    for requirement in (Requirement(text) for texts in lists for text in texts):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} has no pin in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement}: pinned to {pin}"


def test_constraints_hold_versions_only():
    names = list(read_pins())
    assert len(set(names)) == len(names)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", pin) for pin in pins)


def test_there_is_a_script_for_every_command():
    # A person's, not the cluster's.
    here = {"evaluate segmentation", "evaluate encoder", "evaluate expression", "simulate"}
    here |= {"manifest hest", "models", "models fetch"}
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(commands.jobs()) - here
    assert set(JOBS) <= set(commands.jobs())


@pytest.mark.parametrize("job", JOBS)
def test_job_script_runs_its_command(job, monkeypatch):
    script = ROOT / "jobs" / f"{job}.py"
    code = compile(script.read_text(), str(script), "exec")
    seen = []
    names = {"__name__": "__main__", "__file__": str(script)}
    monkeypatch.setattr("scellst_ray.cli.main", lambda argv: seen.append(argv) or 3)
    monkeypatch.setattr(sys, "argv", [str(script), "--config", "x.yaml"])
    with pytest.raises(SystemExit) as stopped:
        exec(code, names)
    assert seen == [[job, "--config", "x.yaml"]]
    assert stopped.value.code == 3
    assert f"ray job submit --working-dir . -- python jobs/{job}.py" in names["__doc__"]


@pytest.mark.parametrize("job", EXAMPLES)
def test_example_configuration_is_accepted_and_complete(job, parse, tmp_path):
    example = ROOT / "jobs" / f"{job}.example.yaml"
    config = parse([job, "--config", str(example)])
    # A commented line is a key with its default: with all of them switched on nothing changes.
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
