"""Check the launcher's YAML against Ray's schema and steps, and each cloud's description."""

import json
import re
import shlex
from pathlib import Path

import boto3
import googleapiclient
import jsonschema
import pytest
import ray.autoscaler
import yaml
from moto import mock_aws
from ray.autoscaler._private.gcp.node import GCPCompute
from ray.autoscaler._private.util import prepare_config, validate_config

from scellst_ray.core.version import __version__
from tests.support.paths import ROOT

PROFILES = {"head": "scellst-ray-head", "worker": "scellst-ray-worker"}
CLOUDS = ("aws", "gcp", "azure")
SPOT = {
    "aws": lambda node: node.get("InstanceMarketOptions", {}).get("MarketType") == "spot",
    "gcp": lambda node: node.get("scheduling", {}).get("provisioningModel") == "SPOT",
    "azure": lambda node: node["azure_arm_parameters"].get("priority") == "Spot",
}


def read(cloud):
    return yaml.safe_load((ROOT / "cluster" / f"{cloud}.yaml").read_text())


def node_configs(config):
    return {name: kind["node_config"] for name, kind in config["available_node_types"].items()}


@pytest.fixture(scope="module", params=CLOUDS)
def cloud(request):
    return request.param


def test_ray_accepts_it(cloud):
    validate_config(prepare_config(read(cloud)))


