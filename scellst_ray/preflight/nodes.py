"""What a node of a cluster offers a run, as plain values, and what is wrong with it.

`node_facts` runs on every node (pipelines/ask_nodes.py sends it there), `problems_of_node` where
the driver is. Neither torch nor Ray is imported.
"""

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openslide

from scellst_ray import storage
from scellst_ray.core.version import __version__
from scellst_ray.models.weights.catalogue import is_catalogued, weights_path
from scellst_ray.models.weights.digests import file_digest
from scellst_ray.preflight.checks import Problem
from scellst_ray.storage.cache_space import DIR_VARIABLE, cache_root
from scellst_ray.storage.credentials import redact

PACKAGES = ("ray", "torch", "numpy", "pyarrow", "opencv-python-headless")
# Ray stores no more objects on a disk that is 95 % full.
MIN_FREE_SHARE = 0.06
MAX_SKEW_S = 10.0
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
Facts = dict[str, Any]


@dataclass(frozen=True)
class NodeRequirements:
    """What every node is asked for.

    Attributes:
        out: Folder that must be one for all, and writable; None: not asked.
        probe: File in it that the driver wrote.
        weights: Files or names of the catalogue, and the digest that the driver found.
        gpus: Whether GPUs that Ray counts must be of use to torch.
        slides: Local files that the driver sees.
    """

    out: str | None = None
    probe: str | None = None
    weights: tuple[tuple[str, str], ...] = ()
    gpus: bool = False
    slides: tuple[str, ...] = ()


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all nodes; imports neither torch nor Ray."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    ours = {"python": platform.python_version(), "scellst_ray": __version__}
    return ours | packages | {"openslide": openslide.__library_version__}


def node_facts(asked: NodeRequirements) -> Facts:
    """Return what this node offers; `wrong` lists what it was asked for and does not."""
    wrong: list[str] = []
    for check in (_check_out, _check_weights, _check_slides):
        _tried(partial(check, asked), wrong)
    ray_folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    disk = shutil.disk_usage(ray_folder)
    facts: Facts = {"host": socket.gethostname(), "clock": time.time(), "versions": versions()}
    facts |= {"spill": str(ray_folder), "spill_free_share": disk.free / disk.total}
    _tried(lambda: facts.update(_cache_facts()), wrong)
    if asked.gpus:
        _tried(lambda: facts.update(torch_gpus=_torch_gpus()), wrong)
    return facts | {"wrong": wrong}


def _tried(check: Callable[[], None], wrong: list[str]) -> None:
    try:
        check()
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        wrong.append(str(error))


def _cache_facts() -> Facts:
    root = cache_root()
    return {"cache": str(root), "cache_free": shutil.disk_usage(root).free}


def _check_out(asked: NodeRequirements) -> None:
    """Raise unless this node sees what the driver wrote, and can write beside it."""
    if asked.out is None or asked.probe is None:
        return
    remedy = "give an --out on object storage or on a mount that all nodes share and may write"
    try:
        seen = storage.exists(asked.probe)
        if seen:
            write_probe(asked.out, keep=False)
    except OSError as error:
        message = f"{redact(asked.out)} cannot be written ({error}); {remedy}"
        raise OSError(message) from error
    if not seen:
        message = f"{redact(asked.out)} is not the folder the driver writes to; {remedy}"
        raise OSError(message)


def write_probe(out: str, *, keep: bool) -> str:
    """Write a small file below a folder, under a name that nothing lists; return its URI.

    Raises:
        OSError: it cannot be written.
    """
    uri = storage.join(out, f".probe-{uuid.uuid4().hex[:12]}")
    storage.publish_text(uri, "scellst_ray\n")
    if not keep:
        storage.remove_tree(uri)
    return uri


def _check_weights(asked: NodeRequirements) -> None:
    """Raise if weights are not there, or others than the driver's."""
    for weights, digest in asked.weights:
        path = weights_path(weights) if is_catalogued(weights) else storage.local_copy(weights)
        found = file_digest(Path(path))
        if found != digest:
            message = (
                f"weights {redact(weights)} are {found} here, and {digest} where the driver is; "
                "give every node the same file"
            )
            raise ValueError(message)


def _check_slides(asked: NodeRequirements) -> None:
    """Raise if none of the driver's local slides is to be seen here."""
    if asked.slides and not any(Path(storage.resolve(uri)[1]).exists() for uri in asked.slides):
        message = (
            f"slides that the driver sees are not here, such as {asked.slides[0]}; put them on "
            "object storage or on a mount that all nodes have at the same place"
        )
        raise FileNotFoundError(message)


def _torch_gpus() -> int:
    """Return how many GPUs torch can use: in a process of its own, so that none stays in use."""
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", COUNT_GPUS]
    done = subprocess.run(  # noqa: S603 - our own words
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        message = f"torch cannot be asked for GPUs ({done.stderr.strip().splitlines()[-1:]})"
        raise RuntimeError(message)
    return int(done.stdout)


def problems_of_node(
    name: str,
    facts: Mapping[str, Any],
    ours: Mapping[str, str],
    asked_within: tuple[float, float],
    num_gpus: int,
    largest_slide: int,
) -> list[Problem]:
    """Return what is wrong with a node, given what it says.

    Args:
        name: The node.
        facts: From `node_facts` there.
        ours: The driver's `versions`.
        asked_within: Seconds of the driver's clock before it was asked and after it answered.
        num_gpus: That Ray counts there, where they are wanted; else 0.
        largest_slide: Bytes that its cache must hold; 0 without slides on object storage.
    """
    where = f"node {name}, {facts['host']}"
    problems = [Problem(f"{where}: {text}") for text in facts["wrong"]]
    theirs = facts["versions"]
    differing = [
        f"{k} {theirs.get(k)} (driver: {v})" for k, v in ours.items() if theirs.get(k) != v
    ]
    if differing:
        text = f"{where}: other versions: {', '.join(differing)}; give all nodes the same image"
        problems.append(Problem(text))
    if facts.get("torch_gpus", num_gpus) < num_gpus:
        text = (
            f"{where}: Ray counts {num_gpus} GPUs and torch can use {facts['torch_gpus']}; check "
            "the driver and that torch is a CUDA build, or say gpus: false"
        )
        problems.append(Problem(text))
    skew_s = max(asked_within[0] - facts["clock"], facts["clock"] - asked_within[1])
    if skew_s > MAX_SKEW_S:
        text = f"{where}: its clock differs from the driver's by {skew_s:.0f} s; set it (NTP)"
        problems.append(Problem(text, stops=False))
    if facts.get("cache_free", largest_slide) < largest_slide:
        text = (
            f"{where}: {facts['cache']} has {_gb(facts['cache_free'])} free, and the largest slide "
            f"takes {_gb(largest_slide)}; make room, or set {DIR_VARIABLE} to a larger disk"
        )
        problems.append(Problem(text, stops=False))
    if facts["spill_free_share"] < MIN_FREE_SHARE:
        text = (
            f"{where}: the disk of {facts['spill']} is {1 - facts['spill_free_share']:.0%} full, "
            "and Ray stores nothing there beyond 95 %; make room, or give Ray another --temp-dir"
        )
        problems.append(Problem(text, stops=False))
    return problems


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
