"""Asking every node of a cluster, before work starts, whether it has what the run needs.

One tiny task a node, without a CPU slot; a node that does not answer is told of and not waited for.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scellst_ray import storage
from scellst_ray.pipelines.ray_internals import live_nodes
from scellst_ray.pipelines.session import Cluster
from scellst_ray.preflight.checks import (
    SHOWN_SLIDES,
    FoundSlides,
    Problem,
    find_slides,
    stop_or_warn,
)
from scellst_ray.preflight.nodes import (
    Facts,
    NodeRequirements,
    node_facts,
    problems_of_node,
    versions,
    write_probe,
)
from scellst_ray.slides.manifest import SlideRow

# Starting a process, and fetching weights from object storage.
ANSWER_S = 300.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """A node of the cluster: its id and name, and the GPUs Ray counts there."""

    node_id: str
    name: str
    num_gpus: int


def asked_for(
    out: str, weights: Iterable[tuple[str | None, str | None]] = (), *, gpus: bool = False
) -> NodeRequirements:
    """Return what the nodes of a run must offer.

    Args:
        out: The run's folder.
        weights: As given, and what identifies them: those that are files, by their digest.
        gpus: Whether networks run on GPUs.
    """
    files = tuple((w, d) for w, d in weights if w and d and d.startswith("sha256:"))
    return NodeRequirements(out=out, weights=files, gpus=gpus)


def check_before_run(
    asked: NodeRequirements,
    cluster: Cluster,
    slides: Sequence[SlideRow] = (),
    *,
    imported: bool = False,
    timeout_s: float = ANSWER_S,
) -> tuple[str, ...]:
    """Stop a run that cannot succeed, and tell of what will go wrong in one that can.

    Returns:
        Ids of the nodes to leave out: those whose disk has no room for the largest slide, where
        others have.

    Args:
        asked: What nodes must offer; its probe and slides are filled in here.
        cluster: What there is.
        slides: Those still to do.
        imported: Whether each needs the file of its segmentation.
        timeout_s: Seconds a node may take to answer.

    Raises:
        ValueError: something is wrong with the run as a whole; the message lists everything, a
            line each.
    """
    found = find_slides(slides, imported=imported)
    of_nodes = node_problems(asked, cluster, found, timeout_s)
    stop_or_warn([*of_nodes, *found.problems], logger)
    unfit = {problem.node_id for problem in of_nodes if problem.node_id}
    if unfit >= {node.node_id for node in working_nodes()}:
        return ()
    return tuple(sorted(unfit))


def node_problems(
    asked: NodeRequirements, cluster: Cluster, found: FoundSlides, timeout_s: float = ANSWER_S
) -> list[Problem]:
    """Return what is wrong with the cluster and its nodes."""
    problems = []
    if asked.gpus and not cluster.num_gpus:
        text = (
            "gpus are asked for, and the cluster has none; add nodes with GPUs or say gpus: false"
        )
        problems.append(Problem(text, stops=not cluster.may_grow))
    if asked.out is not None:
        try:
            probe = write_probe(asked.out, keep=True)
        except OSError as error:
            text = f"output: {error}; give an --out that can be written"
            return [*problems, Problem(text)]
        asked = replace(asked, probe=probe)
    asked = replace(asked, slides=tuple(found.local[:SHOWN_SLIDES]))
    sent = time.time()
    try:
        answers = ask_nodes(asked, timeout_s)
    finally:
        if asked.probe is not None:
            storage.remove_tree(asked.probe)
    span = (sent, time.time())
    for node, answer in answers:
        if isinstance(answer, str):
            problems.append(Problem(f"node {node.name}: {answer}", stops=False))
        else:
            gpus = node.num_gpus if asked.gpus else 0
            largest = found.largest_remote
            told = problems_of_node(node.name, answer, versions(), span, gpus, largest)
            if answer.get("cache_free", largest) < largest:
                told = [replace(p, node_id=None if p.stops else node.node_id) for p in told]
            problems += told
    return problems


def ask_nodes(asked: NodeRequirements, timeout_s: float) -> list[tuple[Node, Facts | str]]:
    """Return what each node that can work says, or why it says nothing."""
    nodes = working_nodes()
    if len(nodes) == 1 and _is_here(nodes[0]):
        # Only the node of this process, which has read the weights already.
        return [(nodes[0], node_facts(replace(asked, weights=())))]
    refs = {_sent(asked, node): node for node in nodes}
    ready, late = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
    answers: list[tuple[Node, Facts | str]] = []
    for ref in ready:
        try:
            answers.append((refs[ref], ray.get(ref)))
        except ray.exceptions.RayError as error:
            answers.append((refs[ref], f"could not be asked ({_first_line(error)}); was it lost?"))
    for ref in late:
        ray.cancel(ref, force=True)
        text = f"did not answer in {timeout_s:g} s; it may be lost, or overloaded"
        answers.append((refs[ref], text))
    return sorted(answers, key=lambda answer: answer[0].name)


def working_nodes() -> list[Node]:
    """Return the nodes that are alive and take work: not a head without CPUs."""
    found = []
    for node in live_nodes():
        if node.resources.get("CPU") or node.resources.get("GPU"):
            name = f"{node.address} ({node.node_id[:8]})"
            found.append(Node(node.node_id, name, int(node.resources.get("GPU", 0))))
    return found


def _is_here(node: Node) -> bool:
    return node.node_id == ray.get_runtime_context().get_node_id()


def _sent(asked: NodeRequirements, node: Node) -> "ray.ObjectRef[Facts]":
    place = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(node_facts)
    return task.options(scheduling_strategy=place).remote(asked)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]
