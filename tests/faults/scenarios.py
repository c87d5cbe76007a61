"""The fault matrix: the faults of each cluster, and their numbers."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from scellst_ray import storage
from tests.faults.disturbed import (
    CRASHED,
    RAYLET,
    Running,
    broken_command,
    command,
    differences,
    disturbed,
    write_cohort,
)
from tests.faults.hosts import Hosts, Network
from tests.support.pretended_gpu import ENVIRONMENT
from tests.support.s3_server import BUCKET, serving_s3


@dataclass(frozen=True)
class Scenario:
    """A cluster and its faults.

    Attributes:
        faults: Names in `INJECTORS`, and the number of runs of each in the benchmark.
        hosts: Arguments of `Hosts`.
        s3: Whether slides and output lie on S3.
        share: Share of requests to S3 that fail.
        small_disk: Whether the last host's cache of slides is a disk that holds none.
        gpus: Whether the networks run on (pretended) GPUs.
    """

    faults: dict[str, int]
    hosts: dict = field(default_factory=dict)
    s3: bool = False
    share: float = 0.0
    small_disk: bool = False
    gpus: bool = False


SCENARIOS = {
    "hosts": Scenario(
        {
            "worker killed": 4,
            "raylet killed": 8,
            "host lost": 8,
            "host lost for good": 4,
            "host cut off for 30 s": 2,
            "driver killed again and again": 4,
            CRASHED: 3,
        }
    ),
    "impatient": Scenario({"host cut off for 30 s": 2}, {"quick_health": True}),
    "gpus": Scenario(
        {"GPU-stage actor killed": 4, "host lost for good": 4},
        {"num_gpus": 1, "environment": ENVIRONMENT},
        gpus=True,
    ),
    "small store": Scenario({"object store filled by others": 2}, {"store_mib": 80}),
    "failing s3": Scenario({"nothing": 2}, s3=True, share=0.1),
    "full disk": Scenario({"nothing": 2}, s3=True, small_disk=True),
}


def undisturbed_run(folder):
    """Write the cohort, run it on two hosts twice, undisturbed; return the seconds of the second.

    All other tables are compared with its tables, in folder/whole.
    """
    write_cohort(folder)
    with Network() as network, Hosts(network) as hosts:
        for name in ("first", "whole"):
            running = Running(hosts, command(folder / "manifest.csv", folder / name))
            code = running.end()
            seconds = running.seconds
            if code:
                raise RuntimeError(running.log.read_text())
    texts = differences(folder / "first", folder / "whole")
    if texts:
        message = f"two undisturbed runs differ: {texts}"
        raise RuntimeError(message)
    return seconds


def outcomes(name, folder, times=None, only=None):
    """Yield the outcome of every run of a scenario.

    Args:
        name: Key of `SCENARIOS`.
        folder: Folder that `undisturbed_run` has filled.
        times: Number of runs of each fault; by default that of the scenario.
        only: Faults to try; by default all of the scenario.
    """
    scenario, folder = SCENARIOS[name], Path(folder)
    with ExitStack() as stack:
        network = stack.enter_context(Network())
        store, root = None, str(folder)
        if scenario.s3:
            store = stack.enter_context(serving_s3(host=network.gateway))
            root = f"s3://{BUCKET}"
            copy_cohort(folder, root)
            store.share = scenario.share
        hosts = stack.enter_context(Hosts(network, **scenario.hosts))
        if scenario.small_disk:
            fill_disk(hosts, hosts.num)
        for fault, repetitions in scenario.faults.items():
            if only and fault not in only:
                continue
            for number in range(times or repetitions):
                out = storage.join(root, f"{name}-{fault}-{number}".replace(" ", "-"))
                broken = fault == CRASHED
                manifest = storage.join(root, "broken.csv" if broken else "manifest.csv")
                words = (broken_command if broken else command)(manifest, out)
                words += ["--gpus=true"] if scenario.gpus else []
                failed = 0 if store is None else len(store.failed)
                outcome = disturbed(hosts, fault, words, folder / "whole", seed=number)
                start_those_given_up(hosts)
                hosts.wait_for(hosts.num + 1)
                yield named(outcome, name, 0 if store is None else len(store.failed) - failed)


def start_those_given_up(hosts):
    """Start hosts again that Ray gave up after the run: their raylets have ended."""
    for host in range(1, hosts.num + 1):
        if not hosts.titled(host, RAYLET):
            hosts.kill(host)
            hosts.start(host)


def named(outcome, scenario, failed):
    """Return an outcome under the name of what went wrong, where that is the scenario's."""
    if outcome.fault != "nothing":
        return outcome
    fault = {"failing s3": "10 % of S3 requests fail", "full disk": "disk full on one host"}
    outcome.fault, outcome.num_faults = fault[scenario], failed or 1
    return outcome


def copy_cohort(folder, root):
    """Copy manifests and slides to S3."""
    for path in [*folder.glob("*.csv"), *folder.glob("s*/slide.tiff")]:
        content = path.read_bytes()
        uri = f"{root}/{path.relative_to(folder)}"
        storage.publish(uri, lambda to, content=content: to.write_bytes(content))


def fill_disk(hosts, host):
    """Start a host again with a disk for its cache of slides that holds none."""
    cache = hosts.folder / "cache"
    cache.mkdir()
    hosts.kill(host)
    hosts.wait_for(hosts.num)
    hosts.start(
        host,
        before=f"mount -t tmpfs -o size=64k tmpfs {cache}",
        environment={"SCELLST_RAY_CACHE_DIR": str(cache)},
    )
    hosts.wait_for(hosts.num + 1)
