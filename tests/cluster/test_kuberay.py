"""Check KubeRay's manifests against the schemas of its operator and against Ray's autoscaler."""

import gzip
import re
import shlex
from copy import deepcopy
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)

from scellst_ray.commands import cli
from scellst_ray.core.version import __version__
from tests.support.commands import capture_settings
from tests.support.paths import ROOT

MANIFESTS = ("rayjob-predict", "rayjob-pretrain", "raycluster")
CRDS = {"RayJob": "ray.io_rayjobs.yaml.gz", "RayCluster": "ray.io_rayclusters.yaml.gz"}


def read(name):
    return yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text())


def allows_only_known(schema):
    """Return a CRD schema that refuses the unknown names that Kubernetes would drop."""
    if isinstance(schema, list):
        return [allows_only_known(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: allows_only_known(value) for key, value in schema.items()}
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


@pytest.fixture(scope="module")
def validators(data_dir):
    """Return a validator of each ray.io/v1 kind that refuses unknown fields."""
    made = {}
    for kind, name in CRDS.items():
        with gzip.open(data_dir / "kuberay_crds" / name) as handle:
            crd = yaml.load(handle, yaml.CSafeLoader)
        schema = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")["schema"]
        strict = allows_only_known(schema["openAPIV3Schema"])
        strict["properties"]["metadata"] = {"type": "object"}  # the API server's own
        made[kind] = jsonschema.Draft202012Validator(strict)
    return made


def clusters(manifest):
    """Return the RayCluster specs of a manifest: one, or none if it uses another cluster."""
    spec = manifest["spec"]
    return (
        [spec]
        if manifest["kind"] == "RayCluster"
        else [spec.get("rayClusterSpec")] * ("rayClusterSpec" in spec)
    )


def groups(cluster):
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pod_templates(manifest):
    """Return the pod templates of a manifest: submitter, head, workers."""
    submitter = manifest["spec"].get("submitterPodTemplate")
    found = [group["template"] for cluster in clusters(manifest) for group in groups(cluster)]
    return found + [submitter] * (submitter is not None)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_is_valid(validators, name):
    manifest = read(name)
    validator = validators[manifest["kind"]]
    assert [f"{e.json_path}: {e.message}" for e in validator.iter_errors(manifest)] == []


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
def test_validator_sees_what_kubernetes_would_drop_or_refuse(validators, spoil):
    spoiled = deepcopy(read("rayjob-predict"))
    spoil(spoiled)
    # One mistake gives one message, several times if a YAML alias repeats it.
    assert len({error.message for error in validators["RayJob"].iter_errors(spoiled)}) == 1


@pytest.mark.parametrize("name", MANIFESTS)
def test_ray_version_is_one(pins, name):
    manifest = read(name)
    assert {cluster["rayVersion"] for cluster in clusters(manifest)} <= {pins["ray"]}
    containers = [c for t in pod_templates(manifest) for c in t["spec"]["containers"]]
    tags = {c["image"].rsplit(":", 1)[1] for c in containers}
    assert tags == {f"{__version__}-ray{pins['ray']}"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_bounded_and_not_root(name):
    for template in pod_templates(read(name)):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            limits = container["resources"]["limits"]
            assert container["resources"]["requests"]["memory"] == limits["memory"]
            assert "cpu" in limits


@pytest.mark.parametrize("name", ["rayjob-predict", "raycluster"])
def test_clusters_ask_for_the_token_and_keep_tiles_off_the_head(name):
    (cluster,) = clusters(read(name))
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", ["rayjob-predict", "raycluster"])
def test_workers_have_an_account_of_their_own_and_no_token(name):
    (cluster,) = clusters(read(name))
    head = cluster["headGroupSpec"]["template"]["spec"]["serviceAccountName"]
    assert cluster["workerGroupSpecs"]
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] not in (head, "default")
        assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", MANIFESTS)
def test_only_a_head_that_starts_pods_has_a_token(name):
    manifest = read(name)
    grows = [c for c in clusters(manifest) if c.get("enableInTreeAutoscaling")]
    heads = [cluster["headGroupSpec"]["template"] for cluster in grows]
    with_token = [
        template
        for template in pod_templates(manifest)
        if template["spec"].get("automountServiceAccountToken") is not False
    ]
    assert with_token == heads


def test_readme_makes_the_accounts_that_the_manifests_name():
    made = set(re.findall(r"create serviceaccount (\S+)", (ROOT / "cluster/README.md").read_text()))
    pods = [t["spec"] for name in MANIFESTS for t in pod_templates(read(name))]
    assert made == {pod["serviceAccountName"] for pod in pods if "serviceAccountName" in pod}


def test_rayjob_cleans_up_and_retries():
    spec = read("rayjob-predict")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] > 0


def test_autoscaler_reads_the_cluster():
    manifest = read("raycluster")
    manifest["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(manifest)  # validates, too
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert (types["cpu"]["min_workers"], types["cpu"]["max_workers"]) == (1, 16)
    assert "GPU" not in types["cpu"]["resources"]
    assert (types["gpu-spot"]["min_workers"], types["gpu-spot"]["max_workers"]) == (0, 8)
    assert types["gpu-spot"]["resources"]["GPU"] == 1
    assert config["idle_timeout_minutes"] == 5


def test_gpu_nodes_are_spot_on_every_cloud():
    group = next(
        g for g in read("raycluster")["spec"]["workerGroupSpecs"] if "gpu" in g["groupName"]
    )
    pod = group["template"]["spec"]
    rule = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    keys = {e["key"] for term in rule["nodeSelectorTerms"] for e in term["matchExpressions"]}
    assert {key.split("/")[0] for key in keys} == {
        "eks.amazonaws.com",
        "karpenter.sh",
        "cloud.google.com",
        "kubernetes.azure.com",
    }
    # These two clouds taint their spot nodes.
    tolerated = {toleration["key"] for toleration in pod["tolerations"]}
    assert {key for key in keys if "google" in key or "azure" in key} <= tolerated
    assert pod["terminationGracePeriodSeconds"] < 30


def test_pretraining_joins_the_cluster_and_leaves_it():
    spec = read("rayjob-pretrain")["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": read("raycluster")["metadata"]["name"]}
    assert spec["shutdownAfterJobFinishes"] is False
    assert "backoffLimit" not in spec  # would need a cluster of its own


@pytest.mark.parametrize("name", ["rayjob-predict", "rayjob-pretrain"])
def test_entrypoint_is_a_job_with_its_flags(name, monkeypatch):
    entrypoint = read(name)["spec"]["entrypoint"]
    assert "'" not in entrypoint  # quotes would have to survive three shells
    assert '"' not in entrypoint
    python, script, *words = shlex.split(entrypoint)
    assert python == "python"
    assert f"WORKDIR {Path(script).parents[1]}\n" in (ROOT / "cluster" / "Dockerfile").read_text()
    assert (ROOT / "jobs" / Path(script).name).is_file()
    seen = capture_settings(monkeypatch)
    assert cli.main([Path(script).stem, *words]) == 0
    (config,) = seen
    assert config.out.startswith("s3://BUCKET/")
    if name == "rayjob-predict":
        uris = (config.manifest, config.head, config.encoder)
        assert all(uri.startswith("s3://BUCKET/") for uri in uris)
        # With 'auto' the hardware of a retry's head would decide whether it may go on.
        assert config.precision != "auto"
    else:
        largest = read("raycluster")["spec"]["workerGroupSpecs"][1]["maxReplicas"]
        assert 0 < config.min_workers < config.workers <= largest
