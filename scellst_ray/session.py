"""Connecting to Ray: join the cluster we run in, or start one here, and stop what we started."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class Cluster:
    """What the connected cluster offers: numbers of CPUs and GPUs."""

    num_cpus: int
    num_gpus: int


@contextmanager
def ray_session(num_cpus: int | None = None, *, dashboard: bool = False) -> Iterator[Cluster]:
    """Use Ray inside a `with`.

    Joins the running cluster if this process belongs to one (`ray job submit` and KubeRay set
    RAY_ADDRESS) or is already connected; otherwise starts a local one and stops it at the end.

    Args:
        num_cpus: CPUs of a local cluster; all cores if None. Ignored when joining.
        dashboard: Whether a local cluster has a dashboard, on loopback (Ray Train logs errors
            without one).
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    joined = ray.is_initialized()
    if not joined and os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", logging_level=logging.WARNING)
    elif not joined:
        ray.init(
            num_cpus=num_cpus,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            logging_level=logging.WARNING,
        )
    try:
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield Cluster(int(resources.get("CPU", 1)), int(resources.get("GPU", 0)))
    finally:
        if not joined:
            ray.shutdown()
