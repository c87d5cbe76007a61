"""Connecting to Ray: join the cluster we run in, or start one here, and stop what we started."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from scellst_ray.core.signals import clean_exit_on_sigterm
from scellst_ray.pipelines.ray_internals import (
    hide_ray_data_logs,
    live_nodes,
    restore_sigterm_handler,
    total_resources,
)


@dataclass(frozen=True)
class Cluster:
    """What the connected cluster offers.

    Attributes:
        num_cpus: Of all nodes.
        num_gpus: Of all nodes.
        node_memory: Bytes of each node that Ray hands out.
        num_cpus_of_largest_node: Of the node that has most.
        may_grow: Whether it was there before us: it may have an autoscaler that adds nodes.
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

    Joins the cluster that RAY_ADDRESS names (`ray job submit` and KubeRay set it) or this process
    is connected to already; otherwise starts a local one, its own, and stops it at the end.

    Args:
        num_cpus: CPUs of a local cluster; all cores if None. Ignored when joining.
        dashboard: Whether a local cluster has a dashboard, on loopback (Ray Train logs errors
            without one).
    """
    hide_ray_data_logs()
    joined = ray.is_initialized()
    address = os.environ.get("RAY_ADDRESS", "")
    if not joined and address.startswith("http"):
        message = (
            f"RAY_ADDRESS is {address}, a job server: submit the command with `ray job submit`, or "
            "unset RAY_ADDRESS to run it here"
        )
        raise ValueError(message)
    with clean_exit_on_sigterm():
        if not joined:
            _init(address, num_cpus, dashboard=dashboard)
        restore_sigterm_handler()
        try:
            yield _cluster(may_grow=bool(address))
        finally:
            if not joined:
                ray.shutdown()


def _init(address: str, num_cpus: int | None, *, dashboard: bool) -> None:
    """Join the cluster at `address`, or start one on this machine if it is empty."""
    if address:
        ray.init(address="auto", logging_level=logging.WARNING)
        return
    # "local": whatever else runs or ran on this machine is none of ours.
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=dashboard,
        dashboard_host="127.0.0.1",
        logging_level=logging.WARNING,
    )


def _cluster(*, may_grow: bool) -> Cluster:
    resources = total_resources()
    alive = [node.resources for node in live_nodes()]
    return Cluster(
        int(resources.get("CPU", 1)),
        int(resources.get("GPU", 0)),
        tuple(int(node.get("memory", 0)) for node in alive),
        max(int(node.get("CPU", 0)) for node in alive),
        may_grow=may_grow,
    )
