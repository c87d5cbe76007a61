"""Settings that cannot work are refused, and those left open are decided once."""

import pytest

from scellst_ray.stages.config import (
    ExtractConfig,
    encoder_of_head,
    num_planners,
    resolve_config,
    tiles_of_task,
)


def test_settings_left_open_are_decided(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ExtractConfig(manifest="m.csv", out="o", encoder="none", gpus=False)
    resolved = resolve_config(config)
    assert resolved.manifest == str(tmp_path / "m.csv")
    assert not resolved.store_embeddings
    assert resolved.precision in ("float32", "bfloat16")
    assert resolve_config(resolved) == resolved


def test_tasks_are_larger_with_gpus():
    assert tiles_of_task(2, gpus=False) == 2
    assert tiles_of_task(2, gpus=True) == 8
    assert tiles_of_task(12, gpus=True) == 12


@pytest.mark.parametrize(
    ("num_cpus", "num_nodes", "planners"), [(1, 1, 1), (16, 1, 2), (16, 4, 4), (64, 4, 8)]
)
def test_every_node_and_every_eight_cpus_have_a_planner(num_cpus, num_nodes, planners):
    assert num_planners(num_cpus, num_nodes) == planners


def test_a_plan_that_knows_no_nodes_counts_one():
    assert num_planners(4) == 1
    assert num_planners(32) == 4


def test_a_head_that_does_not_name_its_encoder_is_refused_in_a_line():
    assert encoder_of_head({"encoder": "random:0"}, "h") == "random:0"
    with pytest.raises(ValueError, match=r"^h: the head does not name its encoder.*--encoder$"):
        encoder_of_head({}, "h")