def test_ray_sees_a_misspelt_key(cloud):
    config = read(cloud)
    config["available_node_types"]["gpu"]["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(config))


IDENTITY = {
    "aws": lambda node: node["IamInstanceProfile"]["Name"],
    # `ray up` gives the head an account of its own.
    "gcp": lambda node: [a["email"] for a in node.get("serviceAccounts", [])],
}
STORAGE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"


@pytest.mark.parametrize("name", IDENTITY)
def test_workers_have_an_identity_of_their_own(name):
    head, *workers = map(IDENTITY[name], node_configs(read(name)).values())
    assert len(workers) == 2
    assert all(worker and worker != head for worker in workers)
    assert "scellst-ray-worker" in str(workers[0])
    assert workers[0] == workers[1]


def test_workers_on_compute_engine_reach_storage_only():
    nodes = node_configs(read("gcp"))
    for kind in ("cpu", "gpu"):
        (account,) = nodes[kind]["serviceAccounts"]
        assert account["scopes"] == [STORAGE_SCOPE]


def test_azure_says_that_all_nodes_share_an_identity():
    """Ray's own template for a virtual machine leaves no choice; the file must say so."""
    source = Path(ray.autoscaler.__file__).parent / "_private" / "_azure" / "node_provider.py"
    assert 'template_params["msi"] = self.provider_config["msi"]' in source.read_text()
    text = " ".join((ROOT / "cluster" / "azure.yaml").read_text().replace("#", " ").split())
    assert (
        "Ray gives all nodes one managed identity, so code on a worker may also start VMs" in text
    )


def policy(name):
    """Return {action: resources} of a policy for AWS, which allows and denies nothing else."""
    document = json.loads((ROOT / "cluster" / f"aws-{name}-policy.json").read_text())
    assert document["Version"] == "2012-10-17"
    found = {}
    for statement in document["Statement"]:
        assert statement["Effect"] == "Allow"
        actions, resources = statement["Action"], statement["Resource"]
        for action in [actions] if isinstance(actions, str) else actions:
            found[action] = [resources] if isinstance(resources, str) else resources
    return found


def test_a_worker_on_aws_may_read_slides_and_write_results_and_no_more():
    allowed = policy("worker")
    assert {action.split(":")[0] for action in allowed} == {"s3"}
    assert not any("*" in action for action in allowed)
    assert not {"s3:PutBucketPolicy", "s3:DeleteBucket"} & set(allowed)
    writing = [a for a in allowed if a.removeprefix("s3:").startswith(("Put", "Delete", "Abort"))]
    assert writing
    assert all(allowed[action] == ["arn:aws:s3:::RESULTS/*"] for action in writing)
    for resources in allowed.values():
        assert all(re.match(r"arn:aws:s3:::(SLIDES|RESULTS)(/\*)?$", one) for one in resources)


def test_the_head_on_aws_may_pass_on_the_workers_role_only():
    allowed = policy("head")
    assert {action.split(":")[0] for action in allowed} == {"ec2", "iam"}
    assert allowed["iam:PassRole"] == ["arn:aws:iam::ACCOUNT:role/scellst-ray-worker"]
    assert {"ec2:RunInstances", "ec2:TerminateInstances", "ec2:CreateTags"} <= set(allowed)
    assert [action for action in allowed if action.startswith("iam")] == ["iam:PassRole"]


def test_workers_are_spot_and_the_head_is_not(cloud):
    spot = {name: SPOT[cloud](node) for name, node in node_configs(read(cloud)).items()}
    assert spot == {"head": False, "cpu": True, "gpu": True}


def test_no_tiles_on_the_head_and_bounded_workers(cloud):
    config = read(cloud)
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu"]["resources"]["GPU"] == 1
    assert all(0 < types[name]["max_workers"] <= config["max_workers"] for name in ("cpu", "gpu"))
    assert [types[name]["min_workers"] for name in ("cpu", "gpu")] == [0, 0]


def test_all_nodes_have_the_token_and_the_dashboard_stays_on_loopback(cloud):
    config = read(cloud)
    words = shlex.split(" ".join(config["docker"]["run_options"]))
    variables = dict(word.split("=", 1) for word in words if word.startswith("RAY_"))
    assert variables["RAY_AUTH_MODE"] == "token"
    (path,) = config["file_mounts"]
    assert config["file_mounts"][path] == "~/.ray/auth_token"
    home = re.search(r"^ENV HOME=(.+)$", (ROOT / "cluster/Dockerfile").read_text(), re.MULTILINE)[1]
    assert path.replace("~", home) == variables["RAY_AUTH_TOKEN_PATH"]
    start = shlex.split(config["head_start_ray_commands"][-1])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start
    assert "0.0.0.0" not in json.dumps(config)


def test_nodes_run_the_image_and_install_nothing_else(cloud, pins):
    config = prepare_config(read(cloud))
    assert config["docker"]["image"].rsplit(":", 1)[1] == f"{__version__}-ray{pins['ray']}"
    # Ray's own defaults would install another Ray.
    assert config["setup_commands"] == config["worker_setup_commands"] == []
    (install,) = config["head_setup_commands"]
    names = [word for word in shlex.split(install)[2:] if not word.startswith(("-", "/"))]
    defaults = Path(ray.autoscaler.__file__).parent / cloud / "defaults.yaml"
    known = " ".join(yaml.safe_load(defaults.read_text())["head_setup_commands"])
    for name in names:
        pinned = name in pins and "-c /app/constraints.txt" in install
        assert pinned or (name in known and "==" in name), name


def test_image_has_what_the_launcher_runs_in_it():
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    assert {"openssh-client", "rsync"} <= set(text.split())


def test_aws_starts_the_nodes(tmp_path, monkeypatch):
    """Ray's launcher starts the nodes on a stand-in for EC2, through the real client's checks."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        for profile in PROFILES.values():
            boto3.client("iam").create_instance_profile(InstanceProfileName=profile)
        config = AWSNodeProvider.bootstrap_config(prepare_config(read("aws")))
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for kind, node in node_configs(config).items():
            tags = {"ray-node-kind": "worker", "ray-user-node-type": kind, "ray-node-name": kind}
            provider.create_node(node, tags, 1)
        client = boto3.client("ec2", region_name=config["provider"]["region"])
        found = [i for r in client.describe_instances()["Reservations"] for i in r["Instances"]]
        groups = client.describe_security_groups(
            GroupIds=[found[0]["SecurityGroups"][0]["GroupId"]]
        )["SecurityGroups"]
    kinds = {i["InstanceType"]: i.get("InstanceLifecycle") for i in found}
    assert kinds == {"m7i.xlarge": None, "m7i.2xlarge": "spot", "g6.2xlarge": "spot"}
    profiles = {i["InstanceType"]: i["IamInstanceProfile"]["Arn"].split("/")[-1] for i in found}
    head, *workers = (profiles[kind] for kind in kinds)
    assert (head, set(workers)) == (PROFILES["head"], {PROFILES["worker"]})
    # Only ssh is open from outside the group.
    outside = [rule for rule in groups[0]["IpPermissions"] if rule["IpRanges"]]
    assert {(rule["FromPort"], rule["ToPort"]) for rule in outside} == {(22, 22)}


def discovered(schema):
    """Return a discovery document's schema as a JSON schema that refuses unknown names."""
    if isinstance(schema, list):
        return [discovered(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        if key == "$ref":
            made[key] = f"#/$defs/{value}"
        elif key == "properties":
            made[key] = {name: discovered(part) for name, part in value.items()}
            made["additionalProperties"] = False
        elif key in ("type", "items", "enum", "additionalProperties"):
            made[key] = discovered(value)
    if schema.get("format") in ("int64", "uint64"):
        made["type"] = ["string", "integer"]  # the API takes both in JSON
    return made


@pytest.fixture(scope="module")
def instance_schema():
    """Return a validator of Compute Engine's Instance."""
    documents = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
    schemas = json.loads((documents / "compute.v1.json").read_text())["schemas"]
    defs = {name: discovered(schema) for name, schema in schemas.items()}
    return jsonschema.Draft202012Validator({"$ref": "#/$defs/Instance", "$defs": defs})


def test_gcp_instances_are_valid(instance_schema):
    config = read("gcp")
    provider = config["provider"]
    compute = GCPCompute(None, provider["project_id"], provider["availability_zone"], "scellst")
    for node in node_configs(config).values():
        body = compute._convert_resources_to_urls(node)
        assert [f"{e.json_path}: {e.message}" for e in instance_schema.iter_errors(body)] == []
    spoiled = node | {"scheduling": {"preemptable": True}}
    assert list(instance_schema.iter_errors(spoiled))


def test_azure_parameters_are_the_templates():
    folder = Path(ray.autoscaler.__file__).parent / "_private" / "_azure"
    known = json.loads((folder / "azure-vm-template.json").read_text())["parameters"]
    types = {"string": str, "int": int, "bool": bool}
    for node in node_configs(read("azure")).values():
        assert set(node) == {"azure_arm_parameters"}
        for name, value in node["azure_arm_parameters"].items():
            assert type(value) is types[known[name]["type"]], name
