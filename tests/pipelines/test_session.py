"""What a cluster holds, and addresses that cannot be joined."""

import pytest

from scellst_ray.pipelines import session
from scellst_ray.pipelines.session import Cluster, ray_session


def test_workers_fit_node_by_node():
    cluster = Cluster(8, 0, (5, 9), 4)
    assert cluster.num_fitting(4) == 3
    assert cluster.num_fitting(5) == 2
    assert cluster.num_fitting(10) == 0


def test_a_job_server_is_no_cluster_to_join(monkeypatch):
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ValueError, match="submit the command with `ray job submit`"), ray_session():
        pass
