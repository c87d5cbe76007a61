"""Facts about a node, and every problem that it may have."""

import time

import pytest

from scellst_ray.models.weights.digests import file_digest
from scellst_ray.preflight import nodes as module
from scellst_ray.preflight.nodes import (
    NodeRequirements,
    node_facts,
    problems_of_node,
    versions,
    write_probe,
)
from scellst_ray.storage.files import exists

NOW = (1000.0, 1001.0)
WELL = {
    "host": "host7",
    "clock": 1000.5,
    "versions": versions(),
    "spill": "/tmp",
    "spill_free_share": 0.5,
    "cache": "/cache",
    "cache_free": 10**12,
    "wrong": [],
}


def texts(num_gpus=0, largest=0, **changes):
    return problems_of_node("10.0.0.7", WELL | changes, versions(), NOW, num_gpus, largest)


def test_all_well(tmp_path):
    probe = write_probe(str(tmp_path), keep=True)
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"weights")
    asked = NodeRequirements(
        out=str(tmp_path),
        probe=probe,
        weights=((str(weights), file_digest(weights)),),
        slides=(str(weights), "gone.svs"),
    )
    before = time.time()
    facts = node_facts(asked)
    assert facts["wrong"] == []
    assert before <= facts["clock"] <= time.time()
    assert facts["versions"] == versions()
    assert {"ray", "torch", "python", "scellst_ray", "openslide"} <= set(versions())
    assert problems_of_node("n", facts, versions(), (before, time.time()), 0, 0) == []
    # Only the driver's own probe is left.
    assert {path.name for path in tmp_path.iterdir()} == {
        weights.name,
        probe.rsplit("/", 1)[-1],
    }


def test_everything_that_a_node_lacks_is_reported_at_once(tmp_path):
    (tmp_path / "other.pth").write_bytes(b"another file")
    asked = NodeRequirements(
        out=str(tmp_path),
        probe=str(tmp_path / ".probe-elsewhere"),
        weights=((str(tmp_path / "other.pth"), "sha256:ab"),),
        slides=("/mnt/nowhere/a.svs",),
    )
    wrong = node_facts(asked)["wrong"]
    assert len(wrong) == 3
    output, weights, slides = wrong
    assert "is not the folder the driver writes to; give an --out on object storage" in output
    assert "other.pth have digest sha256:" in weights
    assert "give every node the same file" in weights
    assert "such as /mnt/nowhere/a.svs" in slides
    problems = texts(wrong=wrong)
    assert all(problem.stops for problem in problems)
    assert all(problem.text.startswith("node 10.0.0.7, host7: ") for problem in problems)


def test_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SCELLST_RAY_CACHE_DIR", str(tmp_path))
    gone = ((str(tmp_path / "gone.pth"), "sha256:ab"),)
    assert "gone.pth" in node_facts(NodeRequirements(weights=gone))["wrong"][0]
    named = (("cellvit-256-x40", "sha256:ab"),)
    assert "models fetch cellvit-256-x40" in node_facts(NodeRequirements(weights=named))["wrong"][0]


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        write_probe(str(tmp_path / "file" / "out"), keep=True)
    asked = NodeRequirements(out=str(tmp_path / "file" / "out"), probe=str(tmp_path / "file"))
    assert "cannot be written" in node_facts(asked)["wrong"][0]


def test_a_cache_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SCELLST_RAY_CACHE_DIR", str(tmp_path / "file"))
    facts = node_facts(NodeRequirements())
    assert str(tmp_path / "file") in facts["wrong"][0]
    assert problems_of_node("n", facts, versions(), (0.0, time.time() + 1), 0, 10**9)[0].stops


def test_versions_must_be_equal():
    (problem,) = texts(versions=versions() | {"torch": "1.0", "openslide": "3.4.1"})
    assert problem.stops
    assert "torch 1.0 (driver: " in problem.text
    assert "openslide 3.4.1" in problem.text
    assert "numpy" not in problem.text


def test_gpus_that_torch_cannot_use(monkeypatch):
    assert texts(num_gpus=2, torch_gpus=2) == []
    (problem,) = texts(num_gpus=2, torch_gpus=0)
    assert problem.stops
    assert "Ray counts 2 GPUs and torch can use 0" in problem.text
    monkeypatch.setattr(module, "COUNT_GPUS", "print(3)")
    facts = node_facts(NodeRequirements(gpus=True))
    assert facts["torch_gpus"] == 3
    monkeypatch.setattr(module, "COUNT_GPUS", "import no_such_module")
    (text,) = node_facts(NodeRequirements(gpus=True))["wrong"]
    assert "no_such_module" in text


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"clock": 900.0}, "differs from the driver's by 100 s"),
        ({"clock": 1061.0}, "differs from the driver's by 60 s"),
        ({"cache_free": 10**9, "largest": 2 * 10**9}, "has 1 GB free, and the largest slide takes"),
        ({"spill_free_share": 0.03}, "is 97% full"),
    ],
)
def test_what_may_go_wrong_later_is_reported_and_stops_nothing(changes, part):
    (problem,) = texts(**changes)
    assert part in problem.text
    assert not problem.stops


def test_the_probe_is_one_that_nothing_lists(tmp_path):
    uri = write_probe(str(tmp_path / "new"), keep=True)
    assert exists(uri)
    assert uri.rsplit("/", 1)[-1].startswith(".")
    assert exists(write_probe(str(tmp_path), keep=False)) is False
