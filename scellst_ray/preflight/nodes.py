"""Facts about a node of a cluster, and problems that follow from them.

`node_facts` runs on every node (pipelines/ask_nodes.py sends it there). `problems_of_node` runs on
the driver. The module imports neither torch nor Ray.
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
# Ray stores no objects on a disk that is more than 95 % full; 1 % is left as a reserve.
MIN_FREE_SHARE = 0.06
MAX_SKEW_S = 10.0
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
Facts = dict[str, Any]


@dataclass(frozen=True)
class NodeRequirements:
    """Requirements that every node must meet.

    Attributes:
        out: Output folder, which all nodes must share and may write; None: not checked.
        probe: File in `out` that the driver wrote.
        weights: Pairs of weights (a file or a name of the catalogue) and the driver's digest.
        gpus: Whether torch must be able to use the GPUs that Ray counts.
        slides: Local files that the driver sees.
    """

    out: str | None = None
    probe: str | None = None
    weights: tuple[tuple[str, str], ...] = ()
    gpus: bool = False
    slides: tuple[str, ...] = ()


def versions() -> dict[str, str]:
    """Return the versions that must be equal on all nodes, by package name."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    ours = {"python": platform.python_version(), "scellst_ray": __version__}
    return ours | packages | {"openslide": openslide.__library_version__}


def node_facts(asked: NodeRequirements) -> Facts:
    """Return the facts of this node; `wrong` lists the requirements that it does not meet."""
    wrong: list[str] = []
    for check in (_check_out, _check_weights, _check_slides):
        _run_check(partial(check, asked), wrong)
    ray_folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    disk = shutil.disk_usage(ray_folder)
    facts: Facts = {"host": socket.gethostname(), "clock": time.time(), "versions": versions()}
    facts |= {"spill": str(ray_folder), "spill_free_share": disk.free / disk.total}
    _run_check(lambda: facts.update(_cache_facts()), wrong)
    if asked.gpus:
        _run_check(lambda: facts.update(torch_gpus=_count_torch_gpus()), wrong)
    return facts | {"wrong": wrong}


def _run_check(check: Callable[[], None], wrong: list[str]) -> None:
    """Run a check; add the text of its error to `wrong`."""
    try:
        check()
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        wrong.append(str(error))


def _cache_facts() -> Facts:
    root = cache_root()
    return {"cache": str(root), "cache_free": shutil.disk_usage(root).free}


def _check_out(asked: NodeRequirements) -> None:
    """Raise OSError unless this node sees the driver's probe and can write to its folder."""
    if asked.out is None or asked.probe is None:
        return
    remedy = "give an --out on object storage or on a mount that all nodes share and may write"
    try:
        is_shared = storage.exists(asked.probe)
        if is_shared:
            write_probe(asked.out, keep=False)
    except OSError as error:
        message = f"{redact(asked.out)} cannot be written ({error}); {remedy}"
        raise OSError(message) from error
    if not is_shared:
        message = f"{redact(asked.out)} is not the folder the driver writes to; {remedy}"
        raise OSError(message)


def write_probe(out: str, *, keep: bool) -> str:
    """Write a small hidden file to a folder and return its URI.

    Args:
        out: The folder.
        keep: Whether to leave the file there.

    Raises:
        OSError: the folder cannot be written.
    """
    uri = storage.join(out, f".probe-{uuid.uuid4().hex[:12]}")
    storage.publish_text(uri, "scellst_ray\n")
    if not keep:
        storage.remove_tree(uri)
    return uri


def _check_weights(asked: NodeRequirements) -> None:
    """Raise an error if weights are missing, or differ from the driver's."""
    for weights, digest in asked.weights:
        path = weights_path(weights) if is_catalogued(weights) else storage.local_copy(weights)
        own_digest = file_digest(Path(path))
        if own_digest != digest:
            message = (
                f"weights {redact(weights)} have digest {own_digest} here and {digest} on the "
                "driver; give every node the same file"
            )
            raise ValueError(message)


def _check_slides(asked: NodeRequirements) -> None:
    """Raise FileNotFoundError if this node sees none of the driver's local slides."""
    if asked.slides and not any(Path(storage.resolve(uri)[1]).exists() for uri in asked.slides):
        message = (
            f"slides that the driver sees are missing here, such as {asked.slides[0]}; put them on "
            "object storage, or on a mount that all nodes have at the same path"
        )
        raise FileNotFoundError(message)


def _count_torch_gpus() -> int:
    """Return the number of GPUs that torch can use.

    Torch runs in a process of its own, so that this process holds no GPU afterwards.
    """
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", COUNT_GPUS]
    result = subprocess.run(  # noqa: S603 - constants of this module
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if result.returncode:
        last_line = result.stderr.strip().splitlines()[-1:]
        message = f"torch cannot count GPUs ({last_line}); check the installation of torch"
        raise RuntimeError(message)
    return int(result.stdout)


def problems_of_node(
    name: str,
    facts: Mapping[str, Any],
    ours: Mapping[str, str],
    asked_within: tuple[float, float],
    num_gpus: int,
    largest_slide: int,
) -> list[Problem]:
    """Return the problems of a node.

    Args:
        name: Name of the node in messages.
        facts: Result of `node_facts` on the node.
        ours: Result of `versions` on the driver.
        asked_within: Driver's clock in seconds, before the question and after the answer.
        num_gpus: GPUs that Ray counts on the node; 0 if the run uses none.
        largest_slide: Bytes that the node's cache must hold; 0 without slides on object storage.
    """
    where = f"node {name}, {facts['host']}"
    problems = [Problem(f"{where}: {text}") for text in facts["wrong"]]
    theirs = facts["versions"]
    differing = [
        f"{k} {theirs.get(k)} (driver: {v})" for k, v in ours.items() if theirs.get(k) != v
    ]
    if differing:
        text = f"{where}: versions differ: {', '.join(differing)}; give all nodes the same image"
        problems.append(Problem(text))
    if facts.get("torch_gpus", num_gpus) < num_gpus:
        text = (
            f"{where}: Ray counts {num_gpus} GPUs and torch can use {facts['torch_gpus']}; check "
            "the GPU driver and that torch is a CUDA build, or set gpus: false"
        )
        problems.append(Problem(text))
    skew_s = max(asked_within[0] - facts["clock"], facts["clock"] - asked_within[1])
    if skew_s > MAX_SKEW_S:
        text = f"{where}: its clock differs from the driver's by {skew_s:.0f} s; set it (NTP)"
        problems.append(Problem(text, stops=False))
    if facts.get("cache_free", largest_slide) < largest_slide:
        text = (
            f"{where}: {facts['cache']} has {_gb(facts['cache_free'])} free, and the largest slide "
            f"takes {_gb(largest_slide)}; free space, or set {DIR_VARIABLE} to a larger disk"
        )
        problems.append(Problem(text, stops=False))
    if facts["spill_free_share"] < MIN_FREE_SHARE:
        text = (
            f"{where}: the disk of {facts['spill']} is {1 - facts['spill_free_share']:.0%} full, "
            "and Ray stores nothing there above 95 %; free space, or give Ray another --temp-dir"
        )
        problems.append(Problem(text, stops=False))
    return problems


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
