"""The connection to Ray: to the cluster that this process belongs to, or to a local one."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from scellst_ray.core.signals import clean_exit_on_sigterm
from scellst_ray.pipelines.local_ray import start_local_ray
from scellst_ray.pipelines.ray_internals import (
    hide_ray_data_logs,
    hide_token_notice,
    live_nodes,
    restore_sigterm_handler,
    total_resources,
)
from scellst_ray.pipelines.ray_start import ExplainedStart, cluster_address
from scellst_ray.pipelines.worker_lines import filter_worker_lines


@dataclass(frozen=True)
class Cluster:
    """The resources of the connected cluster.

    Attributes:
        num_cpus: Number of CPUs of all nodes.
        num_gpus: Number of GPUs of all nodes.
        node_memory: Bytes of memory that Ray hands out, for each node.
        num_cpus_of_largest_node: Number of CPUs of the node that has most.
        may_grow: Whether an autoscaler may add nodes: the cluster ran before this process joined.
    """

    num_cpus: int
    num_gpus: int
    node_memory: tuple[int, ...]
    num_cpus_of_largest_node: int
    may_grow: bool = False

    def num_fitting(self, memory: int) -> int:
        """Return how many workers that declare `memory` bytes each the nodes hold."""
        return sum(node // memory for node in self.node_memory)


@contextmanager
def ray_session(num_cpus: int | None = None, *, dashboard: bool = False) -> Iterator[Cluster]:
    """Use Ray inside a `with`.

    The function joins the cluster to which this process is connected, or that RAY_ADDRESS names:
    `ray job submit` and KubeRay set it. Otherwise it starts a local cluster, which listens on the
    loopback address only, and stops it at the end.

    Args:
        num_cpus: CPUs of a local cluster; None: all cores. Ignored when joining.
        dashboard: Whether a local cluster has a dashboard, on the loopback address. Ray Train logs
            errors without one.

    Raises:
        ValueError: RAY_ADDRESS names a job server, or RAY_TMPDIR is too long.
        OSError: the folder for Ray's files is open to other users.
    """
    hide_ray_data_logs()
    hide_token_notice()
    joined = ray.is_initialized()
    address = os.environ.get("RAY_ADDRESS", "") if joined else cluster_address()
    with clean_exit_on_sigterm():
        if not joined:
            with ExplainedStart(address):
                _start_ray(address, num_cpus, dashboard=dashboard)
            filter_worker_lines()
        restore_sigterm_handler()
        try:
            yield _describe_cluster(may_grow=bool(address))
        finally:
            if not joined:
                ray.shutdown()


def _start_ray(address: str, num_cpus: int | None, *, dashboard: bool) -> None:
    """Join the cluster at `address`, or start one on this machine if it is empty."""
    if address:
        ray.init(address="auto", logging_level=logging.WARNING)
        return
    start_local_ray(num_cpus, dashboard=dashboard)


def _describe_cluster(*, may_grow: bool) -> Cluster:
    resources = total_resources()
    alive = [node.resources for node in live_nodes()]
    return Cluster(
        int(resources.get("CPU", 1)),
        int(resources.get("GPU", 0)),
        tuple(int(node.get("memory", 0)) for node in alive),
        max(int(node.get("CPU", 0)) for node in alive),
        may_grow=may_grow,
    )
