"""Nodes are asked before work starts: on one node here, on two by a task each."""

import time
import warnings
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster as LocalCluster

from scellst_ray.pipelines import ask_nodes as module
from scellst_ray.pipelines.ask_nodes import (
    ask_nodes,
    asked_for,
    check_before_run,
    node_problems,
    working_nodes,
)
from scellst_ray.pipelines.session import Cluster
from scellst_ray.preflight.checks import FoundSlides
from scellst_ray.preflight.nodes import NodeRequirements
from scellst_ray.slides.manifest import SlideRow

pytestmark = pytest.mark.ray
NOTHING = FoundSlides({}, {}, [], 0)
CLUSTER = Cluster(2, 0, (10**9,), 2)


@pytest.fixture(scope="module")
def local_cluster(ray_forks):  # noqa: ARG001 - set up first
    """Start a head without CPUs and one node, and yield the cluster."""
    cluster = LocalCluster()
    cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=80_000_000)
    cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            cluster.shutdown()


def test_nodes_answer_each_for_itself(local_cluster, tmp_path, monkeypatch):
    (first,) = working_nodes()  # not the head, which takes no work
    asked = NodeRequirements(out=str(tmp_path))
    assert node_problems(asked, CLUSTER, NOTHING) == []
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "file").touch()
    spoilt = {"SCELLST_RAY_CACHE_DIR": str(tmp_path / "file")}
    local_cluster.add_node(num_cpus=1, object_store_memory=80_000_000, env_vars=spoilt)
    local_cluster.wait_for_nodes()
    assert len(working_nodes()) == 2
    (problem,) = node_problems(asked, CLUSTER, NOTHING)
    assert problem.stops
    assert str(tmp_path / "file") in problem.text
    assert first.name not in problem.text

    gone = SlideRow("s", str(tmp_path / "gone.svs"), None)
    with pytest.raises(ValueError, match=r"^1 problem\(s\) must be solved") as stopped:
        check_before_run(asked, CLUSTER, [gone])
    assert "- slide s: " in str(stopped.value)

    # Sent by value, since it is local: no node answers before it is given up.
    monkeypatch.setattr(module, "node_facts", lambda _: time.sleep(600))
    answers = ask_nodes(asked, timeout_s=0.0)
    assert len(answers) == 2
    assert all("did not answer in 0 s" in answer for _, answer in answers)


def test_one_node_is_asked_without_a_task(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(module, "working_nodes", lambda: [module.Node("here", "127.0.0.1", 0)])
    monkeypatch.setattr(module, "_is_here", lambda node: node.node_id == "here")
    seen = []
    real = module.node_facts
    monkeypatch.setattr(module, "node_facts", lambda asked: seen.append(asked) or real(asked))
    here = tmp_path / "a.svs"
    here.write_bytes(b"x")
    slides = [SlideRow("a", str(here), None), SlideRow("b", str(tmp_path / "b.svs"), None)]
    check_before_run(NodeRequirements(out=str(tmp_path), weights=(("w", "d"),)), CLUSTER, slides)
    (asked,) = seen
    # The driver has read the weights itself.
    assert (asked.weights, asked.slides) == ((), (str(here),))
    assert Path(asked.probe).parent == tmp_path
    assert "slide b: " in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["a.svs"]


@pytest.mark.parametrize(("full", "left_out"), [((), ()), (("b",), ("b",)), (("a", "b"), ())])
def test_nodes_without_room_are_left_out_where_others_have_it(monkeypatch, caplog, full, left_out):
    found = FoundSlides({}, {}, [], 10**9)
    both = [module.Node(name, f"host-{name}", 0) for name in ("a", "b")]
    monkeypatch.setattr(module, "find_slides", lambda *_, **__: found)
    monkeypatch.setattr(module, "working_nodes", lambda: both)
    facts = module.node_facts(NodeRequirements())
    free = {node.node_id: 10**6 if node.node_id in full else 10**10 for node in both}
    answers = [(node, facts | {"cache_free": free[node.node_id]}) for node in both]
    monkeypatch.setattr(module, "ask_nodes", lambda *_: answers)
    assert check_before_run(NodeRequirements(), CLUSTER) == left_out
    for name in full:
        assert f"node host-{name}" in caplog.text
    assert ("and the largest slide takes 1 GB" in caplog.text) is bool(full)


def test_what_is_asked_for():
    weights = [("random:0", "random:0"), ("s3://b/e.pth", "sha256:12"), (None, None)]
    asked = asked_for("out", [*weights, ("tokens", "tokens:sha256:34")], gpus=True)
    assert asked == NodeRequirements(out="out", weights=(("s3://b/e.pth", "sha256:12"),), gpus=True)
    assert asked_for("out") == NodeRequirements(out="out")


def test_problems_of_the_cluster_and_the_output(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "working_nodes", list)
    (tmp_path / "file").touch()
    asked = NodeRequirements(out=str(tmp_path / "file" / "out"), gpus=True)
    gpus, output = node_problems(asked, CLUSTER, NOTHING)
    assert gpus.stops
    assert "the cluster has none" in gpus.text
    assert output.stops
    assert "give an --out that can be written" in output.text
    growing = Cluster(2, 0, (10**9,), 2, may_grow=True)
    assert not node_problems(asked, growing, NOTHING)[0].stops
